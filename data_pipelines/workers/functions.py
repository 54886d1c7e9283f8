"""Functions named by path, "package.module:function", and calls of them.

Every worker process imports this module, so nothing heavy is imported here.
"""

import dataclasses
import importlib
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.validation import printable

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Failure:
  """The reason why a call has no result, in one line."""

  reason: str


def resolve(path: str, *, setting: str = "function") -> Callable:
  """Imports the function at "package.module:function", a value of `setting`."""
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
  """Calls the function; an exception or `sys.exit` becomes a `Failure`."""
  try:
    return function(*arguments)
  except (Exception, SystemExit) as error:  # A user's function may raise any.
    # Without this function and the one that it calls.
    return failure(error, num_callers=2)


def failure(error: BaseException, *, num_callers: int) -> Failure:
  """The failure for an exception, with the file and line of the user's code.

  The first `num_callers` frames of the traceback are the program's own.
  """
  frames = [
    (frame.f_code.co_filename, line)
    for frame, line in traceback.walk_tb(error.__traceback__)
  ][num_callers:]
  # Not in a library that the file called in turn.
  own = [f" ({x}:{line})" for x, line in frames if x == frames[0][0]]
  return Failure(one_line(error) + printable("".join(own[-1:])))


def one_line(error: BaseException) -> str:
  """Formats an exception as one log line of at most about 500 characters."""
  try:
    text = str(error)[:5_000]
  except Exception:  # A user's class may raise here, too.
    text = "(without words)"
  text = printable(" ".join(f"{type(error).__name__}: {text}".split()))
  return text if len(text) <= 500 else f"{text[:500]}..."
