"""Warnings in the log when a metric crosses the limit in `metrics.toml`.

The limits are wide: no metric of a healthy run stays beyond one for long.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging

from grpo_tpu.observability import registry


class Alarms:
  """Warns when a metric crosses its limit, and again after it has recovered."""

  def __init__(self, *, own_samples: bool):
    """Watches the metrics that have an alarm.

    Args:
      own_samples: True if the policy sampled the completions. If it did not,
        alarms that say something about its own samples alone are off.
    """
    self._watched = [
      (metric, metric.alarm)
      for metric in registry.metrics()
      if metric.alarm and (own_samples or not metric.alarm.own_samples)
    ]
    self._triggered: set[str] = set()

  def check(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
    """Logs a warning for each new alarm and returns the metrics' names.

    Args:
      step: The step of the scalars.
      scalars: Values by metric name. The state of an alarm whose metric is
        missing does not change.
    """
    new = []
    for metric, alarm in self._watched:
      if metric.name not in scalars:
        continue
      value = float(scalars[metric.name])
      if not alarm.is_triggered(value):
        self._triggered.discard(metric.name)
      elif metric.name not in self._triggered:
        self._triggered.add(metric.name)
        new.append(metric.name)
        logging.warning(
          "Step %d: %s is %.3g (limit %g). %s",
          *(step, metric.name, value, alarm.limit),
          metric.advice.replace("`", ""),
        )
    return new
