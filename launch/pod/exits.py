"""Exit codes of `launch/tpu.sh`, each with advice for the user.

`supervise` also ends with the code of the run itself (0, 1, 64, 75, 76 or 134),
so the codes of the launcher start at 80.
"""

import contextlib
import enum
from collections.abc import Iterator

from data_pipelines.validation import ExitCode, printable


class Exit(enum.IntEnum):
  """An exit code."""

  next_step: str  # Advice, printed after the error.

  def __new__(cls, code: int, next_step: str = ""):
    """Makes a member of the number and the advice."""
    member = int.__new__(cls, code)
    member._value_ = code
    member.next_step = next_step
    return member

  DONE = ExitCode.DONE
  BAD_REQUEST = ExitCode.BAD_INPUT, "fix the setting named above and rerun."
  QUOTA = 80, "ask for quota, or change ACCELERATOR_TYPE, ZONE or CAPACITY."
  NO_CAPACITY = 81, "set REQUEST=queued, try another ZONE, or `supervise`."
  FAILED = 82, "read the reason above, then `delete` and `create` again."
  SUSPENDED = 83, "`delete` and `create`, or let `supervise` do both."
  PREEMPTED = 84, "`delete`, `create`, `setup` and `run`, or `supervise`."
  TIMEOUT = 85, "rerun with a larger --timeout, or `delete` to stop waiting."
  WORKER_UNREACHABLE = 86, "if `status` says ready, check port 22 and SSH."
  WORKER_FAILED = 87, "read the error above or `logs -w K`, fix it and rerun."
  NETWORK = 88, "check this machine's network and rerun; a run continues."
  NOT_ALLOWED = 89, "`gcloud auth login`; check PROJECT, TPU API and TPU Admin."
  ABSENT = 90, "`create` the slice first, or check NAME, ZONE and PROJECT."
  NOT_OURS = 91, "choose another NAME; if the slice is yours, delete it."
  BUSY = 92, "`status` and `logs` show the run; `stop` saves and ends it."
  RESTARTS_SPENT = 93, "read `logs`, fix the cause, and `supervise` again."
  NO_GCLOUD = 94, "install the Google Cloud CLI; `gcloud version` must work."
  GCLOUD = 95, "read the error of gcloud above."
  NOT_SET_UP = 96, "run `setup`, then `run`."
  UNAVAILABLE = 97, "wait a minute and rerun; `supervise` does so by itself."
  INTERRUPTED = 130, "a run on the slice continues."


class Failure(Exception):
  """An error of gcloud, of a slice or of a worker, which ends the verb.

  Nearly every function of the launcher can raise it.
  """

  def __init__(self, code: Exit, message: str):
    # Parts of it come from gcloud and from workers.
    super().__init__(printable(message, keep="\n"))
    self.exit = code


@contextlib.contextmanager
def ignore(code: Exit) -> Iterator[None]:
  """Ends the block without an error if it fails with this code."""
  try:
    yield
  except Failure as failure:
    if failure.exit != code:
      raise
