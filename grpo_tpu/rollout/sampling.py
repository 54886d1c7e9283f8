"""Samples tokens from logits; each row draws with a key of its own.

A row's key depends on the run's key, the step, the prompt's index in the step
and the row's index in its group; never on batch mates, hosts or restarts.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# Below any logit, and finite; its exponential is exactly 0.
_IMPOSSIBLE = -1.0e30


def row_keys(
  step_key: Key[Array, ""],
  prompt_index: Int[Array, " U"],
  num_completions: int,
) -> Key[Array, "U C"]:
  """One key per completion."""

  def prompt_keys(index):
    prompt_key = jax.random.fold_in(step_key, index)
    return jax.vmap(lambda g: jax.random.fold_in(prompt_key, g))(
      jnp.arange(num_completions)
    )

  return jax.vmap(prompt_keys)(prompt_index)


def sample(
  logits: Float[Array, "U C V"],
  keys: Key[Array, "U C"],
  t: Int[Array, ""],
) -> tuple[Int[Array, "U C"], Float[Array, "U C"]]:
  """Samples token `t` of each row; also gives its log-probability.

  Takes the largest logit after adding Gumbel noise, twice: a block of about
  `sqrt(V)` tokens by its mass, then one of the block's tokens. This needs
  `2 sqrt(V)` random numbers instead of `V`. Rounding differs between meshes,
  and changes a draw only where the two largest nearly tie. Comparing one
  uniform number with a running sum is less robust: with `V` steps, the number
  is often close to one of them.

  The logits are in fp32 and already divided by the temperature.
  """
  peak = logits.max(axis=-1)
  blocks = _blocks(logits - peak[..., None])
  masses = jnp.exp(blocks).sum(axis=-1)
  *_, count, size = blocks.shape
  block_noise, token_noise = jax.vmap(
    jax.vmap(lambda key: _noise(key, t, (count, size)))
  )(keys)
  block = jnp.argmax(jnp.log(masses) + block_noise, axis=-1)
  drawn = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)
  token = jnp.argmax(drawn[..., 0, :] + token_noise, axis=-1)
  ids = block * size + token
  chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
  return ids, chosen - peak - jnp.log(masses.sum(axis=-1))


def _blocks(logits: Float[Array, "U C V"]) -> Float[Array, "U C n size"]:
  """Splits logits into blocks of about `sqrt(V)`; the last one is padded."""
  size = 1 << (math.isqrt(logits.shape[-1] - 1).bit_length() or 1)
  padding = -logits.shape[-1] % size
  padded = jnp.pad(
    logits, ((0, 0), (0, 0), (0, padding)), constant_values=_IMPOSSIBLE
  )
  return padded.reshape(*logits.shape[:-1], -1, size)


def _noise(
  key: Key[Array, ""], t: Int[Array, ""], shape: tuple[int, ...]
) -> tuple[Float[Array, " n"], Float[Array, " size"]]:
  """Gumbel noise of one draw: for the blocks, and for the tokens of a block."""
  keys = jax.random.split(jax.random.fold_in(key, t))
  # "high" has tails fine enough for rare tokens.
  block_noise, token_noise = (
    jax.random.gumbel(key, (size,), mode="high")
    for key, size in zip(keys, shape, strict=True)
  )
  return block_noise, token_noise


def greedy(
  logits: Float[Array, "U C V"],
) -> tuple[Int[Array, "U C"], Float[Array, "U C"]]:
  """The likeliest token, the lowest id of a tie, and its log-probability."""
  ids = jnp.argmax(logits, axis=-1)
  return ids, -jnp.log(jnp.exp(logits - logits.max(-1)[..., None]).sum(-1))


def top_k_top_p(
  logits: Float[Array, "*batch V"], *, top_k: int, top_p: float
) -> Float[Array, "*batch V"]:
  """Makes all but the likeliest tokens impossible; never for training.

  There the probability of a sampled token must be the one that is trained.

  Args:
    logits: Logits, already divided by the temperature.
    top_k: Number of tokens to keep, more if several tie for the last; 0 keeps
      all.
    top_p: Keeps the fewest of these that hold this share of the probability; 1
      keeps all.
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
