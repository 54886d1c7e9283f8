"""A folder that one program at a time may write to.

The lock is the kernel's and goes with the process that holds it, however that
ends, so there is no stale one to clear away. Where a file system has no locks,
as object stores have none, nothing is checked.
"""

import fcntl
import os
import socket
import time

from absl import logging
from etils import epath

# A killed host's lock on a network file system lasts until its lease ends.
_PATIENCE_SECONDS = 120


class Lock:
  """A lock on `folder`, held from `acquire` to `release`."""

  def __init__(self, folder: epath.Path):
    self._path = folder / "lock"
    self._file = None

  def acquire(self) -> None:
    """Waits a little for whoever holds it.

    Raises:
      OSError: It is held on; or the folder cannot be written.
    """
    if "://" in os.fspath(self._path):
      return
    file = open(self._path, "a+")
    deadline = time.monotonic() + _PATIENCE_SECONDS
    is_waiting = False
    while not (is_held := _try(file)) and time.monotonic() < deadline:
      if not is_waiting:
        is_waiting = True
        logging.warning("Waiting for %s, which another run holds.", self._path)
      time.sleep(0.1)
    file.seek(0)
    if not is_held:
      holder = file.read().strip() or "another program"
      file.close()
      raise OSError(
        f"{holder} is writing there: end that run, or name another workdir"
      )
    file.truncate()
    file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    file.flush()
    self._file = file

  def release(self) -> None:
    """Lets the next one have it."""
    if self._file is not None:
      self._file.close()
      self._file = None


def _try(file) -> bool:
  """Whether it is held now, or its file system knows no locks."""
  try:
    # By process, unlike `flock`: a forked worker does not inherit it.
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError):
    return False
  except OSError as error:
    logging.warning("%s cannot be locked: %s.", file.name, error)
  return True
