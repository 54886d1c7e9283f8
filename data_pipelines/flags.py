"""How the commands of this package read their flags, and refuse bad ones."""

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags, logging

from data_pipelines.text import terminal
from data_pipelines.validation import ExitCode

# Characters of a reason, which may quote a file.
_MAX_LENGTH = 4_000


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
