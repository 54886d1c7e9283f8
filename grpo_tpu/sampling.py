"""From logits to tokens: each row draws with a key of its own.

A row's key depends on the run's key, the step, the prompt's place in the step
and the row's place in its group; never on batch mates, hosts or restarts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


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
) -> Int[Array, "U C"]:
  """Token `t` of each row, drawn by inverting the distribution function.

  One uniform number per token does, where Gumbel noise would take `V`.

  Args:
    logits: Already divided by the temperature, fp32.
    keys: From `row_keys`.
    t: Index of the token in its completion.
  """
  uniform = jax.vmap(jax.vmap(lambda key: _uniform(key, t)))(keys)
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  # A parallel sum is not monotone in its last bits: a token of weight zero is
  # ruled out by hand, and the threshold lies below the highest that is left.
  below = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
  threshold = uniform[..., None] * below.max(axis=-1, keepdims=True)
  return jnp.argmax(below > threshold, axis=-1).astype(jnp.int32)


def greedy(logits: Float[Array, "U C V"]) -> Int[Array, "U C"]:
  """The likeliest token; the lowest id where several tie."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _uniform(key: Array, t: Array) -> Array:
  return jax.random.uniform(jax.random.fold_in(key, t))
