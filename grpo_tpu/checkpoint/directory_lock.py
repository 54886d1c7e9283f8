"""Lock on a directory, so that one run at a time writes to it.

The kernel releases the lock when its process ends, however the process ends, so
a stale lock cannot exist. A bucket has no locks, but a `Lease`.

The `filelock` package does not fit: its `flock` is inherited by forked workers,
which would keep the lock of a killed run.
"""

import fcntl
import os
import socket
import time

from absl import logging
from etils import epath

# A network file system keeps a killed host's lock until the lease expires.
_PATIENCE_SECONDS = 120


class DirectoryLock:
  """A lock on `directory`, held from `acquire` to `release`."""

  def __init__(self, directory: epath.Path):
    self._path = directory / "lock"
    self._file = None

  def acquire(self) -> None:
    """Takes the lock; waits up to two minutes for another holder.

    Raises:
      OSError: Another process keeps the lock, or the directory is not writable.
    """
    file = open(self._path, "a+")
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (is_held := _try_lock(file)) and time.monotonic() < deadline:
      text = "Waiting for %s, which another run holds."
      logging.log_every_n_seconds(logging.WARNING, text, 60, self._path)
      time.sleep(0.1)
    file.seek(0)
    if not is_held:
      holder = file.read().strip() or "another program"
      file.close()
      raise OSError(
        f"{holder} is writing there: end that run, or use another workdir"
      )
    file.truncate()
    file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    file.flush()
    self._file = file

  def check(self) -> None:
    """Does nothing: nobody can take the lock away."""

  def release(self) -> None:
    """Releases the lock."""
    if self._file is not None:
      self._file.close()
      self._file = None


def _try_lock(file) -> bool:
  """Returns False if another process holds the lock."""
  try:
    # `lockf` locks by process, unlike `flock`: forked workers do not inherit.
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError):
    return False
  except OSError as error:
    # This file system has no locks; the run goes unprotected.
    logging.warning("%s cannot be locked: %s.", file.name, error)
  return True
