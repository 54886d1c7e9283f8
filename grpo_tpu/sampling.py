"""From logits to tokens: each row draws with a key of its own.

A row's key depends on the run's key, the step, the prompt's place in the step
and the row's place in its group; never on batch mates, hosts or restarts.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# Below any logit, and finite: its exponential is exactly 0.
_IMPOSSIBLE = -1.0e30


def row_keys(
  step_key: Key[Array, ""],
  prompt_index: Int[Array, " U"],
  num_completions: int,
) -> Key[Array, "U C"]:
  """One key per completion."""

  def keys_of(index):
    prompt_key = jax.random.fold_in(step_key, index)
    return jax.vmap(lambda g: jax.random.fold_in(prompt_key, g))(
      jnp.arange(num_completions)
    )

  return jax.vmap(keys_of)(prompt_index)


def sample(
  logits: Float[Array, "U C V"],
  keys: Key[Array, "U C"],
  t: Int[Array, ""],
) -> tuple[Int[Array, "U C"], Float[Array, "U C"]]:
  """Token `t` of each row and its log-probability.

  Drawn by inverting the distribution function. One uniform number per token
  does, where Gumbel noise would take `V`. The sums run over blocks of about
  `sqrt(V)` tokens, then within the one block that the number falls into, so
  that no running sum is as long as the vocabulary.

  Args:
    logits: Already divided by the temperature, fp32.
    keys: From `row_keys`.
    t: Index of the token in its completion.
  """
  uniform = jax.vmap(jax.vmap(lambda key: _uniform(key, t)))(keys)
  peak = logits.max(axis=-1)
  blocks = _blocks(jnp.exp(logits - peak[..., None]))
  masses = blocks.sum(axis=-1)
  total = masses.sum(axis=-1)
  block, rest = _fallen(masses, uniform * total)
  weights = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)
  token, _ = _fallen(weights[..., 0, :], rest)
  ids = block * blocks.shape[-1] + token
  chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
  return ids, chosen - peak - jnp.log(total)


def _blocks(weights: Float[Array, "U C V"]) -> Float[Array, "U C n size"]:
  """Cut into blocks of about `sqrt(V)`, the last one filled up with zeros."""
  size = 1 << (math.isqrt(weights.shape[-1] - 1).bit_length() or 1)
  padding = -weights.shape[-1] % size
  padded = jnp.pad(weights, ((0, 0), (0, 0), (0, padding)))
  return padded.reshape(*weights.shape[:-1], -1, size)


def _fallen(
  weights: Float[Array, "U C n"], threshold: Float[Array, "U C"]
) -> tuple[Int[Array, "U C"], Float[Array, "U C"]]:
  """The first whose running sum exceeds a threshold, and what is left of it."""
  # A parallel sum is not monotone in its last bits: a weight of zero is ruled
  # out by hand, and a threshold that no sum exceeds takes the largest sum.
  below = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
  exceeds = below > threshold[..., None]
  index = jnp.where(
    exceeds.any(axis=-1),
    jnp.argmax(exceeds, axis=-1),
    jnp.argmax(below, axis=-1),
  )
  before = jnp.take_along_axis(below - weights, index[..., None], axis=-1)
  return index, jnp.maximum(threshold - before[..., 0], 0.0)


def greedy(
  logits: Float[Array, "U C V"],
) -> tuple[Int[Array, "U C"], Float[Array, "U C"]]:
  """The likeliest token, the lowest id where several tie, and its logp."""
  ids = jnp.argmax(logits, axis=-1)
  return ids, -jnp.log(jnp.exp(logits - logits.max(-1)[..., None]).sum(-1))


def narrowed(
  logits: Float[Array, "*batch V"], *, top_k: int, top_p: float
) -> Float[Array, "*batch V"]:
  """Logits of the likeliest tokens alone; the others become impossible.

  Never for training: what is drawn so has another probability than the one that
  is trained.

  Args:
    logits: Already divided by the temperature.
    top_k: How many are left, more where several tie for the last; 0 for all.
    top_p: The fewest that hold this share of what `top_k` leaves; 1 for all.
  """
  if top_k and top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits >= least, logits, _IMPOSSIBLE)
  if top_p < 1:
    descending = -jnp.sort(-logits, axis=-1)
    share = jax.nn.softmax(descending, axis=-1)
    is_in = jnp.cumsum(share, axis=-1) - share < top_p
    least = jnp.where(is_in, descending, jnp.inf).min(axis=-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, _IMPOSSIBLE)
  return logits


def _uniform(key: Array, t: Array) -> Array:
  return jax.random.uniform(jax.random.fold_in(key, t))
