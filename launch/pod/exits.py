"""How `launch/tpu.sh` ends: a code for each kind of failure, and what next.

Codes of the program itself (0, 1, 64, 75, 76, 134) pass through `supervise`,
so those of the launcher's own stand apart, from 80 on.
"""

import enum

from data_pipelines.validation import ExitCode


class Exit(enum.IntEnum):
  """One code for each thing that a user would do something else about."""

  DONE = ExitCode.DONE
  BAD_REQUEST = ExitCode.BAD_INPUT
  QUOTA = 80
  NO_CAPACITY = 81
  FAILED = 82
  SUSPENDED = 83
  PREEMPTED = 84
  TIMEOUT = 85
  WORKER_UNREACHABLE = 86
  WORKER_FAILED = 87
  NETWORK = 88
  NOT_ALLOWED = 89
  ABSENT = 90
  NOT_OURS = 91
  BUSY = 92
  RESTARTS_SPENT = 93
  NO_GCLOUD = 94
  GCLOUD = 95
  NOT_SET_UP = 96
  INTERRUPTED = 130


NEXT_STEP = {
  Exit.BAD_REQUEST: "mend what the line above names, and start again.",
  Exit.QUOTA: "ask for more quota in the console (IAM & Admin, Quotas, TPU), or"
  " change ACCELERATOR_TYPE, ZONE or CAPACITY.",
  Exit.NO_CAPACITY: "set REQUEST=queued, which waits in line, or try another"
  " ZONE; `supervise` tries again by itself.",
  Exit.FAILED: "read the reason above, then `delete` and `create` again.",
  Exit.SUSPENDED: "the machines were taken away: `delete` and `create`, or let"
  " `supervise` do both.",
  Exit.PREEMPTED: "`delete`, `create`, `setup` and `run` again, with the same"
  " workdir; or let `supervise` do it.",
  Exit.TIMEOUT: "it may still come: start the same verb again with a larger"
  " --timeout, or `delete` to leave the queue.",
  Exit.WORKER_UNREACHABLE: "look at `status`. If the slice is READY, check the"
  " firewall (port 22) and SSH in the settings, and start the verb again.",
  Exit.WORKER_FAILED: "read what the worker said above, or `logs -w K`; once it"
  " is mended, start the verb again.",
  Exit.NETWORK: "check this machine's network and start the verb again: what"
  " runs on the slice goes on meanwhile.",
  Exit.NOT_ALLOWED: "log in with `gcloud auth login`, and check that PROJECT is"
  " right, its TPU API on, and your role there TPU Admin.",
  Exit.ABSENT: "`create` it first, or check NAME, ZONE and PROJECT.",
  Exit.NOT_OURS: "nothing was touched. Choose another NAME, or delete it"
  " yourself if it is yours.",
  Exit.BUSY: "`status` and `logs` show it; `stop` ends it, saving first.",
  Exit.RESTARTS_SPENT: "read `logs`: it does not get further by itself. Once it"
  " is mended, `supervise` again.",
  Exit.NO_GCLOUD: "install the Google Cloud CLI, and check that `gcloud"
  " version` works in this shell.",
  Exit.NOT_SET_UP: "`setup`, then `run`.",
  Exit.GCLOUD: "gcloud said why, above.",
  Exit.INTERRUPTED: "what was started on the slice goes on.",
}


class Failure(Exception):
  """Ends a verb.

  Attributes:
    exit: The kind, whose number the script exits with.
  """

  def __init__(self, kind: Exit, message: str):
    super().__init__(message)
    self.exit = kind
