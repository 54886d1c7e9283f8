"""Sections of the settings that belong to the program and not to one part."""

from dataclasses import dataclass, field

from data_pipelines.scoring import ablations
from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  one_of,
  require_all,
)


@dataclass(frozen=True)
class TrainConfig:
  """The length of the run and the parts of a step.

  Attributes:
    num_steps: Steps of the run; each takes one batch of prompts.
    num_iterations: Updates on each batch.
    microbatch_bundles: Prompts, over all hosts, whose activations exist at a
      time; divides `data.prompts_per_step`.
    max_skipped_updates: Consecutive updates with gradients that are not finite
      before the run stops.
  """

  num_steps: int = field(metadata=at_least(1))
  num_iterations: int = field(metadata=at_least(1))
  microbatch_bundles: int = field(metadata=at_least(1))
  max_skipped_updates: int = field(metadata=at_least(1))

  def __post_init__(self):
    check_fields(self, "train")


@dataclass(frozen=True)
class EvalConfig:
  """Evaluation on the eval split: greedy in training, more in its own mode.

  Attributes:
    every_steps: Steps between evaluations, which also happen before the first
      step and after the last; 0 for never.
    num_problems: Problems to evaluate, the first ones of the split.
    batch_size: Problems decoded together.
    num_samples: Completions of each problem that --mode=evaluate samples beside
      the greedy one; 0 for none.
    temperature: Divisor of their logits.
    top_k: Number of likeliest tokens that they are sampled from; 0 for all.
    top_p: Share of the probability that they are sampled from, likeliest tokens
      first; 1.0 for all.
    ks: The k of pass@k and maj@k, at most `num_samples`; not used without
      samples.
    ablations: Further evaluations by --mode=evaluate, with images removed or
      exchanged between problems.
    num_examples: Wrong answers that the report shows.
  """

  every_steps: int = field(metadata=interval("[0, inf)", 0))
  num_problems: int = field(metadata=at_least(1))
  batch_size: int = field(metadata=at_least(1))
  num_samples: int = field(metadata=interval("[0, inf)", 0))
  temperature: float = field(metadata=interval("(0, inf)", 1.0))
  top_k: int = field(metadata=interval("[0, inf)", 0))
  top_p: float = field(metadata=interval("(0, 1]", 1.0))
  ks: tuple[int, ...]
  ablations: tuple[str, ...] = field(metadata=one_of(ablations.KINDS))
  num_examples: int = field(metadata=interval("[0, inf)", 0))

  def __post_init__(self):
    check_fields(self, "eval")
    most = self.num_samples or float("inf")
    require_all(
      self,
      "eval",
      (
        "ks",
        list(self.ks) == sorted({k for k in self.ks if 1 <= k <= most}),
        f"ascend from at least 1 to at most eval.num_samples "
        f"({self.num_samples})",
        f"(1, {self.num_samples})" if self.num_samples > 1 else "(1,)",
      ),
    )


@dataclass(frozen=True)
class SamplesConfig:
  """Completions to look at, in TensorBoard and in the workdir's samples folder.

  Attributes:
    every_steps: Steps between samples; 0 for never.
    count: Completions each time.
  """

  every_steps: int = field(metadata=interval("[0, inf)", 0))
  count: int = field(metadata=interval("[0, inf)", 0))

  def __post_init__(self):
    check_fields(self, "samples")


@dataclass(frozen=True)
class ProfileConfig:
  """The steps to trace for TensorBoard's profile plugin.

  Attributes:
    steps: The first and the last step, as in (10, 12); () for none. A trace
      holds every Python call and every device operation, so few steps make a
      large one. The first steps compile.
  """

  steps: tuple[int, ...]

  def __post_init__(self):
    steps = self.steps
    require_all(
      self,
      "profile",
      (
        "steps",
        not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
        "be a first step and a last one, counted from 1, or empty for none",
        (10, 12),
      ),
    )
