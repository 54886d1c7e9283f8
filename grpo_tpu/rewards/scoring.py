"""Rewards of completions: the components of every row, and their weighted sum.

A reward that raises, hangs or returns no finite number is a failure: the row is
excluded and counted instead of scoring 0, and too many failures end the run.
Built-in rewards take time linear in the completion and run in this process;
users' rewards (`custom`) run in workers. This module knows no groups,
advantages or tokens.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from data_pipelines import records, validation
from data_pipelines.verifier import verify
from data_pipelines.workers import functions
from grpo_tpu.rewards import accuracy, calls, custom, heuristics

HEURISTICS = ("length", "reasoning_words", "coherence")
# Weights, and whether heuristics are gated. Alone, the heuristics prefer the
# wrong answer half the time, so their default weights are small.
PRESETS: Mapping[str, Mapping[str, float | bool]] = {
  name: {
    "accuracy": 1.0,
    "format": 0.1,
    **dict.fromkeys(HEURISTICS, weight),
    "gate_heuristics": True,
  }
  for name, weight in (
    ("answer", 0.0),  # Logs the heuristics only.
    ("gated", 0.02),
    ("full", 1.0),  # Up to 0.5, 0.3 and 0.2.
  )
}


class RewardError(RuntimeError):
  """A reward failed on more completions than `max_error_fraction` allows."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Weights of the rewards, and limits of users' rewards.

  A weight of 0 computes and logs the component without adding it to the total;
  None takes the preset's weight.

  Attributes:
    preset: The set of weights, a key of `PRESETS`.
    accuracy: Weight of the right answer (0 or 1).
    format: Weight of exactly one <answer> tag (0 or 1).
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
      calls them, and a function that hangs stops the run.
    rows_per_call: The most completions per call. A call that fails is repeated
      row by row; a row that fails alone is excluded.
    timeout_seconds: Time after which a worker's call fails.
    max_error_fraction: The run ends when a component has failed on more than
      this share of `error_window` rows; 1 never ends the run.
    error_window: Number of the most recent rows whose failures are counted.
      Rows that do not exist yet count as successes.
  """

  preset: str
  accuracy: float | None
  format: float | None
  length: float | None
  reasoning_words: float | None
  coherence: float | None
  gate_heuristics: bool | None
  custom: tuple[str, ...]
  custom_weights: tuple[float, ...]
  num_workers: int
  rows_per_call: int
  timeout_seconds: float
  max_error_fraction: float
  error_window: int

  def __post_init__(self):
    validation.require_one_of("rewards.preset", self.preset, tuple(PRESETS))
    validation.require_all(
      self,
      "rewards",
      ("num_workers", self.num_workers >= 0, "not be negative", 4),
      ("rows_per_call", self.rows_per_call >= 1, "be at least 1", 16),
      (
        "timeout_seconds",
        0 < self.timeout_seconds < math.inf,
        "be above 0 and finite",
        5.0,
      ),
      (
        "max_error_fraction",
        0 <= self.max_error_fraction <= 1,
        "be from 0 to 1",
        0.1,
      ),
      ("error_window", self.error_window >= 1, "be at least 1", 1000),
      (
        "custom_weights",
        len(self.custom_weights) == len(self.custom),
        f"hold one weight for each of rewards.custom {self.custom}",
        (1.0,) * len(self.custom),
      ),
    )
    self._check_custom()
    weights = [(name, self.weights[name]) for name in COMPONENTS]
    weights += [("custom_weights", weight) for weight in self.custom_weights]
    for name, weight in weights:
      if not math.isfinite(weight):
        raise ValueError(
          f"rewards.{name} ({weight}) must be a finite number; 0 logs the "
          "component without paying for it."
        )

  def _check_custom(self) -> None:
    taken = {*COMPONENTS, "total", "heuristics"}
    for path in self.custom:
      custom.resolve(path)
      name = custom.name(path)
      if name in taken:
        raise ValueError(
          f"rewards.custom ({path!r}) must name functions whose names differ "
          f"from each other's and from {', '.join(COMPONENTS)}, total and "
          f"heuristics; give {name} another name."
        )
      taken.add(name)

  @property
  def weights(self) -> dict[str, float]:
    """The weight of each component, by name, in a fixed order."""
    preset = PRESETS[self.preset]
    own = {name: getattr(self, name) for name in COMPONENTS}
    named = {
      name: float(preset[name] if weight is None else weight)
      for name, weight in own.items()
    }
    paths = map(custom.name, self.custom)
    return named | dict(zip(paths, self.custom_weights, strict=True))

  @property
  def is_gated(self) -> bool:
    """True if the heuristics are 0 for completions without an answer."""
    if self.gate_heuristics is None:
      return bool(PRESETS[self.preset]["gate_heuristics"])
    return self.gate_heuristics


@dataclasses.dataclass(frozen=True)
class Scores:
  """The rewards of N completions.

  Attributes:
    total: float32 [N], the weighted sum; 0 for invalid rows.
    components: Name to float32 [N], before weights, in the order of
      `RewardConfig.weights`; 0 for a gated heuristic and for a failure.
    failed: Name to bool [N], True where the component failed.
    errors: Name to the number of rows on which the component failed, on all
      processes together.
    answers: The answer extracted from each completion, or None.
  """

  total: np.ndarray
  components: dict[str, np.ndarray]
  failed: dict[str, np.ndarray]
  errors: dict[str, int]
  answers: list[str | None]

  @property
  def valid(self) -> np.ndarray:
    """bool [N], False for a row to exclude because a component failed."""
    return ~np.any(list(self.failed.values()), axis=0)


@dataclasses.dataclass(frozen=True)
class _Completion:
  text: str
  reasoning: heuristics.Reasoning
  verdict: verify.Verdict


_REWARDS: Mapping[str, Callable[[_Completion], float]] = {
  "accuracy": lambda row: accuracy.accuracy(row.verdict),
  "format": lambda row: accuracy.well_formed(row.text),
  "length": lambda row: heuristics.length(row.reasoning),
  "reasoning_words": lambda row: heuristics.reasoning_words(row.reasoning),
  "coherence": lambda row: heuristics.coherence(row.reasoning),
}
COMPONENTS = tuple(_REWARDS)


@dataclasses.dataclass(frozen=True)
class RawScores:
  """The rewards of some completions before failures are counted.

  Attributes:
    problems: The problem of each completion.
    answers: The answer extracted from each completion, or None.
    values: float32 [components, N], before weights; 0 for a failure.
    faults: The reason of each failure, by (component, row).
  """

  problems: Sequence[records.Problem]
  answers: list[str | None]
  values: np.ndarray
  faults: dict[tuple[int, int], str]

  @property
  def failures(self) -> np.ndarray:
    """bool [components, N], True where a component failed."""
    failures = np.zeros(self.values.shape, bool)
    for index in self.faults:
      failures[index] = True
    return failures


def score(
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  config: RewardConfig,
  *,
  gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Scores:
  """Computes every reward of every completion.

  Args:
    completions: Decoded text, without the end of turn.
    problems: The problem of each completion.
    config: The weights and limits.
    gather: Maps the rows of this process to the rows of all processes, in the
      same order everywhere, so that all processes count the same failures.

  Returns:
    The scores, row by row; no completion raises.

  Raises:
    RewardError: A reward failed too often in this and earlier calls, on all
      processes together.
    RuntimeError: A worker cannot be started.
  """
  return reduce(
    [raw_scores(completions, problems, config)], config, gather=gather
  )


def raw_scores(
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  config: RewardConfig,
) -> RawScores:
  """The first half of `score`, which depends on no other call.

  A thread may compute it, one call at a time.
  """
  if len(completions) != len(problems):
    raise ValueError(
      f"{len(completions)} completions need as many problems, not "
      f"{len(problems)}."
    )
  # Workers start first and run while this process computes its own rewards.
  wait_for = _session(config).calls.start(completions, problems)
  values = np.zeros((len(config.weights), len(completions)), np.float32)
  answers: list[str | None] = []
  faults: dict[tuple[int, int], str] = {}
  for row, (text, problem) in enumerate(
    zip(completions, problems, strict=True)
  ):
    answer, own, failures = _score_one(text, problem, config)
    answers.append(answer)
    values[: len(COMPONENTS), row] = own
    faults |= {(COMPONENTS.index(x), row): why for x, why in failures.items()}
  for component, path in enumerate(config.custom, start=len(COMPONENTS)):
    for row, result in enumerate(wait_for(path)):
      values[component, row], fault = _check_value(result)
      if fault is not None:
        faults[component, row] = fault
  return RawScores(problems, answers, values, faults)


def reduce(
  parts: Sequence[RawScores],
  config: RewardConfig,
  *,
  gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Scores:
  """Joins raw scores and counts their failures, in the order of `parts`.

  Raises:
    RewardError: A reward failed too often, as in `score`.
  """
  session, names = _session(config), list(config.weights)
  for part in parts:
    for (component, row), fault in part.faults.items():
      session.log(names[component], part.problems[row], fault)
  values = np.concatenate([part.values for part in parts], axis=1)
  failures = np.concatenate([part.failures for part in parts], axis=1)
  everywhere = dict(zip(names, gather(failures.T).T, strict=True))
  for name, rows in everywhere.items():
    session.count(name, rows)
  total = np.zeros(values.shape[1], np.float32)
  # Row by row, so that a total does not depend on the other rows.
  for weight, component in zip(config.weights.values(), values, strict=True):
    total += np.float32(weight) * component
  return Scores(
    total=np.where(failures.any(axis=0), np.float32(0), total),
    components=dict(zip(names, values, strict=True)),
    failed=dict(zip(names, failures, strict=True)),
    errors={name: int(rows.sum()) for name, rows in everywhere.items()},
    answers=[answer for part in parts for answer in part.answers],
  )


def _session(config: RewardConfig) -> "_Session":
  if config not in _SESSIONS:
    _SESSIONS[config] = _Session(config)
  return _SESSIONS[config]


def close() -> None:
  """Ends the workers of every config and forgets all failures."""
  while _SESSIONS:
    _SESSIONS.popitem()[1].calls.close()


class _Session:
  """State that lives from batch to batch: the workers and recent failures."""

  def __init__(self, config: RewardConfig):
    self.calls = calls.Calls(
      config.custom,
      num_workers=config.num_workers,
      rows_per_call=config.rows_per_call,
      timeout_seconds=config.timeout_seconds,
    )
    self._config = config
    self._recent: dict[str, collections.deque[bool]] = {
      name: collections.deque(maxlen=config.error_window)
      for name in config.weights
    }
    self._num_failed = dict.fromkeys(config.weights, 0)
    self._num_logged = dict.fromkeys(config.weights, 0)
    self._last = dict.fromkeys(config.weights, "see the other hosts' logs")

  def log(self, name: str, problem: records.Problem, fault: str) -> None:
    """Logs the first failures of a reward; `Scores.errors` counts all."""
    self._last[name] = f"the last one was problem {problem.pid}: {fault}"
    self._num_logged[name] += 1
    if self._num_logged[name] <= _MOST_LOGGED:
      message = "Reward %s failed on a completion of problem %s: %s"
      logging.warning(message, name, problem.pid, fault)

  def count(self, name: str, failed: np.ndarray) -> None:
    """Counts the failures of one reward, in the rows' order.

    Raises:
      RewardError: There are more failures than allowed.
    """
    recent = self._recent[name]
    limit = self._config.max_error_fraction * self._config.error_window
    for has_failed in failed.tolist():
      if len(recent) == recent.maxlen:
        self._num_failed[name] -= recent[0]
      recent.append(has_failed)
      self._num_failed[name] += has_failed
      if has_failed and self._num_failed[name] > limit:
        raise RewardError(
          f"reward {name} failed on {self._num_failed[name]} of the last "
          f"{len(recent)} completions, but rewards.max_error_fraction "
          f"({self._config.max_error_fraction:g}) allows {limit:g} of "
          f"{self._config.error_window}; {self._last[name]}. Fix the reward; "
          "if it is only slow, raise rewards.timeout_seconds."
        )


_MOST_LOGGED = 10
_SESSIONS: dict[RewardConfig, _Session] = {}


_LARGEST = float(np.finfo(np.float32).max)


def _check_value(value: float | functions.Failure) -> tuple[float, str | None]:
  """Returns a finite value and None; else 0 and the reason."""
  if isinstance(value, functions.Failure):
    return 0.0, value.reason
  if abs(value) <= _LARGEST:  # Never true for NaN.
    return value, None
  return 0.0, f"a reward must be a finite float32, not {value}"


def _score_one(
  text: str, problem: records.Problem, config: RewardConfig
) -> tuple[str | None, list[float], dict[str, str]]:
  """Scores one completion: its answer, its components, the failures."""
  values = [0.0] * len(COMPONENTS)
  try:
    verdict = verify.verify(text, problem)
  except Exception as error:
    return None, values, {"accuracy": functions.one_line(error)}
  faults: dict[str, str] = {}
  reasoning = heuristics.read(accuracy.reasoning(text))
  row = _Completion(text, reasoning, verdict)
  gated = config.is_gated and verdict.answer is None
  for i, name in enumerate(COMPONENTS):
    if gated and name in HEURISTICS:
      continue
    try:
      values[i], fault = _check_value(float(_REWARDS[name](row)))
    except Exception as error:
      fault = functions.one_line(error)
    if fault is not None:
      faults[name] = fault
  return verdict.answer, values, faults
