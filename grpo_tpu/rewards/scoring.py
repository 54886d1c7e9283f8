"""From completions to rewards: every component of every row, and their sum.

A reward that raises, hangs, or is no finite number says nothing of its row: the
row is excluded and counted, never paid 0; one that does so too often ends the
run. Built-in rewards are linear in the completion and run in this process,
users' (`custom`) in workers. Knows nothing of groups, advantages or tokens.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from data_pipelines import records, validation
from data_pipelines.verifier import verify
from grpo_tpu.rewards import accuracy, calls, custom, heuristics

HEURISTICS = ("length", "reasoning_words", "coherence")
# Weights, and whether heuristics are gated. Alone the heuristics prefer the
# wrong answer half the time, so they weigh little unless asked to.
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
  """What each component weighs in the total; 0 computes and logs it only.

  None takes the preset's value.

  Attributes:
    preset: A key of `PRESETS`.
    accuracy: Weight of the right answer (0 or 1).
    format: Weight of exactly one <answer> tag (0 or 1).
    length: Weight of the length heuristic (0 to 0.5).
    reasoning_words: Weight of the connectives heuristic (0 to 0.3).
    coherence: Weight of the sentences heuristic (0 to 0.2).
    gate_heuristics: Whether the three heuristics are 0 for a completion that
      gives no answer. Without it spam can earn as much as a right answer.
    custom: Users' rewards as "package.module:function", see `custom`; the
      function's name is the component's.
    custom_weights: Their weights, in the same order.
    num_workers: Processes that call them. With 0 they are called in this one,
      and one that hangs holds up the run.
    rows_per_call: Completions that a call gets, at most. A call that fails is
      repeated row by row; a row that fails alone is excluded.
    timeout_seconds: After which a worker's call, of one row or several, has
      failed.
    max_error_fraction: Ends the run once a component has failed on more than
      this share of `error_window`; 1 for never.
    error_window: Of the last so many rows failures are counted. While there
      have been fewer, the rest pass for rows that did not fail.
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
    """What each component weighs, by name, in a fixed order."""
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
    """Whether a completion without an answer earns nothing by heuristics."""
    if self.gate_heuristics is None:
      return bool(PRESETS[self.preset]["gate_heuristics"])
    return self.gate_heuristics


@dataclasses.dataclass(frozen=True)
class Scores:
  """What N completions are paid.

  Attributes:
    total: float32 [N], the weighted sum; 0 where not valid.
    components: Name to float32 [N], before weights, in the order of
      `RewardConfig.weights`; 0 for a heuristic that is gated away, and where
      the component failed.
    failed: Name to bool [N], where the component failed.
    errors: Name to the number of rows on which the component failed, those of
      other processes included.
    answers: The answer read from each completion, or None.
  """

  total: np.ndarray
  components: dict[str, np.ndarray]
  failed: dict[str, np.ndarray]
  errors: dict[str, int]
  answers: list[str | None]

  @property
  def valid(self) -> np.ndarray:
    """bool [N]. False where a component failed: the row must be left out."""
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
class Paid:
  """What some completions earned, before any failure has been counted.

  Attributes:
    problems: That they answer.
    answers: As in `Scores`.
    values: float32 [components, N], before weights; 0 where one failed.
    faults: Why a component failed, by its place and the row's.
  """

  problems: Sequence[records.Problem]
  answers: list[str | None]
  values: np.ndarray
  faults: dict[tuple[int, int], str]

  @property
  def failed(self) -> np.ndarray:
    """bool [components, N]."""
    failed = np.zeros(self.values.shape, bool)
    for place in self.faults:
      failed[place] = True
    return failed


