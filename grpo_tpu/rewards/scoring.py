"""Rewards of completions: the components of every row, and their weighted sum.

A reward that raises, hangs or returns no finite number is a failure: the row is
excluded and counted instead of scoring 0. Too many failures end the run, as
does a reward that fails on every row of a step. Users' rewards run in workers.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

import numpy as np
from absl import logging

from data_pipelines import records
from data_pipelines.validation import printable
from data_pipelines.verifier import verify
from data_pipelines.workers import functions
from grpo_tpu.rewards import accuracy, calls, custom, error_budget, heuristics
from grpo_tpu.rewards.settings import COMPONENTS, HEURISTICS, RewardConfig

type Budgets = Mapping[str, error_budget.ErrorBudget]


class RewardError(RuntimeError):
  """A reward failed on every completion, or on more than are allowed."""

  def __init__(self, message: str, scores: "Scores"):
    super().__init__(message)
    self.scores = scores  # Those that were found.


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
  # bool [N], True where the rules have no verdict; see `start`.
  abstained: np.ndarray
  # float32 [N], the terms of the total before their weights. A network's are
  # normalised, and NaN in `components` where it was not asked.
  terms: dict[str, np.ndarray]

  @property
  def valid(self) -> np.ndarray:
    """bool [N], False for a row to exclude because a component failed."""
    return ~np.any(list(self.failed.values()), axis=0)


@dataclasses.dataclass(frozen=True)
class RawScores:
  """The rewards of some completions before failures are counted."""

  problems: Sequence[records.Problem]
  answers: list[str | None]  # The answer extracted from each completion.
  is_present: np.ndarray  # bool [N]; False for a stand-in, which is no row.
  values: np.ndarray  # float32 [components, N], before weights.
  # Reasons of failures by (component, row), but for those of stand-ins.
  faults: dict[tuple[int, int], str]
  abstained: np.ndarray  # bool [N], True where the rules have no verdict.

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
  is_present: np.ndarray | None = None,
  truncated: Sequence[bool] | None = None,
  gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Scores:
  """Computes every reward of every completion; no completion raises.

  A stand-in, where `is_present` is False, is seen by no user's reward, and its
  failures do not count. For `truncated` see `verify.verify`. `gather` maps the
  rows of this process to those of all, in one order everywhere, so that all
  processes count the same failures.

  Raises:
    RewardError: A reward failed too often in this and earlier calls, on all
      processes together.
    RuntimeError: A worker cannot be started.
  """
  finish = start(
    completions, problems, config, is_present=is_present, truncated=truncated
  )
  return reduce([finish()], config, gather=gather)


def start_workers(config: RewardConfig) -> list[futures.Future]:
  """Starts workers and their set-up; the results raise as `score` does."""
  return [x.start_worker() for x in _session(config).calls if x.paths]


def start(
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  config: RewardConfig,
  *,
  is_present: np.ndarray | None = None,
  truncated: Sequence[bool] | None = None,
) -> Callable[[], RawScores]:
  """Starts users' rewards; the result computes the others and waits for all.

  The result may be called in a thread. The rules have no verdict on the
  completions of a problem that they cannot check. A comparison that took too
  long is a failure of the accuracy, unless judges have the say where the rules
  have none.
  """
  if len(completions) != len(problems):
    raise ValueError(
      f"{len(completions)} completions need as many problems, not "
      f"{len(problems)}."
    )
  if is_present is None:
    is_present = np.ones(len(completions), bool)
  rows = np.flatnonzero(is_present).tolist()
  started = {
    path: each.start(
      path, [completions[row] for row in rows], [problems[row] for row in rows]
    )
    for each in _session(config).calls
    for path in each.paths
  }

  def finish() -> RawScores:
    verdicts = _verdicts(completions, problems, truncated)
    if not (config.judges and config.judge_when == "abstained"):
      verdicts = list(map(_refuse_timeout, verdicts, problems))
    is_open = (isinstance(x, verify.Verdict) and x.abstained for x in verdicts)
    abstained = np.array([*is_open], bool)
    answers = [None if isinstance(x, str) else x.answer for x in verdicts]
    values = np.zeros((len(config.weights), len(completions)), np.float32)
    found: dict[tuple[int, int], float | str] = {}
    for row, text in enumerate(completions):
      own = _score_one(text, verdicts[row], config)
      found |= {(COMPONENTS.index(x), row): y for x, y in own.items()}
    for component, path in enumerate(config.custom, start=len(COMPONENTS)):
      for row, call in zip(rows, started[path], strict=True):
        found[component, row] = call.result()
    faults: dict[tuple[int, int], str] = {}
    for place, result in found.items():
      if not isinstance(result, str):
        values[place] = result
      elif is_present[place[1]]:
        faults[place] = result
    return RawScores(problems, answers, is_present, values, faults, abstained)

  return finish


def reduce(
  parts: Sequence[RawScores],
  config: RewardConfig,
  *,
  gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Scores:
  """Joins raw scores and counts their failures; raises as `score` does."""
  session, names = _session(config), list(config.weights)
  session.log(parts)
  values = np.concatenate([part.values for part in parts], axis=1)
  failures = np.concatenate([part.failures for part in parts], axis=1)
  is_present = np.concatenate([part.is_present for part in parts])
  components = dict(zip(names, values, strict=True))
  scores = Scores(
    total=np.zeros(len(is_present), np.float32),
    components=components,
    terms=components,
    failed=dict(zip(names, failures, strict=True)),
    errors={},
    answers=[answer for part in parts for answer in part.answers],
    abstained=np.concatenate([part.abstained for part in parts]),
  )
  budgets, describe = session.budgets, session.describe_failures
  rest = scores.failed, is_present, gather, budgets, describe
  return add_up(scores, config.weights, *rest)


def budgets(config: RewardConfig) -> Budgets:
  """The error budgets of components by name, made when first asked for."""
  limits = config.max_error_fraction, config.error_window
  return collections.defaultdict(lambda: error_budget.ErrorBudget(*limits))


def add_up(
  scores: Scores,
  weights: Mapping[str, float],
  failed: Mapping[str, np.ndarray],
  is_present: np.ndarray,
  gather: Callable[[np.ndarray], np.ndarray],
  budgets: Budgets,
  describe: Callable[[str, str], str],
) -> Scores:
  """The scores with their total and the failures on all processes' rows.

  A RewardError has the words of `describe(name, rows)`.
  """
  total = np.zeros(len(is_present), np.float32)
  # Row by row, so that a total does not depend on the other rows.
  for name, weight in weights.items():
    if name in scores.terms:  # One reward model alone has no spread.
      total += np.float32(weight) * scores.terms[name]
  rows = gather(np.column_stack([is_present, *failed.values()]))
  counted = dict(zip(failed, rows[rows[:, 0]].T[1:], strict=True))
  scores = dataclasses.replace(
    scores,
    total=np.where(scores.valid, total, np.float32(0)),
    errors=scores.errors | {k: int(x.sum()) for k, x in counted.items()},
  )
  for name, each in counted.items():
    if reason := budgets[name].count(each.tolist()):
      raise RewardError(f"reward {describe(name, reason)}", scores)
  return scores


def _session(config: RewardConfig) -> "_Session":
  if config not in _SESSIONS:
    _SESSIONS[config] = _Session(config)
  return _SESSIONS[config]


def close() -> None:
  """Ends the workers of every config and forgets all failures."""
  while _SESSIONS:
    for each in _SESSIONS.popitem()[1].calls:
      each.close()


class _Session:
  """State that lives from batch to batch: the workers and recent failures."""

  def __init__(self, config: RewardConfig):
    self.calls = [calls.Calls(config, is_async=x) for x in (False, True)]
    self.budgets, self._names = budgets(config), list(config.weights)
    self._paths = {custom.name(path): path for path in config.custom}
    # How often each fault of a reward was seen, and the first of this batch.
    self._seen = collections.defaultdict[str, collections.Counter[str]](
      collections.Counter
    )
    self._first: dict[str, str] = {}

  def log(self, parts: Sequence[RawScores]) -> None:
    """Logs each fault when it is new, and again at ten times the count."""
    found = collections.defaultdict[tuple[str, str], list[str]](list)
    for part in parts:
      for (component, row), fault in part.faults.items():
        pid = printable(part.problems[row].pid)
        found[self._names[component], fault].append(pid)
    self._first = {}
    for (name, fault), pids in found.items():
      self._first.setdefault(name, f", of problem {pids[0]}: {fault}")
      seen = self._seen[name]
      if fault not in seen and len(seen) >= _MOST_DIFFERENT:
        continue
      before, seen[fault] = seen[fault], seen[fault] + len(pids)
      if len(str(seen[fault])) > len(str(before or "")):
        message = "Reward %s failed on %d completions, here of problem %s: %s"
        source = self._describe(name)
        logging.warning(message, source, seen[fault], pids[0], fault)

  def describe_failures(self, name: str, rows: str) -> str:
    """The reason to end the run, because a reward failed on these rows."""
    first = self._first.get(name, " is in the log of another host")
    return (
      f"{self._describe(name)} failed on {rows}; the first error{first}. Fix "
      "the reward; if it is only slow, raise rewards.timeout_seconds."
    )

  def _describe(self, name: str) -> str:
    """The reward's name, with the place of its definition if it is a user's."""
    path = self._paths.get(name)
    return f"{name} ({printable(custom.location(path))})" if path else name


_MOST_DIFFERENT = 10  # Faults of a reward that are logged.
_SESSIONS: dict[RewardConfig, _Session] = {}


def _verdicts(
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  truncated: Sequence[bool] | None,
) -> list[verify.Verdict | str]:
  """The verdict on each completion, or the reason why it has none."""
  try:
    return [*verify.verify_all(completions, problems, truncated)]
  except Exception as error:
    if len(completions) < 2:
      return [functions.one_line(error)]
    flags = [False] * len(completions) if truncated is None else truncated
    rows = zip(completions, problems, flags, strict=True)
    return [_verdicts([x], [y], [z])[0] for x, y, z in rows]


def _refuse_timeout(
  verdict: verify.Verdict | str, problem: records.Problem
) -> verify.Verdict | str:
  """The verdict, or the failure of a comparison that can be made."""
  if isinstance(verdict, str) or not verdict.abstained:
    return verdict
  reason = "the comparison with the right answer took too long, or ended "
  return f"{reason}its process" if problem.is_checkable else verdict


def _score_one(
  text: str, verdict: verify.Verdict | str, config: RewardConfig
) -> dict[str, float | str]:
  """The rewards of one completion, or the reasons why it has none."""
  if isinstance(verdict, str):
    return {"accuracy": verdict}
  reasoning = heuristics.read(accuracy.reasoning(text))
  rewards: dict[str, Callable[[], float]] = {
    "accuracy": lambda: float(verdict.correct),
    "format": lambda: accuracy.well_formed(text),
  }
  if not config.is_gated or verdict.answer is not None:
    rewards |= {
      name: functools.partial(getattr(heuristics, name), reasoning)
      for name in HEURISTICS
    }
  found: dict[str, float | str] = {}
  for name, reward in rewards.items():
    try:
      found[name] = custom.to_reward(reward())
    except Exception as error:
      found[name] = functions.one_line(error)
  return found
