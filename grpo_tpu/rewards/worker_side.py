"""Users' rewards in a worker: their set-up, and their calls.

Worker processes import this module, so nothing heavy is imported here.
"""

import asyncio
import collections
import inspect
import itertools
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from data_pipelines import records
from data_pipelines.workers import functions
from grpo_tpu.rewards import custom

# Time after which the trainer may hand in more calls of `async` rewards.
_TURN_SECONDS = 0.05
_FIRST_PAUSE_SECONDS = 0.5
# Time for a call that was cancelled to close what it has opened.
_PATIENCE_SECONDS = 1.0

_REWARDS: dict[str, Callable] = {}  # By path, where classes are instances.
_WAITING = collections.deque[tuple[str, tuple]]()
_RUNNING: dict[str, asyncio.Task[float | str]] = {}
_STUCK: list[asyncio.Task[Any]] = []  # Tries that ignored that they must end.
_RUNNER = asyncio.Runner()  # One event loop, so that calls may share a client.


def load(*paths: str) -> functions.Failure | bool:
  """Makes and loads the instances of classes.

  Returns True if calls go on that should have ended.
  """
  for path in paths:
    reward = functions.resolve(path)
    if isinstance(reward, type):
      reward = reward()
      set_up = getattr(reward, "load", None)
      if inspect.iscoroutinefunction(set_up):
        if failure := _RUNNER.run(_outcome(set_up)):
          return failure
      elif set_up:
        set_up()
    _REWARDS[path] = reward
  return not all(task.done() for task in _STUCK)


def advance(
  calls: Sequence[tuple[str, str, Sequence[tuple[str, str]]]],
  examples: Mapping[str, Mapping[str, Any]],
  seconds: float,
  retries: int,
) -> dict[str, list[float | str]] | functions.Failure:
  """Starts calls, and waits a moment for those that are in flight.

  Calls have a key, a path and rows: a completion and the key of its example.
  Returns by key, for each row of a call that has ended, a finite float or the
  reason why it has none; or why a function of lists failed.
  """
  problems = {key: custom.decode(each) for key, each in examples.items()}
  for key, path, rows in calls:
    pairs = [(completion, problems[x]) for completion, x in rows]
    if not custom.is_async(reward := _REWARDS[path]):  # It is called alone.
      values = functions.call(
        _values, (reward, *map(list, zip(*pairs, strict=True)))
      )
      return values if isinstance(values, functions.Failure) else {key: values}
    _WAITING.append((key, (reward, *pairs[0], seconds, retries)))
  try:
    return _RUNNER.run(_advance(min(_TURN_SECONDS, seconds / 2)))
  except BaseException:  # The trainer repeats all calls in another worker.
    _STUCK.extend(_RUNNING.values())
    _RUNNING.clear()
    _WAITING.clear()
    raise


def _values(
  reward: Callable, completions: list[str], problems: list[records.Problem]
) -> list[float | str]:
  """The rewards of a function of lists; a TypeError for what is no list."""
  values: Any = reward(completions, problems)
  if inspect.iscoroutine(values):
    values.close()  # Else Python warns that nobody has awaited it.
  unordered = str, bytes, Mapping, Set
  if isinstance(values, unordered) or not hasattr(values, "__iter__"):
    raise TypeError(
      "it must return a list of one number per completion, not an object of "
      f"type {type(values).__name__}"
    )
  # One more than there may be, because a generator may never end.
  rewards: Any = values
  count = len(completions)
  found = list(itertools.islice(rewards, count + 1))
  if len(found) != count:
    given = len(found) if len(found) < count else "too many"
    raise TypeError(f"it gave {given} rewards for {count} completions")
  return list(map(custom.to_reward, found))


async def _advance(seconds: float) -> dict[str, list[float | str]]:
  end = time.monotonic() + seconds
  # One after the other: a function that blocks the loop does so alone.
  while _WAITING and time.monotonic() < end:
    key, call = _WAITING.popleft()
    _RUNNING[key] = asyncio.create_task(_reward(*call))
    await asyncio.sleep(0)
  await asyncio.wait(
    _RUNNING.values(),
    timeout=max(end - time.monotonic(), 0.0),
    return_when=asyncio.FIRST_COMPLETED,
  )
  ended = [key for key, task in _RUNNING.items() if task.done()]
  return {key: [_RUNNING.pop(key).result()] for key in ended}


async def _reward(
  reward: Callable,
  completion: str,
  problem: records.Problem,
  seconds: float,
  retries: int,
) -> float | str:
  """The reward of a completion, or the reason why the last try gave none."""
  reason = ""
  for attempt in range(retries + 1):
    if attempt:
      await asyncio.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    # A task of its own, because it may cancel itself or refuse to end.
    call = _outcome(reward, completion=completion, problem=problem)
    task = asyncio.create_task(call)
    await asyncio.wait([task], timeout=seconds)
    if not task.done():
      reason = f"it took longer than {seconds:g} seconds"
      task.cancel()
      await asyncio.wait([task], timeout=_PATIENCE_SECONDS)
      _STUCK.append(task)
    elif task.cancelled():
      reason = "it cancelled itself"
    elif isinstance(found := task.result(), functions.Failure):
      reason = found.reason
    else:
      return custom.to_reward(found)
  return reason


async def _outcome(function: Callable, **arguments: Any) -> Any:
  """The result of an `async` function, or a `Failure` for what it raises."""
  try:
    return await function(**arguments)
  except (KeyboardInterrupt, MemoryError):
    raise  # The worker must end.
  except BaseException as error:  # CancelledError too.
    return functions.failure(error, num_callers=1)
