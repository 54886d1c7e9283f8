"""Calls of users' rewards on rows.

A function of lists gets several rows per call, and each worker has one call at
a time. An `async` one gets one row per call, and one worker has many of them in
its event loop: a thread hands in calls and collects what has ended, again and
again. Calls whose worker fails are repeated row by row, so that a bad row fails
alone. Results depend on neither the order nor the speed of the workers.
"""

import collections
import contextlib
import itertools
from collections.abc import Sequence
from concurrent import futures
from typing import Any, NamedTuple

from data_pipelines import records
from data_pipelines.validation import printable
from data_pipelines.workers import functions, pool
from grpo_tpu.rewards import custom, worker_side
from grpo_tpu.rewards.settings import RewardConfig

_LOAD = "grpo_tpu.rewards.worker_side:load"
_ADVANCE = "grpo_tpu.rewards.worker_side:advance"
_KEYS = itertools.count()
_MAX_REASON_CHARACTERS = 1000

# A reward, or the reason why there is none.
type Result = futures.Future[float | str]


class _Row(NamedTuple):
  completion: str
  problem: records.Problem
  result: Result


class _Call(NamedTuple):
  path: str
  rows: Sequence[_Row]


class Calls:
  """Calls of the rewards that are `async`, or of those that are not."""

  def __init__(self, config: RewardConfig, *, is_async: bool):
    """Starts nothing yet."""
    kinds = {x: custom.is_async(custom.resolve(x)) for x in config.custom}
    self.paths = tuple(x for x, kind in kinds.items() if kind == is_async)
    self._rows_per_call, self._limit = config.rows_per_call, 1
    num_workers = config.num_workers
    if is_async:
      self._rows_per_call, self._limit = 1, config.max_concurrent
      num_workers = min(num_workers, 1)
    self._options = config.timeout_seconds, config.max_retries
    self._workers = pool.Pool(
      (_LOAD, _ADVANCE, *self.paths),
      num_workers=num_workers,
      timeout_seconds=config.timeout_seconds,
      memory_gib=config.worker_memory_gib,
      set_up=(_LOAD, self.paths),
    )
    if not num_workers:
      failure = functions.call(worker_side.load, self.paths)
      if isinstance(failure, functions.Failure):
        raise RuntimeError(f"{self.paths} cannot be loaded: {failure.reason}.")
    self._waiting = collections.deque[_Call]()
    self._threads = futures.ThreadPoolExecutor(num_workers or 1)

  def start_worker(self) -> futures.Future[Any]:
    """Starts a worker; the future raises a RuntimeError if that fails."""
    return self._threads.submit(self._replace_stuck)

  def start(
    self,
    path: str,
    completions: Sequence[str],
    problems: Sequence[records.Problem],
  ) -> list[Result]:
    """Starts to call a reward; the results are those of the rows."""
    rows = [
      _Row(*row, futures.Future())
      for row in zip(completions, problems, strict=True)
    ]
    for some in itertools.batched(rows, self._rows_per_call):
      self._waiting.append(_Call(path, some))
      self._threads.submit(self._finish, self._waiting, self._limit)
    return [row.result for row in rows]

  def close(self) -> None:
    """Ends all calls."""
    self._workers.close()
    self._threads.shutdown()

  def _finish(self, waiting: collections.deque[_Call], limit: int) -> None:
    """Finishes calls, of which at most `limit` are in flight at a time."""
    running: dict[str, _Call] = {}
    try:
      while waiting or running:
        new: dict[str, _Call] = {}
        with contextlib.suppress(IndexError):  # Another thread was faster.
          while len(running) + len(new) < limit:
            new[str(next(_KEYS))] = waiting.popleft()
        running |= new
        found = self._advance(new, running) if running else {}
        if isinstance(found, functions.Failure):
          is_one = limit == 1 and len(running[min(running)].rows) == 1
          found = dict.fromkeys(running, [found.reason] if is_one else [])
          self._replace_stuck()
        for key, values in found.items():
          call = running.pop(key)
          for row, value in zip(call.rows, values, strict=bool(values)):
            is_reason = isinstance(value, str)
            row.result.set_result(printable(value) if is_reason else value)
          if not values:
            alone = (_Call(call.path, [row]) for row in call.rows)
            self._finish(collections.deque(alone), 1)
    except BaseException as error:  # No worker can be started.
      for call in (*running.values(), *waiting):
        for row in call.rows:
          row.result.set_exception(error)
      waiting.clear()
      raise

  def _replace_stuck(self) -> None:
    """Starts a worker, also in the place of one whose calls will not end."""

    def check(is_stuck: bool) -> None:
      if is_stuck:
        raise ValueError("calls go on that should have ended")

    self._workers.submit(_LOAD, check=check).result()

  def _advance(self, new: dict[str, _Call], running: dict[str, _Call]) -> Any:
    """Hands in new calls; the results of calls that have ended, by key."""
    problems: dict[int, records.Problem] = {}  # Each is sent once.
    calls = []
    for key, call in new.items():
      problems |= {id(row.problem): row.problem for row in call.rows}
      rows = [(row.completion, str(id(row.problem))) for row in call.rows]
      calls.append((key, call.path, rows))
    encoded = {str(k): custom.encode(x) for k, x in problems.items()}

    def check(found: Any) -> None:
      if not isinstance(found, dict) or found.keys() - running.keys():
        raise ValueError("its answer is not one of results by call")
      for key, values in found.items():
        count = len(running[key].rows)
        if not isinstance(values, list) or len(values) != count:
          raise ValueError(f"its answer is no list of {count} rewards")
        if not all(map(_is_result, values)):
          raise ValueError("its answer holds what is neither reward nor reason")

    return self._workers.submit(
      _ADVANCE, calls, encoded, *self._options, check=check
    ).result()


def _is_result(value: Any) -> bool:
  """True for a finite float32, and for the reason why there is none."""
  if isinstance(value, str):
    return len(value) <= _MAX_REASON_CHARACTERS
  return not isinstance(custom.to_reward(value), str)
