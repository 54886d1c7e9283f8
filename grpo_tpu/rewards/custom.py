"""Users' reward functions, named by path.

    def brevity(completions: list[str], problems: list[Problem]) -> list[float]:
      return [1.0 / (1.0 + len(text.split())) for text in completions]

`completions[i]` answers `problems[i]` (`data_pipelines.records.Problem`). The
reward of a row must not depend on the other rows of the call, because settings
and failures decide which rows share a call. Worker processes import this
module, so nothing heavy is imported here.
"""

import inspect
from collections.abc import Callable, Sequence

from data_pipelines import records
from data_pipelines.workers import functions

type Function = Callable[[list[str], list[records.Problem]], Sequence[float]]


def name(path: str) -> str:
  """The reward's name in metrics and samples: that of its function."""
  return path.partition(":")[2]


def resolve(path: str) -> Function:
  """Imports the reward function at "package.module:function".

  Raises:
    ValueError: There is no such function, or it does not take completions and
      problems.
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
  return function


def call(
  path: str, completions: Sequence[str], problems: Sequence[records.Problem]
) -> list[float]:
  """Calls the reward at a path and checks the number of its values.

  Returns:
    One float per completion, possibly NaN.

  Raises:
    Exception: Any exception of the function, or one about its values.
  """
  values = resolve(path)(list(completions), list(problems))
  rewards = [float(value) for value in values]
  if len(rewards) != len(completions):
    raise ValueError(
      f"it gave {len(rewards)} rewards for {len(completions)} completions"
    )
  return rewards
