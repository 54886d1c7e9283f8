"""Users' reward functions, named by path.

    def brevity(completions: list[str], problems: list[Problem]) -> list[float]:
      return [1.0 / (1.0 + len(text.split())) for text in completions]

`completions[i]` answers `problems[i]` (`data_pipelines.records.Problem`). The
reward of a row must not depend on the other rows of the call, because settings
and failures decide which rows share a call. An `async def` takes one completion
and is awaited with others:

    async def judge(completion: str, problem: Problem) -> float: ...

A class is made once per worker, and its `load` is called before the first row;
its `__call__` is one of both. Worker processes import this module, so nothing
heavy is imported here.
"""

import base64
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines import records
from data_pipelines.validation import require
from data_pipelines.workers import functions

_LARGEST = (2 - 2**-23) * 2.0**127  # The largest float32.


def name(path: str) -> str:
  """The reward's name in metrics and samples: that of its function."""
  return path.partition(":")[2]


def resolve(path: str) -> Callable:
  """Imports the reward at "package.module:name", a function or a class.

  Raises a ValueError for one that cannot be called as described above.
  """
  setting = "rewards.custom"
  reward = called = functions.resolve(path, setting=setting)
  if isinstance(reward, type):
    is_called = any("__call__" in vars(x) for x in reward.__mro__)
    rule = "have a method `__call__`, because it is a class"
    require(is_called, setting, path, rule, "write it")
    _check_arguments(path, reward, "no arguments when it is made")
    called = functools.partial(reward.__call__, None)
  is_one = not _is(inspect.isasyncgenfunction, reward)
  rule = "return its reward, because it is async"
  require(is_one, setting, path, rule, "write no `yield`")
  if is_async(reward):
    rule = "`completion` and `problem`, one of each, because it is async"
    _check_arguments(path, called, rule, completion="", problem=None)
  else:
    rule = "two arguments, completions and problems"
    _check_arguments(path, called, rule, [], [])
  return reward


def _check_arguments(
  path: str, called: Callable, rule: str, *args: Any, **options: Any
) -> None:
  try:
    inspect.signature(called).bind(*args, **options)
  except TypeError as error:
    raise ValueError(
      f"rewards.custom ({path!r}) must take {rule}, but: "
      f"{functions.one_line(error)}. Change its parameters."
    ) from error
  except ValueError:
    pass  # Built-in functions may have no signature.


def is_async(reward: Callable) -> bool:
  """True if a reward, or the instance of a class, returns an awaitable."""
  return _is(inspect.iscoroutinefunction, reward)


def _is(kind: Callable[[Any], bool], reward: Callable) -> bool:
  while isinstance(reward, functools.partial):
    reward = reward.func
  return kind(reward) or kind(reward.__call__)


def location(path: str) -> str:
  """The file and line of a reward's definition, or its path without one."""
  reward = resolve(path)
  is_class = isinstance(reward, type)
  function = inspect.unwrap(reward.__call__ if is_class else reward)
  code = getattr(function, "__code__", None)
  return f"{code.co_filename}:{code.co_firstlineno}" if code else path


def encode(problem: records.Problem) -> dict[str, Any]:
  """The problem as JSON."""
  images = [base64.b64encode(each).decode() for each in problem.images]
  return records.to_example(problem) | {"images": images}


def decode(example: Mapping[str, Any]) -> records.Problem:
  """The problem that `encode` gave."""
  images = [base64.b64decode(each) for each in example["images"]]
  return records.from_example({**example, "images": images})


def to_reward(value: Any) -> float | str:
  """The value as a float, or the reason why it is no finite float32."""
  try:
    # float("1") would succeed.
    reward = math.nan if isinstance(value, (str, bytes)) else float(value)
  except Exception:  # An object of the user's may raise anything.
    reward = math.nan
  if abs(reward) <= _LARGEST:  # Never true for NaN.
    return reward
  shown = f"an object of type {type(value).__name__}"
  if isinstance(value, (str, bytes)):
    shown = repr(value[:50])
  elif value is None or isinstance(value, float):
    shown = str(value)
  return f"a reward must be a finite float32, not {shown}"
