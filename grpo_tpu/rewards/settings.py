"""Settings of the rewards."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipelines.storage.paths import expand_path
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
# Standard deviation of the reward models' normalised scores.
SPREAD = "model_spread"
# The weight of each component. Alone, the heuristics prefer the wrong answer
# half the time, so their default weights are small.
PRESETS: Mapping[str, tuple[float, ...]] = {
  "answer": (1.0, 0.1, 0.0, 0.0, 0.0),  # Logs the heuristics only.
  "gated": (1.0, 0.1, 0.02, 0.02, 0.02),
  "full": (1.0, 0.1, 1.0, 1.0, 1.0),  # Up to 0.5, 0.3 and 0.2.
  "none": (0.0,) * 5,  # Logs all rewards only; a teacher teaches the policy.
}

NORMALIZATIONS = ("none", "reference", "running")


def _expand_networks(name: str, networks: tuple) -> tuple:
  """The networks with the home in the place of a leading `~` of their path."""

  def expand(weights: str) -> str:
    scheme, _, rest = weights.partition(":")
    return f"{scheme}:{expand_path(name, rest)}" if rest else weights

  return tuple((expand(weights), *rest) for weights, *rest in networks)


_MODELS = {"expand": _expand_networks, "like": '(("run:WORKDIR", 1.0),)'}
_JUDGES = {"expand": _expand_networks, "like": '(("self", "agreement", 1.0),)'}


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
    custom: Users' reward functions, or classes of them, as
      "package.module:name". The name is that of the component.
    custom_weights: Weights of the functions in `custom`, in the same order.
    models: Reward models, each with its weight: "run:WORKDIR", a run of
      objective.preset=bradley_terry, with @STEP or @best if not the newest
      checkpoint, or "hf:DIR". Metrics name them model_1, model_2, and so on.
    model_normalization: How the scores of each reward model are centered and
      scaled. "reference": by mean and standard deviation of its scores of the
      first batch, those of the policy at the start; "running": by those of all
      batches so far; "none": not at all.
    spread_penalty: Times the standard deviation of the models' normalised
      scores of a completion, subtracted from its reward.
    judges: Models that are asked whether a completion is right, each with the
      template of the question and a weight: "hf:DIR", "run:WORKDIR", or "self"
      for the model that the run started from. Pays p(yes) / (p(yes) + p(no)).
      Metrics name them judge_1, judge_2, and so on.
    judge_vote: "mean" adds each judge's share of yes by its weight, "majority"
      the sum of the weights if judges with more than half of it say yes.
    judge_when: "always", or "abstained" for those completions alone on which
      the rules have no verdict: no answer is known, or the comparison took too
      long.
    network_dtype: Type of the matrices of reward models and judges; None is
      `model.param_dtype`.
    network_memory: Memory that holds reward models and judges: "device", or
      "pinned_host", from which they are copied to the devices to score.
    only_if_accurate: Names of components that are 0 for a wrong answer to
      a problem that rules can check.
    max_concurrent: Calls of `async` functions that wait at the same time, on
      each host, all functions together.
    max_retries: Further tries of an `async` call that raised or took too long.
    num_workers: Processes that call users' functions. With 0, this process
      calls them: without a timeout or a limit of memory, and what ends the
      process ends the run.
    worker_memory_gib: Memory in GiB that a worker may allocate, and each
      process that it starts. Linux only.
    rows_per_call: The most completions per call. A call that fails is repeated
      row by row; a row that fails alone is excluded.
    timeout_seconds: Time after which a worker's call fails, which includes
      sending it; of an `async` call, the time of each try.
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
  models: tuple[tuple[str, float], ...] = field(metadata=_MODELS)
  model_normalization: str = field(metadata=one_of(NORMALIZATIONS))
  spread_penalty: float = field(metadata=interval("[0, inf)", 0.0))
  judges: tuple[tuple[str, str, float], ...] = field(metadata=_JUDGES)
  judge_vote: str = field(metadata=one_of(("mean", "majority")))
  judge_when: str = field(metadata=one_of(("always", "abstained")))
  network_dtype: str | None = field(metadata=one_of(("float32", "bfloat16")))
  network_memory: str = field(metadata=one_of(("device", "pinned_host")))
  only_if_accurate: tuple[str, ...]
  max_concurrent: int = field(metadata=at_least(1))
  max_retries: int = field(metadata=at_least(0))
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
    for name in ("models", "judges"):
      weights += [(name, weight) for *_, weight in getattr(self, name)]
    remedy = "set 0 to log the component without adding it to the total"
    for name, weight in weights:
      fits, rule = math.isfinite(weight), "be a finite number"
      require(fits, f"rewards.{name}", weight, rule, remedy)
    components = (*self.weights, *self.network_weights)
    fits = set(self.only_if_accurate) <= set(components)
    rule = f"hold names of components: {', '.join(components)}"
    require_all(self, "rewards", ("only_if_accurate", fits, rule, ("format",)))

  def _check_custom(self) -> None:
    taken = {*COMPONENTS, "total", "heuristics", SPREAD, *self.network_weights}
    for path in self.custom:
      custom.resolve(path)
      name = custom.name(path)
      rule = "name functions whose names differ from each other and from "
      rule += ", ".join(sorted(taken))
      remedy = f"give {name} another name"
      require(name not in taken, "rewards.custom", path, rule, remedy)
      taken.add(name)

  @property
  def network_weights(self) -> dict[str, float]:
    """The weight of each reward model and judge, by name, in a fixed order."""
    models = {f"model_{i}": x for i, (_, x) in enumerate(self.models, 1)}
    judges = {f"judge_{i}": x for i, (*_, x) in enumerate(self.judges, 1)}
    return models | judges

  @property
  def rewards_unchecked(self) -> bool:
    """True if a problem without an answer can have a reward."""
    return any((*self.custom_weights, *self.network_weights.values()))

  @property
  def weights(self) -> dict[str, float]:
    """The weight of each component of the host, by name, in a fixed order."""
    weights = dict(zip(COMPONENTS, PRESETS[self.preset], strict=True))
    own = {name: getattr(self, name) for name in COMPONENTS}
    weights |= {k: float(x) for k, x in own.items() if x is not None}
    names = map(custom.name, self.custom)
    return weights | dict(zip(names, self.custom_weights, strict=True))

  @property
  def term_weights(self) -> dict[str, float]:
    """The weights that are not 0, of all components in a fixed order."""
    weights = self.weights | self.network_weights
    weights[SPREAD] = -self.spread_penalty
    return {name: weight for name, weight in weights.items() if weight}

  @property
  def watched(self) -> list[str]:
    """The components that depend on more than the answer."""
    return [
      k for k, x in self.term_weights.items() if x > 0 and k != "accuracy"
    ]

  @property
  def is_gated(self) -> bool:
    """True if the heuristics are 0 for completions without an answer."""
    return self.gate_heuristics is not False
