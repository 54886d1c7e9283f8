"""Settings of the rewards."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  one_of,
  require,
  require_all,
)
from grpo_tpu.rewards import custom

HEURISTICS = ("length", "reasoning_words", "coherence")
COMPONENTS = ("accuracy", "format", *HEURISTICS)
# The weight of each heuristic. Alone, the heuristics prefer the wrong answer
# half the time, so their default weights are small.
PRESETS: Mapping[str, float] = {
  "answer": 0.0,  # Logs the heuristics only.
  "gated": 0.02,
  "full": 1.0,  # Up to 0.5, 0.3 and 0.2.
}


@dataclass(frozen=True)
class RewardConfig:
  """Weights of the rewards, and limits of users' rewards.

  A weight of 0 computes and logs the component without adding it to the total.
  None takes the preset's weight, and gates the heuristics.

  Attributes:
    preset: The set of weights.
    accuracy: Weight of the right answer (0 or 1).
    format: Weight of exactly one `<answer>` tag (0 or 1).
    length: Weight of the length heuristic (0 to 0.5).
    reasoning_words: Weight of the connectives heuristic (0 to 0.3).
    coherence: Weight of the sentences heuristic (0 to 0.2).
    gate_heuristics: True sets the three heuristics to 0 for a completion
      without an answer. Without the gate, spam can score as much as a right
      answer.
    custom: Users' reward functions as "package.module:function". The function's
      name is the component's name.
    custom_weights: Weights of the functions in `custom`, in the same order.
    num_workers: Processes that call users' functions. With 0, this process
      calls them: without a timeout or a limit of memory, and what ends the
      process ends the run.
    worker_memory_gib: Memory in GiB that a worker may allocate, and each
      process that it starts. Linux only.
    rows_per_call: The most completions per call. A call that fails is repeated
      row by row; a row that fails alone is excluded.
    timeout_seconds: Time after which a worker's call fails, which includes
      sending it.
    max_error_fraction: The run ends when a component has failed on more than
      this share of the last rows. A component that fails on every row of a step
      always ends the run.
    error_window: Number of the most recent rows that `max_error_fraction` looks
      at; before as many have been scored, it looks at all.
  """

  preset: str = field(metadata=one_of(PRESETS))
  accuracy: float | None
  format: float | None
  length: float | None
  reasoning_words: float | None
  coherence: float | None
  gate_heuristics: bool | None
  custom: tuple[str, ...]
  custom_weights: tuple[float, ...]
  num_workers: int = field(metadata=interval("[0, inf)", 4))
  worker_memory_gib: float = field(metadata=interval("[0.25, inf)", 8.0))
  rows_per_call: int = field(metadata=at_least(1))
  timeout_seconds: float = field(metadata=interval("(0, inf)", 5.0))
  max_error_fraction: float = field(metadata=interval("[0, 1]", 0.1))
  error_window: int = field(metadata=at_least(1))

  def __post_init__(self):
    check_fields(self, "rewards")
    fits = len(self.custom_weights) == len(self.custom)
    rule = f"hold one weight for each of rewards.custom {self.custom}"
    weights = (1.0,) * len(self.custom)
    require_all(self, "rewards", ("custom_weights", fits, rule, weights))
    self._check_custom()
    weights = [(name, self.weights[name]) for name in COMPONENTS]
    weights += [("custom_weights", weight) for weight in self.custom_weights]
    remedy = "set 0 to log the component without adding it to the total"
    for name, weight in weights:
      fits, rule = math.isfinite(weight), "be a finite number"
      require(fits, f"rewards.{name}", weight, rule, remedy)

  def _check_custom(self) -> None:
    taken = {*COMPONENTS, "total", "heuristics"}
    for path in self.custom:
      custom.resolve(path)
      name = custom.name(path)
      rule = "name functions whose names differ from each other and from "
      rule += f"{', '.join(COMPONENTS)}, total and heuristics"
      remedy = f"give {name} another name"
      require(name not in taken, "rewards.custom", path, rule, remedy)
      taken.add(name)

  @property
  def weights(self) -> dict[str, float]:
    """The weight of each component, by name, in a fixed order."""
    preset = {"accuracy": 1.0, "format": 0.1}
    preset |= dict.fromkeys(HEURISTICS, PRESETS[self.preset])
    own = {name: getattr(self, name) for name in COMPONENTS}
    named = {
      name: float(preset[name] if weight is None else weight)
      for name, weight in own.items()
    }
    names = map(custom.name, self.custom)
    return named | dict(zip(names, self.custom_weights, strict=True))

  @property
  def is_gated(self) -> bool:
    """True if the heuristics are 0 for completions without an answer."""
    return self.gate_heuristics is not False
