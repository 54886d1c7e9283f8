"""Attention of a bundle's rows, to their own keys and to those of their prompt.

Knows queries, keys, values and masks; not layers or caches. An einsum serves
every platform; on TPUs a kernel avoids holding the scores, as
`docs/adr/0007-splash-attention-reads-spans.md` explains.

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
  """The keys that a layer's queries see."""

  prompt_length: Int[Array, " U"]  # Tokens of each prompt before its padding.
  window: Int[Array, ""]  # Reach in positions, in both directions.
  is_global: Int[Array, ""]  # 1 if the layer has no window, else 0.
  local_window: int  # Reach of the local layers.
  soft_tokens: int  # Tokens per image; at most `local_window`.
  # 1, 2, ... on the soft tokens of a prompt's first, second, ... image; 0 on
  # text. Tokens of one block see each other both ways.
  image_block: Int[Array, "U P"] | None = None


def choose_implementation(setting: str, platform: str) -> str:
  """Chooses einsum, splash or interpreted_splash for `model.attention`.

  Off TPUs the kernel runs in an interpreter, which is slow and only useful for
  tests.
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
  spec: AttentionSpec,
  *,
  prompt: tuple[Float[Array, "U P K H"], Float[Array, "U P K H"]] | None = None,
  implementation: str = "einsum",
) -> Float[Array, "U C t Q H"]:
  """Attention of each query to its own row and to its bundle's prompt.

  One softmax runs over both parts, in fp32, so the result equals that of
  separate rows that each hold a copy of the prompt. It is arbitrary but finite
  on padding.

  Queries are scaled and rotated, keys rotated. `prompt` has the keys and values
  that the `C` completions of a bundle share; without it the rows are the
  prompts themselves, and `C` is 1. For `implementation` see
  `choose_implementation`.
  """
  if implementation != "einsum":
    # Imported here because it loads slowly and few machines need it.
    from grpo_tpu.models.gemma3 import splash

    return splash.attend(
      q,
      k,
      v,
      spec.prompt_length,
      spec.image_block,
      window=spec.local_window,
      soft_tokens=spec.soft_tokens,
      is_global=spec.is_global > 0,
      prompt=prompt,
      interpret=implementation == "interpreted_splash",
    )
  if prompt is None:
    assert spec.image_block is not None
    mask = prompt_mask(spec.image_block, spec.prompt_length, spec.window)
    return _einsum(q, k, v, mask)
  to_prompt, own = completion_masks(
    spec.prompt_length,
    prompt[0].shape[1],
    jnp.arange(q.shape[2]),
    k.shape[2],
    spec.window,
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
  """`attend` by masks; holds all scores of the layer at once."""
  u, c, t, num_heads, head_dim = q.shape
  q = q.reshape(u, c, t, k.shape[-2], -1, head_dim)
  scores = _apply_mask(_scores("uctkgh,ucskh->uckgts", q, k), mask)
  if prompt is None:
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("uckgts,ucskh->uctkgh", weights, v)
  else:
    prompt_k, prompt_v = prompt
    num_prompt = prompt_k.shape[1]
    assert to_prompt is not None
    prompt_scores = _apply_mask(
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
  """Attention of one token of each row to caches with heads before tokens.

  One softmax runs over both parts, as in `attend`. `own` and `prompt` are keys
  and values; a query sees their slots where `sees_own` and `sees_prompt` are
  True.
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
  """Scores in fp32, for the softmax, whatever the type of the factors."""
  return jnp.einsum(subscripts, q, k, preferred_element_type=jnp.float32)


def _apply_mask(scores: Array, mask: Array) -> Array:
  return jnp.where(mask[:, :, None, None], scores, _MASKED)


def prompt_mask(
  image_block: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  window: Int[Array, ""],
) -> Bool[Array, "U 1 P P"]:
  """Mask of the prompt tokens that each prompt token sees.

  The arguments are attributes of `AttentionSpec`.
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
  """Masks of the prompt tokens and own tokens that completion tokens see.

  A completion token has position `prompt_length + t`, so its distance to prompt
  token `p` does not depend on the padding between them. `num_prompt` is the
  padded length of the prompts, `t` the index of each query in its completion;
  own key `s` is completion token `s`.
  """
  p = jnp.arange(num_prompt)[None, None, :]
  length = prompt_length[:, None, None]
  to_prompt = (p < length) & (length + t[None, :, None] - p < window)
  distance = t[:, None] - jnp.arange(num_own)[None, :]
  own = (distance >= 0) & (distance < window)
  return to_prompt[:, None], own[None, None]
