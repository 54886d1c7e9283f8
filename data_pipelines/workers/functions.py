"""Functions named by path, "package.module:function", and calls of them.

Every worker process imports this module, so nothing heavy is imported here.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Failure:
  """The reason why a call has no result, in one line."""

  reason: str


def resolve(path: str, *, setting: str = "function") -> Callable:
  """Imports the function at "package.module:function".

  Args:
    path: The function's path.
    setting: The name of the setting that holds the path, for errors.

  Raises:
    ValueError: The path names no function that can be imported.
  """
  if not _PATH.fullmatch(path):
    raise ValueError(
      f"{setting} ({path!r}) must have the form package.module:function."
    )
  module_name, _, function_name = path.partition(":")
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # A user's module may raise anything.
    raise ValueError(
      f"{setting} ({path!r}) must name a module that can be imported, but the "
      f"import failed: {one_line(error)}. Fix the module, or add its folder to "
      "PYTHONPATH."
    ) from error
  function: Callable | None = getattr(module, function_name, None)
  if not callable(function):
    raise ValueError(
      f"{setting} ({path!r}) must name a function, but {module_name} has no "
      f"{function_name!r} that can be called. Correct the name."
    )
  return function


def call(function: Callable, arguments: Sequence[Any]) -> Any:
  """Calls the function; an exception becomes a `Failure`."""
  try:
    return function(*arguments)
  except Exception as error:  # A user's function may raise anything.
    return Failure(one_line(error))


def one_line(error: Exception) -> str:
  """Formats an exception as one log line of at most about 500 characters."""
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return text if len(text) <= 500 else f"{text[:500]}..."
