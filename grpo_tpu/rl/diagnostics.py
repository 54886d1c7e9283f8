"""Whether a batch of groups has something to teach, and what teaches it.

Pure functions of rewards and advantages, over the whole batch.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

Metrics = dict[str, Float[Array, ""]]


def group_correctness(
  correct: Bool[ArrayLike, "B G"],
  *,
  valid: Bool[ArrayLike, "B G"] | None = None,
) -> Metrics:
  """The shares of groups that were all right, all wrong, and mixed.

  Only mixed groups teach what is right. The three add up to 1 over the groups
  with a valid row, and are 0 where there is none.

  Args:
    correct: Whether each completion's answer was right.
    valid: False where that is not known; None means all are.
  """
  correct = jnp.asarray(correct)
  counted = jnp.ones_like(correct) if valid is None else jnp.asarray(valid)
  some_right = (correct & counted).any(axis=1)
  some_wrong = (~correct & counted).any(axis=1)
  num_groups = jnp.maximum(counted.any(axis=1).sum(), 1)
  return {
    "all_right": (some_right & ~some_wrong).sum() / num_groups,
    "all_wrong": (some_wrong & ~some_right).sum() / num_groups,
    "mixed": (some_right & some_wrong).sum() / num_groups,
  }


def effective_sample_size(
  weights: Float[ArrayLike, "*batch"],
) -> Float[Array, ""]:
  """How many equal weights would be as uneven as these: Kish's formula.

  `(sum |w|)^2 / sum w^2`: N for N equal ones, 1 where one has all, 0 where all
  are 0. Of advantages, it is the number of completions that the gradient rests
  on; of importance ratios, the number of samples they are worth.

  References:
    Kish, Survey Sampling, 1965
  """
  weights = jnp.abs(jnp.asarray(weights, jnp.float32))
  squares = jnp.square(weights).sum()
  return jnp.square(weights.sum()) / jnp.where(squares > 0, squares, 1.0)


def advantage_share(
  part: Float[ArrayLike, "B G"],
  total: Float[ArrayLike, "B G"],
  advantages: Float[ArrayLike, "B G"],
  *,
  valid: Bool[ArrayLike, "B G"] | None = None,
) -> Float[Array, ""]:
  """The share of the advantage that comes from one part of the reward.

  The reward is `part` plus the rest; each is centred on its group's mean and
  scaled as the group's advantages were. The share is the part's absolute sum
  over the sum of both: 0 where the part never differs within a group, 1 where
  nothing else does, 0 where nothing does at all.

  Args:
    part: What that part pays each completion, weight included.
    total: The whole reward.
    advantages: What it became.
    valid: False on rows that do not count; None means all do.
  """
  part, total, advantages = (
    jnp.asarray(x, jnp.float32) for x in (part, total, advantages)
  )
  counted = jnp.ones(total.shape, bool) if valid is None else jnp.asarray(valid)
  count = jnp.maximum(counted.sum(axis=1, keepdims=True), 1)

  def centred(values):
    values = jnp.where(counted, values, 0.0)
    mean = values.sum(axis=1, keepdims=True) / count
    return jnp.where(counted, values - mean, 0.0)

  def norm(values):
    return jnp.sqrt(jnp.square(values).sum(axis=1, keepdims=True))

  spread = norm(centred(total))
  scale = jnp.where(
    spread > 0, norm(advantages) / jnp.where(spread > 0, spread, 1.0), 0.0
  )
  of_part = jnp.abs(scale * centred(part)).sum()
  of_rest = jnp.abs(scale * centred(total - part)).sum()
  both = of_part + of_rest
  return of_part / jnp.where(both > 0, both, 1.0)
