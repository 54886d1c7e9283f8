"""Rewards of completions: the components of every row, and their weighted sum.

A reward that raises, hangs or returns no finite number is a failure: the row is
excluded and counted instead of scoring 0, and too many failures end the run.
Built-in rewards take time linear in the completion and run in this process;
users' rewards (`custom`) run in workers. This module knows no groups,
advantages or tokens.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from data_pipelines import records
from data_pipelines.verifier import verify
from data_pipelines.workers import functions
from grpo_tpu.rewards import accuracy, calls, heuristics
from grpo_tpu.rewards.settings import COMPONENTS, RewardConfig


class RewardError(RuntimeError):
  """A reward failed on more completions than `max_error_fraction` allows."""


@dataclasses.dataclass(frozen=True)
class Scores:
  """The rewards of N completions.

  Dicts are by name of the component, in the order of `RewardConfig.weights`.
  """

  total: np.ndarray  # float32 [N], the weighted sum; 0 for invalid rows.
  # float32 [N], before weights; 0 for a gated heuristic and for a failure.
  components: dict[str, np.ndarray]
  failed: dict[str, np.ndarray]  # bool [N], True where the component failed.
  errors: dict[str, int]  # The number of failures on all processes together.
  answers: list[str | None]  # The answer extracted from each completion.

  @property
  def valid(self) -> np.ndarray:
    """bool [N], False for a row to exclude because a component failed."""
    return ~np.any(list(self.failed.values()), axis=0)


@dataclasses.dataclass(frozen=True)
class RawScores:
  """The rewards of some completions before failures are counted."""

  problems: Sequence[records.Problem]
  answers: list[str | None]  # The answer extracted from each completion.
  values: np.ndarray  # float32 [components, N], before weights.
  faults: dict[tuple[int, int], str]  # Reasons of failures by (component, row).

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


def score_groups(
  texts: Sequence[Sequence[str]],
  problems: Sequence[records.Problem],
  config: RewardConfig,
  *,
  gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Scores:
  """`score` for completions grouped by prompt, in the order of the groups."""
  repeated = [
    problem
    for problem, group in zip(problems, texts, strict=True)
    for _ in group
  ]
  flat = [text for group in texts for text in group]
  return score(flat, repeated, config, gather=gather)


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
  workers = _session(config).workers
  wait_for = calls.start(workers, completions, problems, config)
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
    _SESSIONS.popitem()[1].workers.close()


class _Session:
  """State that lives from batch to batch: the workers and recent failures."""

  def __init__(self, config: RewardConfig):
    self.workers = calls.make_pool(config)
    self._config = config
    self._recent: dict[str, collections.deque[bool]] = {
      name: collections.deque(maxlen=config.error_window)
      for name in config.weights
    }
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
      recent.append(has_failed)
      if has_failed and (num_failed := sum(recent)) > limit:
        raise RewardError(
          f"reward {name} failed on {num_failed} of the last "
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
  """The answer of one completion, its components and their failures."""
  values = [0.0] * len(COMPONENTS)
  try:
    verdict = verify.verify(text, problem)
  except Exception as error:
    return None, values, {"accuracy": functions.one_line(error)}
  reasoning = heuristics.read(accuracy.reasoning(text))
  rewards: dict[str, Callable[[], float]] = {
    "accuracy": lambda: accuracy.accuracy(verdict),
    "format": lambda: accuracy.well_formed(text),
  }
  if not config.is_gated or verdict.answer is not None:
    rewards |= {
      "length": lambda: heuristics.length(reasoning),
      "reasoning_words": lambda: heuristics.reasoning_words(reasoning),
      "coherence": lambda: heuristics.coherence(reasoning),
    }
  faults: dict[str, str] = {}
  for name, reward in rewards.items():
    try:
      values[COMPONENTS.index(name)], fault = _check_value(float(reward()))
    except Exception as error:
      fault = functions.one_line(error)
    if fault is not None:
      faults[name] = fault
  return verdict.answer, values, faults
