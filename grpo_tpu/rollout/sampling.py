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

  The largest of logits with Gumbel noise, drawn twice: a block of about
  `sqrt(V)` tokens by its mass, then one of its tokens. So the noise is of
  `2 sqrt(V)` numbers, not of `V`. And rounding, which differs from mesh to
  mesh, moves a draw only where the two largest all but tie. One uniform number
  against a running sum would do too, but among `V` steps it is near to some.

  Args:
    logits: Already divided by the temperature, fp32.
    keys: From `row_keys`.
    t: Index of the token in its completion.
  """
  peak = logits.max(axis=-1)
  blocks = _blocks(logits - peak[..., None])
  masses = jnp.exp(blocks).sum(axis=-1)
  *_, count, size = blocks.shape
  of_blocks, of_tokens = jax.vmap(
    jax.vmap(lambda key: _noise(key, t, (count, size)))
  )(keys)
  block = jnp.argmax(jnp.log(masses) + of_blocks, axis=-1)
  fallen = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)
  token = jnp.argmax(fallen[..., 0, :] + of_tokens, axis=-1)
  ids = block * size + token
  chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
  return ids, chosen - peak - jnp.log(masses.sum(axis=-1))


def _blocks(logits: Float[Array, "U C V"]) -> Float[Array, "U C n size"]:
  """Cut into blocks of about `sqrt(V)`, the last one filled up."""
  size = 1 << (math.isqrt(logits.shape[-1] - 1).bit_length() or 1)
  padding = -logits.shape[-1] % size
  padded = jnp.pad(
    logits, ((0, 0), (0, 0), (0, padding)), constant_values=_IMPOSSIBLE
  )
  return padded.reshape(*logits.shape[:-1], -1, size)


def _noise(
  key: Key[Array, ""], t: Int[Array, ""], shape: tuple[int, ...]
) -> tuple[Float[Array, " n"], Float[Array, " size"]]:
  """Gumbel noise of one draw, for the blocks and for the tokens of one."""
  keys = jax.random.split(jax.random.fold_in(key, t))
  # With tails as fine as the rare tokens'; it is little noise.
  of_blocks, of_tokens = (
    jax.random.gumbel(key, (size,), mode="high")
    for key, size in zip(keys, shape, strict=True)
  )
  return of_blocks, of_tokens


def greedy(
  logits: Float[Array, "U C V"],
) -> tuple[Int[Array, "U C"], Float[Array, "U C"]]:
  """The likeliest token, the lowest id where several tie, and its logp."""
  ids = jnp.argmax(logits, axis=-1)
  return ids, -jnp.log(jnp.exp(logits - logits.max(-1)[..., None]).sum(-1))


def top_k_top_p(
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
