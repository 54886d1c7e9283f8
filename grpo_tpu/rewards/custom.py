"""A user's reward: a function, named by where it is found.

    def brevity(completions: list[str], problems: list[Problem]) -> list[float]:
      return [1.0 / (1.0 + len(text.split())) for text in completions]

`problems[i]` (`data_pipelines.records.Problem`) is what `completions[i]`
answers. What a row earns must not depend on the rows beside it: how rows are
divided over calls follows from settings and failures. Knows nothing of weights
and processes, and imports nothing heavy, for workers import it.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence

from data_pipelines import records

type Function = Callable[[list[str], list[records.Problem]], Sequence[float]]
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def name(path: str) -> str:
  """What a reward is called in metrics and samples: its function's name."""
  return path.partition(":")[2]


def resolve(path: str) -> Function:
  """The function at "package.module:function", by importing the module.

  Raises:
    ValueError: There is no such function, or it does not take completions and
      problems.
  """
  if not _PATH.fullmatch(path):
    raise ValueError(
      f"rewards.custom ({path!r}) must name functions as "
      "package.module:function; write it so."
    )
  module_name, _, function_name = path.partition(":")
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # A user's module may raise anything.
    raise ValueError(
      f"rewards.custom ({path!r}) must name a module that can be imported, but "
      f"{said(error)}; mend it, or start where it can be found (PYTHONPATH)."
    ) from error
  function: Function | None = getattr(module, function_name, None)
  if not callable(function):
    raise ValueError(
      f"rewards.custom ({path!r}) must name a function, and {module_name} has "
      f"no {function_name!r} that can be called; correct the name."
    )
  return _checked(path, function)


def _checked(path: str, function: Function) -> Function:
  """The function, if it takes what it will be given."""
  try:
    inspect.signature(function).bind([], [])
  except TypeError as error:
    raise ValueError(
      f"rewards.custom ({path!r}) must be called with completions and "
      f"problems, but {said(error)}; let it take these two."
    ) from error
  except ValueError:
    pass  # Built-in functions need not say what they take.
  return function


def call(
  function: Function,
  completions: Sequence[str],
  problems: Sequence[records.Problem],
) -> list[float] | str:
  """One value for each completion, any of which may be NaN; else why not."""
  try:
    values = [float(x) for x in function(list(completions), list(problems))]
  except Exception as error:  # A user's function may raise anything.
    return said(error)
  if len(values) != len(completions):
    return f"it gave {len(values)} rewards for {len(completions)} completions"
  return values


def said(error: Exception) -> str:
  """An exception in one line, of a length that can be logged."""
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return text if len(text) <= 500 else f"{text[:500]}..."
