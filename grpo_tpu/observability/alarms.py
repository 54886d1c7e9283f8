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
    self._own_samples = own_samples
    self._triggered: set[str] = set()

  def check(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
    """Logs a warning for each new alarm and returns the metrics' names.

    An alarm whose metric is not in `scalars` stays as it is.
    """
    new = []
    for metric in registry.metrics():
      name, alarm = metric.name, metric.alarm
      if not alarm or name not in scalars:
        continue
      if alarm.own_samples and not self._own_samples:
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
