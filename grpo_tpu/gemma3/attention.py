"""Attention over a bundle: its own keys, and the keys of a shared prompt.

Knows of queries, keys, values and masks; not of layers, caches or positions
beyond the three masks below.

References:
  Gemma 3 Technical Report (arXiv:2503.19786), section 2: sliding windows, and
  bidirectional attention among the tokens of one image.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row with no visible key stays finite (and unused).
_MASKED = -2.0e38


def attend(
  q: Float[Array, "U C t Q H"],
  k: Float[Array, "U C s K H"],
  v: Float[Array, "U C s K H"],
  mask: Bool[Array, "#U #C t s"],
  *,
  prompt_k: Float[Array, "U P K H"] | None = None,
  prompt_v: Float[Array, "U P K H"] | None = None,
  prompt_mask: Bool[Array, "#U #C t P"] | None = None,
) -> Float[Array, "U C t Q H"]:
  """What each query reads from its own row and from its bundle's prompt.

  One softmax runs over both parts, in fp32, so the result is that of separate
  rows which each hold a copy of the prompt.

  Args:
    q: Queries, scaled and rotated.
    k: Keys of the row itself, rotated.
    v: Values of the row itself.
    mask: Which own keys a query sees.
    prompt_k: Keys of the prompt, shared by the `C` rows of a bundle.
    prompt_v: Values of the prompt.
    prompt_mask: Which prompt keys a query sees.
  """
  u, c, t, num_heads, head_dim = q.shape
  q = q.reshape(u, c, t, k.shape[-2], -1, head_dim)
  scores = _masked(jnp.einsum("uctkgh,ucskh->uckgts", q, k), mask)
  if prompt_k is not None:
    prompt_scores = jnp.einsum("uctkgh,upkh->uckgtp", q, prompt_k)
    scores = jnp.concatenate([_masked(prompt_scores, prompt_mask), scores], -1)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  if prompt_k is None:
    out = jnp.einsum("uckgts,ucskh->uctkgh", weights, v)
  else:
    num_prompt = prompt_k.shape[1]
    out = jnp.einsum(
      "uckgtp,upkh->uctkgh", weights[..., :num_prompt], prompt_v
    ) + jnp.einsum("uckgts,ucskh->uctkgh", weights[..., num_prompt:], v)
  return out.reshape(u, c, t, num_heads, head_dim)


def _masked(scores: Array, mask: Array | None) -> Array:
  assert mask is not None
  return jnp.where(mask[:, :, None, None], scores.astype(jnp.float32), _MASKED)


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
