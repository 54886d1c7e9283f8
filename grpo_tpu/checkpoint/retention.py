"""Decides how good a checkpoint is and which checkpoints may be deleted."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from grpo_tpu.checkpoint.settings import CheckpointConfig

_NAME = re.compile(r"(\d{8,})(?:\.(\d+))?")


@dataclasses.dataclass(frozen=True, order=True)
class CheckpointInfo:
  """Identifies one checkpoint; a later checkpoint compares greater."""

  step: int  # Finished steps.
  updates: int = 0  # Of the step after them; 0 between two steps.
  # False if the manifest is missing or damaged: it cannot be trusted.
  is_whole: bool = dataclasses.field(default=True, compare=False)
  # The best metric, higher is better, and its `CheckpointConfig.scored_by`.
  score: float | None = dataclasses.field(default=None, compare=False)
  metric: str = dataclasses.field(default="", compare=False)

  @property
  def name(self) -> str:
    """Name of the folder: `00000012`, or `00000012.1` one update later."""
    return f"{self.step:08}" + (f".{self.updates}" if self.updates else "")

  @classmethod
  def from_name(cls, name: str) -> Self | None:
    """Parses a folder's name; returns None for any other folder."""
    match = _NAME.fullmatch(name)
    info = match and cls(int(match[1]), int(match[2] or 0))
    return info if info and info.name == name else None


def by_score(
  checkpoints: Iterable[CheckpointInfo], metric: str
) -> list[CheckpointInfo]:
  """Those scored by a metric, the best last; of two equals the later one.

  Older versions did not record the metric.
  """
  scored = [
    x for x in checkpoints if x.score is not None and x.metric in ("", metric)
  ]
  return sorted(scored, key=lambda x: (x.score, x))


def score(metrics: Mapping[str, Any], config: CheckpointConfig) -> float | None:
  """The step's value of the best metric, higher is better; None without one."""
  value = float(metrics.get(config.best_metric, math.nan))
  if not math.isfinite(value):
    return None
  return value if config.best_mode == "max" else -value


def to_delete(
  checkpoints: Sequence[CheckpointInfo], config: CheckpointConfig
) -> list[CheckpointInfo]:
  """The checkpoints that may be deleted, in ascending order.

  The newest whole checkpoint and everything newer always stay, so that the run
  can resume. A partial step may go as soon as a newer checkpoint is whole.
  """
  whole = sorted(info for info in checkpoints if info.is_whole)
  if not whole:
    return []
  finished = [info for info in whole if not info.updates]
  kept = set(finished[-config.keep :])
  if config.best_metric:
    kept |= set(by_score(finished, config.scored_by)[-config.keep_best :])
  return sorted(x for x in checkpoints if x < whole[-1] and x not in kept)
