"""How the commands of this package read their flags, and refuse bad ones."""

import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from data_pipelines.storage.paths import to_path
from data_pipelines.text import terminal
from data_pipelines.validation import ExitCode, SettingError

# Characters of a reason, which may quote a file.
_MAX_LENGTH = 4_000


def run(command: Callable[[Sequence[str]], None]) -> None:
  """Runs a command with its arguments; exits 64 on a user error."""

  def main(argv: Sequence[str]) -> None:
    try:
      command(argv[1:])
    except SettingError as error:
      refuse(error)

  app.run(main, flags_parser=parse)


def paths(*names: str) -> dict[str, str]:
  """The paths of those flags that are given; a ValueError for a bad one.

  Several of a bucket may stand in one flag, with commas between them.
  """
  given = {x: getattr(flags.FLAGS, x) for x in names if flags.FLAGS[x].present}
  parts = {x: re.split(",(?=gs://)", value) for x, value in given.items()}
  return {x: ",".join(str(to_path(x, y)) for y in parts[x]) for x in parts}


def print_text(text: str) -> None:
  """Prints a text; a reader that ends early, such as head, ends the program."""
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  print(text, end="")


def parse(argv: Sequence[str]) -> list[str]:
  """Reads the flags and returns the other words, for `app.run`.

  A flag that cannot be read ends the program with exit code 64.
  """
  terminal.set_up()
  # Ctrl-C ends the program without a traceback, unless it must be ignored, as
  # by a shell's background job.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    return flags.FLAGS(argv)
  except Exception as error:  # A config file may raise anything.
    flags.FLAGS.mark_as_parsed()
    refuse(f"{' '.join(str(error).split())}; see --help.")


def refuse(message: object) -> NoReturn:
  """Logs the reason, and ends the program with exit code 64."""
  logging.error("%s", str(message)[:_MAX_LENGTH])
  sys.exit(ExitCode.BAD_INPUT)
