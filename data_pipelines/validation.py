"""The errors that a user can fix, the rules behind them, and the exit codes.

An error names the setting, its value, the rule and a remedy. Only the standard
library is imported here, so that the launcher can import this file too.
"""

import contextlib
import dataclasses
import difflib
import enum
import errno
import operator
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


class ExitCode(enum.IntEnum):
  """How the programs of this project end."""

  DONE = 0
  FAILED = 1
  BAD_INPUT = 64  # EX_USAGE of sysexits.h: a wrong setting, flag or data set.
  PREEMPTED = 75  # EX_TEMPFAIL: the same command resumes the run.
  STUCK = 76  # The watchdog saw no progress.
  INTERRUPTED = 130  # Ctrl-C, and nothing was saved.


class SettingError(ValueError):
  """A setting, flag or data set must change before the program can run."""


# The machine or its network failed: a second try may succeed.
_MACHINE_ERRORS = (
  *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ETIMEDOUT),
  *(errno.ECONNRESET, errno.EHOSTDOWN, errno.ENOMEM, errno.ENFILE),
)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Turns a ValueError from the body, which only checks, into a SettingError.

  Libraries raise ValueErrors too when a file or another host is lost.
  """
  try:
    yield
  except ValueError as error:
    if isinstance(error, SettingError) or is_machine_failure(error):
      raise
    raise SettingError(str(error)) from error


@contextlib.contextmanager
def run_errors(action: str) -> Iterator[None]:
  """Turns a ValueError of a library, which no setting caused, into another."""
  try:
    yield
  except SettingError:
    raise
  except ValueError as error:
    raise RuntimeError(f"cannot {action}: {error}") from error


def is_machine_failure(error: BaseException | None) -> bool:
  """True if an I/O error caused the error, which no setting can repair."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
      return True
    error = error.__cause__
  return False


def require(holds: bool, name: str, value: Any, rule: str, remedy: str) -> None:
  """Raises a ValueError with the rule and the remedy unless the rule holds."""
  if not holds:
    remedy = f"; {remedy}" if remedy else ""
    raise ValueError(f"{name} ({value!r}) must {rule}{remedy}.")


def printable(text: str, *, keep: str = "") -> str:
  """The text with backslash escapes for control and format characters."""
  if text.isascii() and text.isprintable():
    return text
  # Many scripts need the joiners.
  keep += "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
  return "".join(
    character.encode("unicode_escape").decode("ascii")
    if character not in keep
    and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    else character
    for character in text
  )


def require_all(
  section: Any, prefix: str, *rules: tuple[str, bool, str, Any]
) -> None:
  """Checks rules of one section of the settings, or with prefix "" of all.

  A rule is a setting, whether it holds, its words, and a value that would do.
  """
  for name, holds, rule, value in rules:
    setting = f"{prefix}.{name}" if prefix else name
    current = operator.attrgetter(name)(section)
    require(holds, setting, current, rule, f"set {setting}={value}")


def one_of(choices: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
  """The metadata of a field that holds one or, as a tuple, more of these."""
  return {"choices": tuple(choices)}


def interval(bounds: str, example: Any) -> Mapping[str, Any]:
  """The metadata of a number in an interval such as "[0, 1)"."""
  return {"bounds": bounds, "example": example}


def at_least(bound: int) -> Mapping[str, Any]:
  """The metadata of a number with a lower bound."""
  return interval(f"[{bound}, inf)", max(bound, 1))


def describe_bounds(bounds: str) -> str:
  """An interval in words, as in "at least 0 and below 1"."""
  low, high = bounds[1:-1].split(", ")
  words = f"{'at least' if bounds[0] == '[' else 'above'} {low}"
  if high != "inf":
    words += f" and {'at most' if bounds[-1] == ']' else 'below'} {high}"
  return words


def check_fields(section: Any, prefix: str = "") -> None:
  """Checks the fields of a section that have metadata; None always passes."""
  for field in dataclasses.fields(section):
    name, value = field.name, getattr(section, field.name)
    name = f"{prefix}.{name}" if prefix else name
    if value is None:
      continue
    if bounds := field.metadata.get("bounds"):
      low, high = map(float, bounds[1:-1].split(", "))
      holds = low <= value if bounds[0] == "[" else low < value
      holds = holds and (value <= high if bounds[-1] == "]" else value < high)
      is_open = isinstance(value, float) and bounds.endswith("inf)")
      rule = f"be {describe_bounds(bounds)}{' and finite' if is_open else ''}"
      remedy = f"set {name}={field.metadata['example']}" if prefix else ""
      require(holds, name, value, rule, remedy)
    choices: Sequence[str] = field.metadata.get("choices", ())
    if choices and isinstance(value, tuple):
      holds = set(value) <= set(choices) and len(set(value)) == len(value)
      rule = f"be names of {', '.join(choices)}, each once"
      remedy = f"set {name}={choices}" if prefix else ""
      require(holds, name, value, rule, remedy)
    elif choices:
      require_one_of(name, value, choices)


def require_one_of(name: str, value: Any, choices: Sequence[str]) -> None:
  """Checks that a setting is one of its choices."""
  if value not in choices:
    # Only a question: a similar spelling may mean something else entirely.
    close = difflib.get_close_matches(str(value), choices, n=1)
    question = f"; did you mean {close[0]}?" if close else "."
    listed = ", ".join(choices)
    raise ValueError(f"{name} ({value!r}) must be one of {listed}{question}")
