"""Settings of checkpoints and of an export."""

import math
from dataclasses import dataclass, field

from data_pipelines.validation import (
  one_of,
  require_all,
  require_at_least,
  require_choices,
)
from grpo_tpu.models.settings import DTYPES


@dataclass(frozen=True)
class CheckpointConfig:
  """When to save, which checkpoints to keep, and how to treat failures.

  Attributes:
    every_steps: Save each step that is a multiple of this number.
    every_minutes: Also save the first step that ends this many minutes after
      the last save began; 0 for never.
    keep: How many of the newest whole checkpoints to keep.
    best_metric: A metric such as "eval/accuracy". Steps that have it are saved
      too, and the best of them are kept; "" for none.
    best_mode: "max" if a higher metric is better, "min" if a lower one is.
    keep_best: How many of the best checkpoints to keep.
    max_failures: How many failed saves in a row end the run.
    timeout_seconds: How long the hosts wait for each other in one save.
    accept_changes: Resume in a workdir that was started with other settings or
      data, and record the changes in its run.json.
  """

  every_steps: int
  every_minutes: float
  keep: int
  best_metric: str
  best_mode: str = field(metadata=one_of(("max", "min")))
  keep_best: int
  max_failures: int
  timeout_seconds: int
  accept_changes: bool

  def __post_init__(self):
    ones = dict.fromkeys(
      ("every_steps", "keep", "keep_best", "max_failures", "timeout_seconds"), 1
    )
    require_at_least(self, "checkpoint", **ones)
    require_choices(self, "checkpoint")
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


@dataclass(frozen=True)
class ExportConfig:
  """The output of --mode=export.

  Attributes:
    step: Step of the workdir's checkpoint; None for the newest, or for
      `model.weights` if there is none.
    dtype: Type of all tensors.
    tokenizer_dir: Folder whose tokenizer and processor files are copied; ""
      takes those of an "hf:DIR" in `model.weights`.
    adapter: Export the adapters alone, in fp32 for peft, and do not merge them
      into the model.
  """

  step: int | None
  dtype: str = field(metadata=one_of(DTYPES))
  tokenizer_dir: str
  adapter: bool

  def __post_init__(self):
    require_choices(self, "export")
    require_all(
      self,
      "export",
      (
        "step",
        self.step is None or self.step >= 0,
        "be a step that was saved, or None for the newest",
        None,
      ),
    )
