"""Comparisons of answers in worker processes that can be killed.

This process's workers start with the first comparison and end with it. Equal
comparisons are made once. Works in any thread, and after a fork.
"""

import atexit
import functools
import json
import os
import threading
from concurrent import futures
from typing import Any

from data_pipelines.workers import pool

EXPRESSIONS = "data_pipelines.verifier.expressions:is_equal"
# The functions that a record's `scorer` may name before its colon.
SCORERS = {
  "reasoning_gym": "data_pipelines.sources.drawn.reasoning_gym:score_answer",
}
# Imported before the first call, whose time does not count it.
_ALSO_IMPORTED = {
  "data_pipelines.scoring.official.mathvision:same_value": (
    "data_pipelines.verifier.expressions:read",
  ),
  SCORERS["reasoning_gym"]: ("reasoning_gym:get_score_answer_fn",),
}
# The sizes of what is compared are limited, so that hardly any takes this long.
_TIMEOUT_SECONDS = 10.0
_MEMORY_GIB = 4.0
_NUM_WORKERS = min(4, os.cpu_count() or 1)
_MAX_CACHED = 16_384


_pools: dict[str, pool.Pool] = {}
_lock = threading.Lock()


def _forget() -> None:
  """Leaves the parent's workers to the parent after a fork."""
  global _lock
  _lock = threading.Lock()
  _pools.clear()
  _submit.cache_clear()


os.register_at_fork(after_in_child=_forget)


def start(path: str, *arguments: Any) -> futures.Future[Any]:
  """Starts a comparison, or returns one of the same arguments.

  Args:
    path: `EXPRESSIONS` or one of `SCORERS`.
    *arguments: Values that JSON can hold.

  Returns:
    A future of a number, or of a `functions.Failure` if the call was killed or
    raised. It raises RuntimeError if no worker can be started.
  """
  task = json.dumps([path, arguments], sort_keys=True)
  with _lock:
    found = _submit(task)
    if found.done() and (found.cancelled() or found.exception()):
      _submit.cache_clear()
      found = _submit(task)
  return found


@functools.lru_cache(_MAX_CACHED)
def _submit(task: str) -> futures.Future[Any]:
  path, arguments = json.loads(task)
  if path not in _pools or _pools[path].is_closed:
    _pools[path] = pool.Pool(
      (path, *_ALSO_IMPORTED.get(path, ())),
      num_workers=_NUM_WORKERS,
      timeout_seconds=_TIMEOUT_SECONDS,
      memory_gib=_MEMORY_GIB,
    )
  return _pools[path].submit(path, *arguments)


def is_right(comparison: futures.Future[Any]) -> bool | None:
  """True if a comparison gave 1; None if it was killed or gave no number."""
  result = comparison.result()
  return result == 1 if isinstance(result, int | float) else None


def close() -> None:
  """Kills the workers and forgets all comparisons."""
  pools = list(_pools.values())
  _forget()
  for each in pools:
    each.close()


atexit.register(close)
