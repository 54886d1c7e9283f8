"""When a checkpoint is due, and which ones may go."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from data_pipelines.validation import (
  require_all,
  require_at_least,
  require_one_of,
)

_NAME = re.compile(r"(\d{8,})(?:\.(\d+))?")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save, what to keep, and what to do where that fails.

  Attributes:
    every_steps: A step that is a multiple of this is saved.
    every_minutes: So is the first one that ends this long after the last save
      began; 0 for none.
    keep: How many of the newest whole checkpoints stay.
    best_metric: A step that has this metric, such as "eval/accuracy", is saved
      too, and those with the best of it stay besides; "" for none.
    best_mode: Whether "max" or "min" of it is best.
    keep_best: How many of the best stay.
    max_failures: So many saves in a row that fail end the run.
    timeout_seconds: How long the hosts wait for each other to write one save.
    accept_changes: Go on in a workdir that was started with other settings or
      data, and note in its run.json what changed.
  """

  every_steps: int
  every_minutes: float
  keep: int
  best_metric: str
  best_mode: str
  keep_best: int
  max_failures: int
  timeout_seconds: int
  accept_changes: bool

  def __post_init__(self):
    ones = dict.fromkeys(
      ("every_steps", "keep", "keep_best", "max_failures", "timeout_seconds"), 1
    )
    require_at_least(self, "checkpoint", **ones)
    require_one_of("checkpoint.best_mode", self.best_mode, ("max", "min"))
    require_all(
      self,
      "checkpoint",
      (
        "every_minutes",
        0 <= self.every_minutes < math.inf,
        "be 0, for never, or a time",
        0.0,
      ),
      (
        "best_metric",
        not self.best_metric or self.best_metric.startswith("eval/"),
        "be a metric of evaluations, or empty for none",
        "eval/accuracy",
      ),
    )


@dataclasses.dataclass(frozen=True, order=True)
class Entry:
  """A checkpoint by its place in the run; a later place is the greater.

  Attributes:
    step: Steps done.
    updates: Updates done of the step after them, which was left unfinished; 0
      between two steps.
    is_whole: Whether it has a manifest, as it must to be trusted.
    score: Of the best metric, higher is better; None where it has none.
  """

  step: int
  updates: int = 0
  is_whole: bool = dataclasses.field(default=True, compare=False)
  score: float | None = dataclasses.field(default=None, compare=False)

  @property
  def name(self) -> str:
    """Of its folder: `00000012`, or `00000012.1` one update later."""
    return f"{self.step:08}" + (f".{self.updates}" if self.updates else "")

  @classmethod
  def of_name(cls, name: str) -> Self | None:
    """The entry of a folder's name; None for any other folder."""
    match = _NAME.fullmatch(name)
    entry = match and cls(int(match[1]), int(match[2] or 0))
    return entry if entry and entry.name == name else None


def score(metrics: Mapping[str, Any], config: CheckpointConfig) -> float | None:
  """How good a step is, higher is better; None where nothing says so."""
  if config.best_metric not in metrics:
    return None
  value = float(metrics[config.best_metric])
  if not math.isfinite(value):
    return None
  return value if config.best_mode == "max" else -value


def doomed(entries: Sequence[Entry], config: CheckpointConfig) -> list[Entry]:
  """Those of `entries` that may be deleted.

  Never the newest whole one or anything newer, so that there is always one to
  go on from. An unfinished step is of no use once there is a newer checkpoint.
  """
  whole = sorted(entry for entry in entries if entry.is_whole)
  if not whole:
    return []
  finished = [entry for entry in whole if not entry.updates]
  scored = [entry for entry in finished if entry.score is not None]
  # The later one of two that are as good.
  scored.sort(key=lambda entry: (entry.score, entry))
  kept = set(finished[-config.keep :])
  if config.best_metric:
    kept |= set(scored[-config.keep_best :])
  return sorted(e for e in entries if e < whole[-1] and e not in kept)
