"""How often a score prefers the completion that a label prefers.

Pure functions of arrays over pairs of completions of one prompt.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

Metrics = dict[str, Float[Array, ""]]


def all_pairs(
  scores: Num[ArrayLike, "U C"], preferred: Bool[ArrayLike, "U C C"]
) -> tuple[Num[Array, " pairs"], Num[Array, " pairs"], Bool[Array, " pairs"]]:
  """The scores of every two completions of a group, as chosen and rejected.

  For each of the U C C ordered pairs: the score of the chosen completion, the
  score of the rejected one, and True if the pair has such a label, which is
  `preferred[u, i, j]` if completion i is preferred to j.
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
  valid: Bool[ArrayLike, " B"] | None = None,
) -> Float[Array, ""]:
  """The share of valid pairs whose chosen completion scores higher.

  A tie counts half.
  """
  difference = jnp.asarray(chosen) - jnp.asarray(rejected)
  wins = 0.5 * (1.0 + jnp.sign(difference.astype(jnp.float32)))
  return _mean(wins, valid)


def implicit_preference(
  chosen_logps: Float[ArrayLike, " B"],
  rejected_logps: Float[ArrayLike, " B"],
  ref_chosen_logps: Float[ArrayLike, " B"],
  ref_rejected_logps: Float[ArrayLike, " B"],
  *,
  beta: float | int,
  valid: Bool[ArrayLike, " B"] | None = None,
) -> Metrics:
  """Preferences of the policy itself, relative to the reference.

  A completion's implicit reward is beta times its log-ratio to the reference.
  Log-probabilities are those of whole completions: the sums over their tokens,
  or the means for a measure that does not depend on length.

  Returns:
    Means over valid pairs: `implicit_preference_accuracy` (ties count half),
    `chosen_reward`, `rejected_reward`, and their difference
    `implicit_preference_margin`.
  """
  chosen = jnp.asarray(chosen_logps) - jnp.asarray(ref_chosen_logps)
  rejected = jnp.asarray(rejected_logps) - jnp.asarray(ref_rejected_logps)
  return {
    "implicit_preference_accuracy": accuracy(chosen, rejected, valid=valid),
    "chosen_reward": beta * _mean(chosen, valid),
    "rejected_reward": beta * _mean(rejected, valid),
    "implicit_preference_margin": beta * _mean(chosen - rejected, valid),
  }


def _mean(values, valid):
  """The mean of the valid values, 0 if there are none."""
  if valid is None:
    return values.mean()
  valid = jnp.asarray(valid)
  return jnp.where(valid, values, 0.0).sum() / jnp.maximum(valid.sum(), 1)
