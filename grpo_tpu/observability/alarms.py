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

    Without `own_samples`, of the policy itself, alarms about these are off.
    """
    self._watched = [
      (metric, metric.alarm)
      for metric in registry.metrics()
      if metric.alarm and (own_samples or not metric.alarm.own_samples)
    ]
    self._triggered: set[str] = set()

  def check(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
    """Logs a warning for each new alarm and returns the metrics' names.

    An alarm whose metric is not in `scalars` stays as it is.
    """
    new = []
    for metric, alarm in self._watched:
      name = metric.name
      if name not in scalars:
        continue
      value = float(scalars[name])
      if not alarm.is_triggered(value):
        self._triggered.discard(name)
      elif name not in self._triggered:
        self._triggered.add(name)
        new.append(name)
        advice = metric.advice.replace("`", "")
        text = "Step %d: %s is %.3g (limit %g). %s"
        logging.warning(text, step, name, value, alarm.limit, advice)
    return new
