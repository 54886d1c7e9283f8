"""Sections of the settings that belong to the program and not to one part."""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from data_pipelines import records
from data_pipelines.scoring import ablations
from data_pipelines.storage.paths import expand_path
from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  one_of,
  require_all,
)

# The first are slices in metrics, the last is a folder of results.
_TAKEN = {*records.QUESTION_TYPES, *records.ANSWER_TYPES, "samples"}


def _expand_sets(
  name: str, sets: Sequence[tuple[str, str, str]]
) -> tuple[tuple[str, str, str], ...]:
  return tuple((x, expand_path(name, folder), y) for x, folder, y in sets)


_SETS = {
  "expand": _expand_sets,
  "like": '(("mathvista", "/data/mathvista", "testmini"),)',
}


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d\d?)?"
_RULE = re.compile(rf"\s*(eval/\S+?)\s*([<>]=)\s*({_NUMBER})\s*", re.ASCII)


class StopRule(NamedTuple):
  """The target of `train.stop_when`."""

  metric: str
  comparison: str  # ">=" or "<=".
  limit: float

  @classmethod
  def parse(cls, text: str) -> Self | None:
    """Reads "eval/accuracy >= 0.95"; None is no rule."""
    match = _RULE.fullmatch(text)
    return cls(match[1], match[2], float(match[3])) if match else None

  def is_met(self, metrics: Mapping[str, float]) -> bool:
    """True if the metric is there and has reached the limit."""
    compare = operator.ge if self.comparison == ">=" else operator.le
    return compare(metrics.get(self.metric, math.nan), self.limit)


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
    stop_when: A target such as "eval/accuracy >= 0.95": a metric of
      evaluations, >= or <=, a number. The run ends at the first evaluation that
      meets it; "" for none.
  """

  num_steps: int = field(metadata=at_least(1))
  num_iterations: int = field(metadata=at_least(1))
  microbatch_bundles: int = field(metadata=at_least(1))
  max_skipped_updates: int = field(metadata=at_least(1))
  stop_when: str

  @property
  def stop_rule(self) -> StopRule | None:
    """The target of `stop_when`, if any."""
    return StopRule.parse(self.stop_when)

  def __post_init__(self):
    check_fields(self, "train")
    is_rule = not self.stop_when or self.stop_rule is not None
    rule = "be a metric of evaluations, >= or <=, and a number, or empty"
    example = "'eval/accuracy >= 0.95'"
    require_all(self, "train", ("stop_when", is_rule, rule, example))


@dataclass(frozen=True)
class EvalConfig:
  """Evaluation on the eval split and further sets; more in its own mode.

  Attributes:
    every_steps: Steps between evaluations, which also happen before the first
      step and after the last; 0 for never.
    sets: Sets beside `data.eval_split`, each with a name for metrics and files,
      a data dir and a split, as in (("math", "/data/mathvista", "testmini"),).
    num_problems: Problems to evaluate of each set, the first ones.
    batch_size: Problems decoded together.
    num_samples: Completions of each problem that are sampled beside the greedy
      one, for mean@n and pass@k; 0 for none.
    temperature: Divisor of their logits.
    top_k: Number of likeliest tokens that they are sampled from; 0 for all.
    top_p: Share of the probability that they are sampled from, likeliest tokens
      first; 1.0 for all.
    ks: The k of pass@k and maj@k, at most `num_samples`; () for 1, 2, 4 and so
      on.
    ablations: Further evaluations by --mode=evaluate, with images removed or
      exchanged between problems.
    num_examples: Wrong answers that the report shows.
  """

  every_steps: int = field(metadata=interval("[0, inf)", 0))
  sets: tuple[tuple[str, str, str], ...] = field(metadata=_SETS)
  num_problems: int = field(metadata=at_least(1))
  batch_size: int = field(metadata=at_least(1))
  num_samples: int = field(metadata=interval("[0, inf)", 0))
  temperature: float = field(metadata=interval("(0, inf)", 1.0))
  top_k: int = field(metadata=interval("[0, inf)", 0))
  top_p: float = field(metadata=interval("(0, 1]", 1.0))
  ks: tuple[int, ...]
  ablations: tuple[str, ...] = field(metadata=one_of(ablations.KINDS))
  num_examples: int = field(metadata=interval("[0, inf)", 0))

  @property
  def pass_ks(self) -> tuple[int, ...]:
    """The k of pass@k and maj@k."""
    return self.ks or tuple(2**i for i in range(self.num_samples.bit_length()))

  @property
  def ways(self) -> list[dict[str, Any]]:
    """How completions are made: greedily, then the `num_samples` if any."""
    names = ("temperature", "top_k", "top_p")
    drawn = {name: getattr(self, name) for name in names}
    drawn["num_completions"] = self.num_samples
    greedy = {"num_completions": 1, "temperature": 0.0}
    return [greedy, drawn] if self.num_samples else [greedy]

  def __post_init__(self):
    check_fields(self, "eval")
    names = [name for name, *_ in self.sets]
    are_named = len({*names} - _TAKEN) == len(names) and all(
      re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names
    )
    are_whole = all(folder.strip() and split for _, folder, split in self.sets)
    sets_rule = (
      "have a name, a data dir and a split each; names are of letters, digits, "
      f"_ and -, differ, and are none of {', '.join(sorted(_TAKEN))}"
    )
    most = self.num_samples or float("inf")
    ascend = list(self.ks) == sorted({k for k in self.ks if 1 <= k <= most})
    ks_rule = "ascend from at least 1 to at most eval.num_samples"
    ks = f"(1, {self.num_samples})" if self.num_samples > 1 else "(1,)"
    require_all(
      *(self, "eval"),
      ("sets", are_named and are_whole, sets_rule, _SETS["like"]),
      ("ks", ascend, f"{ks_rule} ({self.num_samples})", ks),
    )


@dataclass(frozen=True)
class SamplesConfig:
  """Completions to read, in the workdir's samples folder and in TensorBoard.

  Attributes:
    every_steps: Steps between files with all completions of a step; 0 for
      never.
    count: Completions that TensorBoard shows each time.
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
    ascend = not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1])
    rule = "be a first step and a last one, counted from 1, or empty for none"
    require_all(self, "profile", ("steps", ascend, rule, (10, 12)))
