"""Attention over a bundle: its own keys, and the keys of a shared prompt.

Knows of queries, keys, values and who sees whom; not of layers or caches. An
einsum serves every platform, and a kernel that never holds the scores serves
TPUs; `docs/adr/0007-splash-attention-reads-spans.md` says how.

References:
  Gemma 3 Technical Report (arXiv:2503.19786), section 2: sliding windows, and
  bidirectional attention among the tokens of one image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_tpu.models.settings import ATTENTION_KINDS

# Finite, so that a row with no visible key stays finite (and unused).
_MASKED = -2.0e38


class AttentionSpec(NamedTuple):
  """Which keys a layer's queries see.

  Attributes:
    prompt_length: Tokens of each prompt before the padding on its right.
    window: Reach of this layer in positions, in both directions.
    is_global: Whether that is more than any distance.
    local_window: Reach of the layers that are not global.
    soft_tokens: Tokens of an image, none of which is out of its first's reach.
    image_block: 1, 2, ... on the soft tokens of a prompt's first, second, ...
      image; 0 on text. Tokens of one block see each other both ways.
  """

  prompt_length: Int[Array, " U"]
  window: Int[Array, ""]
  is_global: Int[Array, ""]
  local_window: int
  soft_tokens: int
  image_block: Int[Array, "U P"] | None = None


def choose_implementation(setting: str, platform: str) -> str:
  """What `attend` is to run: "einsum", "splash" or "interpreted_splash".

  Args:
    setting: The setting `model.attention`.
    platform: Of the devices, as JAX names them. Off TPUs the kernel runs in
      an interpreter, which is slow and serves to be looked at.
  """
  assert setting in ATTENTION_KINDS, setting
  if setting == "auto":
    return "splash" if platform == "tpu" else "einsum"
  if setting == "splash" and platform != "tpu":
    return "interpreted_splash"
  return setting


def attend(
  q: Float[Array, "U C t Q H"],
  k: Float[Array, "U C s K H"],
  v: Float[Array, "U C s K H"],
  sight: AttentionSpec,
  *,
  prompt: tuple[Float[Array, "U P K H"], Float[Array, "U P K H"]] | None = None,
  implementation: str = "einsum",
) -> Float[Array, "U C t Q H"]:
  """What each query reads from its own row and from its bundle's prompt.

  One softmax runs over both parts, in fp32, so the result is that of separate
  rows which each hold a copy of the prompt.

  Args:
    q: Queries, scaled and rotated.
    k: Keys of the row itself, rotated.
    v: Values of the row itself.
    sight: Which keys a query sees.
    prompt: Keys and values of the prompt, shared by the `C` completions of a
      bundle. Without it the rows are the prompts themselves, and `C` is 1.
    implementation: From the function of that name.

  Returns:
    The sum of values for each query; anything finite for padding.
  """
  if implementation != "einsum":
    # Loads slowly, and few machines have a use for it.
    from grpo_tpu.models.gemma3 import splash

    return splash.attend(
      q,
      k,
      v,
      sight.prompt_length,
      sight.image_block,
      window=sight.local_window,
      soft_tokens=sight.soft_tokens,
      is_global=sight.is_global > 0,
      prompt=prompt,
      interpret=implementation == "interpreted_splash",
    )
  if prompt is None:
    assert sight.image_block is not None
    mask = prompt_mask(sight.image_block, sight.prompt_length, sight.window)
    return _einsum(q, k, v, mask)
  to_prompt, own = completion_masks(
    sight.prompt_length,
    prompt[0].shape[1],
    jnp.arange(q.shape[2]),
    k.shape[2],
    sight.window,
  )
  return _einsum(q, k, v, own, prompt=prompt, to_prompt=to_prompt)


def _einsum(
  q: Float[Array, "U C t Q H"],
  k: Float[Array, "U C s K H"],
  v: Float[Array, "U C s K H"],
  mask: Bool[Array, "#U #C t s"],
  *,
  prompt: tuple[Array, Array] | None = None,
  to_prompt: Bool[Array, "#U #C t P"] | None = None,
) -> Float[Array, "U C t Q H"]:
  """`attend` with masks, holding all scores of the layer at once."""
  u, c, t, num_heads, head_dim = q.shape
  q = q.reshape(u, c, t, k.shape[-2], -1, head_dim)
  scores = _masked(_scores("uctkgh,ucskh->uckgts", q, k), mask)
  if prompt is None:
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("uckgts,ucskh->uctkgh", weights, v)
  else:
    prompt_k, prompt_v = prompt
    num_prompt = prompt_k.shape[1]
    assert to_prompt is not None
    prompt_scores = _masked(
      _scores("uctkgh,upkh->uckgtp", q, prompt_k), to_prompt
    )
    scores = jnp.concatenate([prompt_scores, scores], -1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum(
      "uckgtp,upkh->uctkgh", weights[..., :num_prompt], prompt_v
    ) + jnp.einsum("uckgts,ucskh->uctkgh", weights[..., num_prompt:], v)
  return out.reshape(u, c, t, num_heads, head_dim)


def attend_cached(
  q: Float[Array, "U C Q H"],
  own: tuple[Float[Array, "U C K s H"], Float[Array, "U C K s H"]],
  prompt: tuple[Float[Array, "U K p H"], Float[Array, "U K p H"]],
  *,
  sees_own: Bool[Array, " s"],
  sees_prompt: Bool[Array, "U p"],
) -> Float[Array, "U C Q H"]:
  """What one token of each row reads from caches, heads before tokens.

  One softmax over both parts, as in `attend`.

  Args:
    q: Queries, scaled and rotated.
    own: Keys and values of each row.
    prompt: Those of each bundle's prompt.
    sees_own: Which own ones are there.
    sees_prompt: Which of the prompt's are in sight.
  """
  u, c, num_heads, head_dim = q.shape
  (k, v), (prompt_k, prompt_v) = own, prompt
  q = q.reshape(u, c, k.shape[2], -1, head_dim)
  scores = jnp.concatenate(
    [
      jnp.where(
        sees_prompt[:, None, None, None],
        _scores("uckgh,ukph->uckgp", q, prompt_k),
        _MASKED,
      ),
      jnp.where(
        sees_own[None, None, None, None],
        _scores("uckgh,ucksh->uckgs", q, k),
        _MASKED,
      ),
    ],
    axis=-1,
  )
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  num_prompt = prompt_k.shape[2]
  out = jnp.einsum(
    "uckgp,ukph->uckgh", weights[..., :num_prompt], prompt_v
  ) + jnp.einsum("uckgs,ucksh->uckgh", weights[..., num_prompt:], v)
  return out.reshape(u, c, num_heads, head_dim)


def _scores(subscripts: str, q: Array, k: Array) -> Array:
  """In fp32, as the softmax wants them, whatever the type of the factors."""
  return jnp.einsum(subscripts, q, k, preferred_element_type=jnp.float32)


def _masked(scores: Array, mask: Array) -> Array:
  return jnp.where(mask[:, :, None, None], scores, _MASKED)


def prompt_mask(
  image_block: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  window: Int[Array, ""],
) -> Bool[Array, "U 1 P P"]:
  """Which prompt tokens each prompt token sees.

  Args:
    image_block: 1, 2, ... on the soft tokens of the first, second, ... image;
      0 on text. Tokens of one block see each other both ways.
    prompt_length: Tokens before the padding on the right.
    window: Reach in positions, in both directions.
  """
  index = jnp.arange(image_block.shape[1])
  query, key = index[:, None], index[None, :]
  same_image = (image_block[:, :, None] == image_block[:, None, :]) & (
    image_block[:, :, None] > 0
  )
  seen = (key <= query)[None] | same_image
  seen &= (jnp.abs(query - key) < window)[None]
  seen &= key[None] < prompt_length[:, None, None]
  return seen[:, None]


def completion_masks(
  prompt_length: Int[Array, " U"],
  num_prompt: int,
  t: Int[Array, " t"],
  num_own: int,
  window: Int[Array, ""],
) -> tuple[Bool[Array, "U 1 t P"], Bool[Array, "1 1 t s"]]:
  """Which prompt tokens and which own tokens completion tokens see.

  A completion token stands at position `prompt_length + t`, so its distance to
  prompt token `p` does not depend on the padding between them.

  Args:
    prompt_length: Tokens of each bundle's prompt before its padding.
    num_prompt: The padded length of prompts.
    t: Index in the completion of each query.
    num_own: How many own keys there are; key `s` is completion token `s`.
    window: Reach in positions.
  """
  p = jnp.arange(num_prompt)[None, None, :]
  length = prompt_length[:, None, None]
  to_prompt = (p < length) & (length + t[None, :, None] - p < window)
  distance = t[:, None] - jnp.arange(num_own)[None, :]
  own = (distance >= 0) & (distance < window)
  return to_prompt[:, None], own[None, None]
