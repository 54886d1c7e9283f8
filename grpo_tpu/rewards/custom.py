"""Users' reward functions, named by path.

    def brevity(completions: list[str], problems: list[Problem]) -> list[float]:
      return [1.0 / (1.0 + len(text.split())) for text in completions]

`completions[i]` answers `problems[i]` (`data_pipelines.records.Problem`). The
reward of a row must not depend on the other rows of the call, because settings
and failures decide which rows share a call. Worker processes import this
module, so nothing heavy is imported here.
"""

import base64
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from data_pipelines import records
from data_pipelines.validation import require
from data_pipelines.workers import functions

type Function = Callable[[list[str], list[records.Problem]], Sequence[float]]

_LARGEST = (2 - 2**-23) * 2.0**127  # The largest float32.
_MAX_REASON_CHARACTERS = 500


def name(path: str) -> str:
  """The reward's name in metrics and samples: that of its function."""
  return path.partition(":")[2]


def resolve(path: str) -> Function:
  """Imports the reward function at "package.module:function".

  Raises a ValueError for one that is async or takes other arguments.
  """
  function = functions.resolve(path, setting="rewards.custom")
  try:
    inspect.signature(function).bind([], [])
  except TypeError as error:
    raise ValueError(
      f"rewards.custom ({path!r}) must take two arguments, completions and "
      f"problems, but: {functions.one_line(error)}. Change its parameters."
    ) from error
  except ValueError:
    pass  # Built-in functions may have no signature.
  rule = "name a function that is not async, because nothing awaits it"
  remedy = "write a `def` that calls `asyncio.run` on it, and name that"
  require(not _is_async(function), "rewards.custom", path, rule, remedy)
  return function


def _is_async(function: Callable) -> bool:
  while isinstance(function, functools.partial):
    function = function.func
  kinds = inspect.iscoroutinefunction, inspect.isasyncgenfunction
  method = inspect.getattr_static(type(function), "__call__", None)
  return any(is_async(x) for is_async in kinds for x in (function, method))


def location(path: str) -> str:
  """The file and line of a reward's definition, or its path without one."""
  function = inspect.unwrap(resolve(path))
  while isinstance(function, functools.partial):
    function = function.func
  code = getattr(function, "__code__", None)
  return f"{code.co_filename}:{code.co_firstlineno}" if code else path


def encode(
  problems: Sequence[records.Problem],
) -> tuple[list[dict[str, Any]], list[int]]:
  """The problems as JSON, each once, and the index among them of each row."""
  unique = {id(problem): problem for problem in problems}
  index = {key: number for number, key in enumerate(unique)}
  examples = [
    records.to_example(problem)
    | {"images": [base64.b64encode(x).decode() for x in problem.images]}
    for problem in unique.values()
  ]
  return examples, [index[id(problem)] for problem in problems]


def call(
  path: str,
  completions: Sequence[str],
  examples: Sequence[Mapping[str, Any]],
  rows: Sequence[int],
) -> list[float | str]:
  """Calls the reward at a path with problems as `encode` gives them.

  Returns for each completion a finite float, or the reason why it has none.
  Raises any error of the function, or a TypeError for other results.
  """
  problems = [
    records.from_example(
      dict(each) | {"images": [base64.b64decode(x) for x in each["images"]]}
    )
    for each in examples
  ]
  values = resolve(path)(list(completions), [problems[row] for row in rows])
  if inspect.iscoroutine(values):
    values.close()  # Else Python warns that nobody has awaited it.
  if isinstance(values, (str, bytes, Mapping, Set)) or not hasattr(
    values, "__iter__"
  ):
    raise TypeError(
      "it must return a list of one number per completion, not an object of "
      f"type {type(values).__name__}"
    )
  # One more than there may be, because a generator may never end.
  found = list(itertools.islice(values, len(completions) + 1))
  if len(found) != len(completions):
    count = len(found) if len(found) < len(completions) else "too many"
    raise TypeError(
      f"it gave {count} rewards for {len(completions)} completions"
    )
  return [to_reward(value) for value in found]


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


def check(values: Any, count: int) -> None:
  """Raises a ValueError for what `call` cannot have returned."""
  if not isinstance(values, list) or len(values) != count:
    raise ValueError(f"its answer is no list of {count} rewards")
  for value in values:
    is_number = type(value) in (int, float) and abs(value) <= _LARGEST
    is_reason = isinstance(value, str) and len(value) <= _MAX_REASON_CHARACTERS
    if not is_number and not is_reason:
      raise ValueError("its answer holds what is neither reward nor reason")
