"""What a run's own numbers say is wrong with it, said once when it begins.

Limits are wide: a healthy run crosses none of them for long.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

from absl import logging


@dataclasses.dataclass(frozen=True)
class Alarm:
  """A metric that means trouble beyond a limit.

  Attributes:
    metric: Its name, in `metric_table.METRICS`.
    limit: The last value that is still well.
    is_floor: Whether trouble lies below the limit rather than above it.
    reason: What it means, and what to do.
  """

  metric: str
  limit: float
  is_floor: bool
  reason: str

  def rings(self, value: float) -> bool:
    """Whether the value is beyond the limit, or no number at all."""
    beyond = value < self.limit if self.is_floor else value > self.limit
    return beyond or math.isnan(value)


ALARMS = (
  Alarm(
    "train/grad_norm",
    1e30,
    False,
    "the gradient is not finite, and neither will the parameters be: go back "
    "to a checkpoint, and lower optimizer.learning_rate",
  ),
  Alarm(
    "rollout/all_wrong_fraction",
    0.9,
    False,
    "hardly any prompt is ever answered rightly: start from a warm start or "
    "a stronger model, take easier problems, or raise "
    "rollout.num_generations",
  ),
  Alarm(
    "rollout/all_right_fraction",
    0.9,
    False,
    "hardly any prompt is ever answered wrongly, so little is left to learn: "
    "take harder problems, or set shaping.zero_variance=resample",
  ),
  Alarm(
    "rollout/heuristic_advantage_share",
    0.5,
    False,
    "the heuristic rewards, not right answers, make most of the advantage: "
    "lower rewards.length, rewards.reasoning_words and rewards.coherence",
  ),
  Alarm(
    "rollout/truncated_fraction",
    0.5,
    False,
    "most completions are cut off before they answer: raise "
    "rollout.max_new_tokens, or set shaping.truncated=penalise",
  ),
  Alarm(
    "train/sampler_logp_difference_mean",
    0.05,
    False,
    "sampler and trainer disagree about the same tokens: set "
    "objective.tis_cap=2.0, or model.compute_dtype=float32",
  ),
  Alarm(
    "train/clip_fraction",
    0.5,
    False,
    "the clip holds most tokens, so the policy is far from the one that "
    "sampled: lower optimizer.learning_rate or train.num_iterations",
  ),
  Alarm(
    "train/effective_sample_share",
    0.3,
    True,
    "a few tokens with large ratios outweigh the rest: lower "
    "optimizer.learning_rate or train.num_iterations",
  ),
)


# Alarms that mean nothing where completions are not the policy's own.
OFF_POLICY = ("train/clip_fraction", "train/effective_sample_share")


class Alarms:
  """Warns when a metric crosses its limit, and again only once it was well."""

  def __init__(self, *, ignored: Collection[str] = ()):
    """Watches all metrics of `ALARMS` but those ignored."""
    self._ignored = ignored
    self._ringing: set[str] = set()

  def check(self, step: int, scalars: Mapping[str, float]) -> list[str]:
    """Logs a warning for each alarm that has begun, and returns their metrics.

    Args:
      step: That the scalars are of.
      scalars: By the names of `metrics`; an alarm without its own is left as
        it was.
    """
    begun = []
    for alarm in ALARMS:
      if alarm.metric not in scalars or alarm.metric in self._ignored:
        continue
      value = float(scalars[alarm.metric])
      if not alarm.rings(value):
        self._ringing.discard(alarm.metric)
      elif alarm.metric not in self._ringing:
        self._ringing.add(alarm.metric)
        begun.append(alarm.metric)
        logging.warning(
          "Step %d: %s is %.3g (limit %g): %s.",
          step,
          alarm.metric,
          value,
          alarm.limit,
          alarm.reason,
        )
    return begun
