"""How often a score prefers the completion that a label prefers.

Pure functions of arrays over pairs of completions of one prompt.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from grpo_tpu.rl import diagnostics


def all_pairs(
  scores: Num[ArrayLike, "U C"], preferred: Bool[ArrayLike, "U C C"]
) -> tuple[Num[Array, " pairs"], Num[Array, " pairs"], Bool[Array, " pairs"]]:
  """Scores of each ordered pair of a group's completions, chosen and rejected.

  Also True where the pair is `preferred` so: [u, i, j] if i is better than j.
  """
  scores, preferred = jnp.asarray(scores), jnp.asarray(preferred)
  shape = preferred.shape
  chosen = jnp.broadcast_to(scores[:, :, None], shape).ravel()
  rejected = jnp.broadcast_to(scores[:, None, :], shape).ravel()
  return chosen, rejected, preferred.ravel()


def accuracy(
  chosen: Num[ArrayLike, " B"],
  rejected: Num[ArrayLike, " B"],
  *,
  valid: Bool[ArrayLike, " B"],
) -> Float[Array, ""]:
  """The share of valid pairs whose chosen one scores higher; a tie is half."""
  return diagnostics.valid_mean(wins(chosen, rejected), jnp.asarray(valid))


def wins(
  chosen: Num[ArrayLike, " B"], rejected: Num[ArrayLike, " B"]
) -> Float[Array, " B"]:
  """1 for pairs whose chosen one scores higher, 0.5 for a tie, else 0."""
  difference = jnp.asarray(chosen) - jnp.asarray(rejected)
  return 0.5 * (1.0 + jnp.sign(difference.astype(jnp.float32)))
