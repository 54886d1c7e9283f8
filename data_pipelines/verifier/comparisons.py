"""Comparisons of answers in worker processes that can be killed.

This process's workers start with the first comparison and end with it. Equal
comparisons are made once. Works in any thread, and after a fork.
"""

import atexit
import collections
import json
import os
import threading
from concurrent import futures
from typing import Any

from data_pipelines.workers import functions, pool

EXPRESSIONS = "data_pipelines.verifier.expressions:is_equal"
# The functions that a record's `scorer` may name before its colon.
SCORERS = {
  "reasoning_gym": "data_pipelines.sources.drawn.reasoning_gym:score_answer",
}
# Imported before the first call, whose time does not count it.
_ALSO_IMPORTED = {
  EXPRESSIONS: ("latex2sympy2_extended:latex2sympy",),
  "data_pipelines.scoring.official.mathvision:same_value": (
    "latex2sympy2_extended:latex2sympy",
  ),
  SCORERS["reasoning_gym"]: ("reasoning_gym:get_score_answer_fn",),
}
# The sizes of what is compared are limited, so that hardly any takes this long.
_TIMEOUT_SECONDS = 10.0
_MEMORY_GIB = 4.0
_NUM_WORKERS = min(4, os.cpu_count() or 1)
_MAX_CACHED = 16_384


class _State:
  """The pools, by function, and the latest comparisons."""

  def __init__(self):
    self.lock = threading.Lock()
    self.pools: dict[str, pool.Pool] = {}
    self.cache: collections.OrderedDict[str, futures.Future[Any]] = (
      collections.OrderedDict()
    )

  def pool_for(self, path: str) -> pool.Pool:
    """The pool of a function; the lock is held."""
    if path not in self.pools or self.pools[path].is_closed:
      self.pools[path] = pool.Pool(
        (path, *_ALSO_IMPORTED.get(path, ())),
        num_workers=_NUM_WORKERS,
        timeout_seconds=_TIMEOUT_SECONDS,
        memory_gib=_MEMORY_GIB,
      )
    return self.pools[path]


_state = _State()


def _forget() -> None:
  """Leaves the parent's workers to the parent after a fork."""
  global _state
  _state = _State()


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
  key = json.dumps([path, arguments], sort_keys=True)
  state = _state
  with state.lock:
    found = state.cache.get(key)
    if found is None or (found.done() and not _has_result(found)):
      workers = state.pool_for(path)
      found = workers.submit(path, *arguments)
      state.cache[key] = found
      if len(state.cache) > _MAX_CACHED:
        state.cache.popitem(last=False)
    state.cache.move_to_end(key)
  return found


def _has_result(comparison: futures.Future[Any]) -> bool:
  return not comparison.cancelled() and comparison.exception() is None


def is_right(comparison: futures.Future[Any]) -> bool | None:
  """True if a comparison gave 1; None if it was killed or raised."""
  result = comparison.result()
  return None if isinstance(result, functions.Failure) else result == 1


def close() -> None:
  """Kills the workers and forgets all comparisons."""
  state = _state
  _forget()
  for each in state.pools.values():
    each.close()


atexit.register(close)
