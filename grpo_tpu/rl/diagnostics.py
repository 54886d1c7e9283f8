"""Measures of how much a batch of groups can teach, and what teaches it.

Pure functions of rewards and advantages, over the whole batch.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from grpo_tpu.rl import shaping

Metrics = dict[str, Float[Array, ""]]


def effective_sample_size(
  weights: Float[ArrayLike, "*batch"],
) -> Float[Array, ""]:
  """Kish's effective sample size, `(sum |w|)^2 / sum w^2`; 0 if all are 0.

  Of advantages, the number of completions that the gradient rests on.
  """
  weights = jnp.abs(jnp.asarray(weights, jnp.float32))
  squares = jnp.square(weights).sum()
  return jnp.square(weights.sum()) / jnp.where(squares > 0, squares, 1.0)


def advantage_share(
  part: Float[ArrayLike, "B G"],
  total: Float[ArrayLike, "B G"],
  advantages: Float[ArrayLike, "B G"],
  *,
  valid: Bool[ArrayLike, "B G"],
) -> Float[Array, ""]:
  """The share of the advantage that comes from a (weighted) part of the reward.

  The part and the rest of the total are centered on their group's mean and
  scaled as the group's advantages were. The share is the part's absolute sum
  over that of both; 0 if nothing differs. Only valid rows count.
  """
  part, total, advantages = (
    jnp.asarray(x, jnp.float32) for x in (part, total, advantages)
  )
  is_valid = jnp.asarray(valid)
  count = jnp.maximum(is_valid.sum(axis=1, keepdims=True), 1)

  def center(values):
    values = jnp.where(is_valid, values, 0.0)
    mean = values.sum(axis=1, keepdims=True) / count
    return jnp.where(is_valid, values - mean, 0.0)

  def norm(values):
    return jnp.sqrt(jnp.square(values).sum(axis=1, keepdims=True))

  spread = norm(center(total))
  scale = jnp.where(
    spread > 0, norm(advantages) / jnp.where(spread > 0, spread, 1.0), 0.0
  )
  part_sum = jnp.abs(scale * center(part)).sum()
  rest_sum = jnp.abs(scale * center(total - part)).sum()
  both = part_sum + rest_sum
  return part_sum / jnp.where(both > 0, both, 1.0)


@jax.jit
def reward_statistics(
  rewards: dict[str, Float[Array, "B G"]],
  valid: Bool[Array, "B G"],
  known: Bool[Array, "B G"],
  compared: dict[str, Float[Array, "B G"]] | None = None,
) -> Metrics:
  """Means and spreads of the valid rewards, over the batch and within groups.

  Accuracy counts the rows `known` alone: the valid ones that rules can check.
  Groups are unanimous in the rewards `compared`, by default the total.
  """
  total = rewards["total"]
  correct = rewards["accuracy"] > 0.5
  some_right = (correct & known).any(axis=1)
  some_wrong = (~correct & known).any(axis=1)
  num_known = jnp.maximum(known.any(axis=1).sum(), 1)
  count = jnp.maximum(valid.sum(axis=1), 1)
  centered = total - (jnp.where(valid, total, 0.0).sum(1) / count)[:, None]
  spread = jnp.sqrt(
    jnp.where(valid, centered**2, 0.0).sum(1) / jnp.maximum(count - 1, 1)
  )
  groups = valid.any(axis=1)
  num_groups = jnp.maximum(groups.sum(), 1)
  has_signal = shaping.has_signal(compared or {"total": total}, valid)
  unanimous = groups & ~has_signal
  metrics = {
    "rollout/reward": valid_mean(total, valid),
    "rollout/reward_std": jnp.where(groups, spread, 0.0).sum() / num_groups,
    "rollout/accuracy": valid_mean(rewards["accuracy"], known),
    "rollout/unanimous_fraction": unanimous.sum() / num_groups,
    "rollout/all_right_fraction": (some_right & ~some_wrong).sum() / num_known,
    "rollout/all_wrong_fraction": (some_wrong & ~some_right).sum() / num_known,
    "rollout/mixed_fraction": (some_right & some_wrong).sum() / num_known,
  }
  sums = {"total", "heuristics", "length_penalty"}
  for name in sorted(rewards.keys() - sums):
    counts = known if name == "accuracy" else valid
    counts &= jnp.isfinite(rewards[name])  # Nobody may have been asked.
    mean = valid_mean(rewards[name], counts)
    metrics[f"reward/{name}_mean"] = mean
    metrics[f"reward/{name}_std"] = jnp.sqrt(
      valid_mean(jnp.square(rewards[name] - mean), counts)
    )
  return metrics


@jax.jit
def rollout_statistics(
  mask: Bool[Array, "B G T"],
  stopped: Bool[Array, "B G"],
  valid: Bool[Array, "B G"],
  prompt_length: Array,
) -> Metrics:
  """Mean lengths in tokens, and the share of truncated completions."""
  return {
    "rollout/completion_length": valid_mean(mask.sum(-1), valid),
    "rollout/truncated_fraction": valid_mean(~stopped, valid),
    "rollout/prompt_length": valid_mean(prompt_length, valid.any(axis=1)),
  }


def valid_mean(values: Array, valid: Array) -> Float[Array, ""]:
  """The mean over valid rows; 0 if there are none."""
  total = jnp.where(valid, values, 0).sum(dtype=jnp.float32)
  return total / jnp.maximum(valid.sum(), 1)