def score(
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  config: RewardConfig,
  *,
  gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Scores:
  """Every reward of every completion of the problem beside it.

  Args:
    completions: Decoded text, without the end of turn.
    problems: What each of them answers.
    config: The weights.
    gather: Gives the rows of all processes for those of this one, the same in
      each: so they count the same failures, and end together.

  Returns:
    The scores, row by row; no completion raises.

  Raises:
    RewardError: A reward has failed too often, here and in earlier calls, on
      all processes together.
    RuntimeError: A worker cannot be started.
  """
  paid = pay(completions, problems, config)
  return settle([paid], config, gather=gather)


def pay(
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  config: RewardConfig,
) -> Paid:
  """The first half of `score`, which depends on no other call.

  May run in a thread, one call at a time.
  """
  if len(completions) != len(problems):
    raise ValueError(
      f"{len(completions)} completions must have as many problems, not "
      f"{len(problems)}."
    )
  # Workers first, so that they are busy while this process is.
  earned = _session(config).calls.start(completions, problems)
  values = np.zeros((len(config.weights), len(completions)), np.float32)
  answers: list[str | None] = []
  faults: dict[tuple[int, int], str] = {}
  for row, (text, problem) in enumerate(
    zip(completions, problems, strict=True)
  ):
    answer, own, failed = _score_one(text, problem, config)
    answers.append(answer)
    values[: len(COMPONENTS), row] = own
    faults |= {(COMPONENTS.index(x), row): why for x, why in failed.items()}
  for component, path in enumerate(config.custom, start=len(COMPONENTS)):
    for row, each in enumerate(earned(path)):
      values[component, row], fault = _checked(each)
      if fault is not None:
        faults[component, row] = fault
  return Paid(problems, answers, values, faults)


def settle(
  paid: Sequence[Paid],
  config: RewardConfig,
  *,
  gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Scores:
  """The scores of all these rows, whose failures count in this order.

  Raises:
    RewardError: As `score` does.
  """
  session, names = _session(config), list(config.weights)
  for part in paid:
    for (component, row), fault in part.faults.items():
      session.log(names[component], part.problems[row], fault)
  values = np.concatenate([part.values for part in paid], axis=1)
  failed = np.concatenate([part.failed for part in paid], axis=1)
  everywhere = dict(zip(names, gather(failed.T).T, strict=True))
  for name, rows in everywhere.items():
    session.judge(name, rows)
  total = np.zeros(values.shape[1], np.float32)
  # Row by row, so that a total does not depend on the rows beside it.
  for weight, component in zip(config.weights.values(), values, strict=True):
    total += np.float32(weight) * component
  return Scores(
    total=np.where(failed.any(axis=0), np.float32(0), total),
    components=dict(zip(names, values, strict=True)),
    failed=dict(zip(names, failed, strict=True)),
    errors={name: int(rows.sum()) for name, rows in everywhere.items()},
    answers=[answer for part in paid for answer in part.answers],
  )


def _session(config: RewardConfig) -> "_Session":
  if config not in _SESSIONS:
    _SESSIONS[config] = _Session(config)
  return _SESSIONS[config]


def close() -> None:
  """Ends the workers of every config, and forgets what failed so far."""
  while _SESSIONS:
    _SESSIONS.popitem()[1].calls.close()


class _Session:
  """What lasts from one batch to the next: workers, and recent failures."""

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
    """Says so a few times; `Scores.errors` counts the rest."""
    self._last[name] = f"last on one of problem {problem.pid}: {fault}"
    self._num_logged[name] += 1
    if self._num_logged[name] <= _MOST_LOGGED:
      message = "Reward %s failed on a completion of %s: %s"
      logging.warning(message, name, problem.pid, fault)

  def judge(self, name: str, failed: np.ndarray) -> None:
    """Counts the rows of one reward, in their order.

    Raises:
      RewardError: One of them was one failure too many.
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
          f"{len(recent)} completions, and rewards.max_error_fraction "
          f"({self._config.max_error_fraction:g}) allows {limit:g} of "
          f"{self._config.error_window}; {self._last[name]}. Mend the reward; "
          "if it is only slow, raise rewards.timeout_seconds."
        )


_MOST_LOGGED = 10
_SESSIONS: dict[RewardConfig, _Session] = {}


_LARGEST = float(np.finfo(np.float32).max)


def _checked(value: float | str) -> tuple[float, str | None]:
  """A value as it is paid, and None; or 0, and what is wrong with it."""
  if isinstance(value, str):
    return 0.0, value
  if abs(value) <= _LARGEST:  # Never true of NaN.
    return value, None
  return 0.0, f"a reward must be a finite float32, not {value}"


def _score_one(
  text: str, problem: records.Problem, config: RewardConfig
) -> tuple[str | None, list[float], dict[str, str]]:
  """The answer of one completion, its components, and why some failed."""
  values = [0.0] * len(COMPONENTS)
  try:
    verdict = verify.verify(text, problem)
  except Exception as error:
    return None, values, {"accuracy": custom.said(error)}
  faults: dict[str, str] = {}
  reasoning = heuristics.read(accuracy.reasoning(text))
  row = _Completion(text, reasoning, verdict)
  gated = config.is_gated and verdict.answer is None
  for i, name in enumerate(COMPONENTS):
    if gated and name in HEURISTICS:
      continue
    try:
      values[i], fault = _checked(float(_REWARDS[name](row)))
    except Exception as error:
      fault = custom.said(error)
    if fault is not None:
      faults[name] = fault
  return verdict.answer, values, faults
