"""Settings of checkpoints and of an export."""

from dataclasses import dataclass, field

from data_pipelines.storage.paths import is_path
from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  one_of,
  require_all,
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
    best_metric: A metric of evaluations, such as "eval/accuracy". Steps that
      have it are saved too, and the best of them are kept; "" for none.
    best_mode: "max" if a higher metric is better, "min" if a lower one is.
    keep_best: How many of the best checkpoints to keep.
    max_failures: How many failed saves in a row end the run.
    timeout_seconds: How long the hosts wait for each other in one save.
    accept_changes: Resume in a workdir that was started with other settings or
      data, and record the changes in its run.json.
  """

  every_steps: int = field(metadata=at_least(1))
  every_minutes: float = field(metadata=interval("[0, inf)", 0.0))
  keep: int = field(metadata=at_least(1))
  best_metric: str
  best_mode: str = field(metadata=one_of(("max", "min")))
  keep_best: int = field(metadata=at_least(1))
  max_failures: int = field(metadata=at_least(1))
  timeout_seconds: int = field(metadata=at_least(1))
  accept_changes: bool

  def __post_init__(self):
    check_fields(self, "checkpoint")

  @property
  def scored_by(self) -> str:
    """The best metric and its direction, as the manifests name them."""
    return f"{self.best_metric} {self.best_mode}"


@dataclass(frozen=True)
class ExportConfig:
  """The output of --mode=export.

  Attributes:
    step: Step of the checkpoint of the workdir's run, or "best", the one with
      the best `checkpoint.best_metric`; None for the newest.
    dtype: Type of all tensors.
    tokenizer_dir: Folder whose tokenizer, chat template, processor and sampling
      defaults are copied; "" takes those of the "hf:DIR" that training started
      from, and writes the run's own where there is none.
    adapter: Export the adapters alone, in fp32 for peft, and do not merge them
      into the model.
  """

  step: str | None
  dtype: str = field(metadata=one_of(DTYPES))
  tokenizer_dir: str = field(metadata=is_path())
  adapter: bool

  def __post_init__(self):
    check_fields(self, "export")
    step = "best" if self.step is None else self.step
    rule = "be a step, best, or None for the newest"
    holds = step == "best" or (step.isascii() and step.isdecimal())
    require_all(self, "export", ("step", holds, rule, "best"))
