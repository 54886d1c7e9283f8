"""Locks on a directory, so that one run at a time writes to it.

On a disk, the kernel releases the lock when its process ends, however it ends.
The `filelock` package does not fit: its `flock` is inherited by forked workers,
which would keep the lock of a killed run.

In a bucket, the holder of a lease writes an object again and again, each time
on condition that nobody else has. Who finds it unchanged for the time of a
lease takes it over, on the same condition; no clocks of two machines are
compared. A holder that stood still for so long ends as soon as it notices.
"""

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from typing import IO

import tensorstore as ts
from absl import logging
from etils import epath

from data_pipelines.text import untrusted
from data_pipelines.validation import ExitCode
from grpo_tpu.distributed import initialize

_RENEWAL_SECONDS, _LEASE_SECONDS = 10.0, 40.0
# The client's own attempts at a request, for three quarters of a minute.
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}
# Counts the time that a machine sleeps, where the system can tell it.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class DirectoryLock:
  """A lock on `directory`, held from `acquire` to `release`."""

  # A network file system keeps a killed host's lock for a while.
  _patience_seconds = 120.0

  def __init__(self, directory: epath.Path):
    self._path, self._holder = f"{directory}/lock", ""
    self._name = f"process {os.getpid()} of {socket.gethostname()}\n"
    self._file: IO[str] | None = None

  def acquire(self) -> None:
    """Takes the lock; waits a minute or two for another holder.

    Raises:
      OSError: Another process keeps the lock, or the directory is not writable.
      ValueError: The bucket refuses, or does not answer.
    """
    end = _now() + self._patience_seconds
    while not self._try_lock():
      if _now() >= end:
        raise OSError(
          f"{self._holder} is writing there: end that run, or use another "
          "workdir"
        )
      text = f"Waiting for {self._path}, which {self._holder} may still hold."
      logging.log_every_n_seconds(logging.WARNING, "%s", 60, text)
      time.sleep(0.5)

  def check(self) -> None:
    """Ends the process if another run has taken the lock from it.

    Raises:
      ValueError: The bucket does not answer.
    """

  def release(self) -> None:
    """Releases the lock, so that the next run need not wait."""
    if self._file is not None:
      self._file.close()

  def _try_lock(self) -> bool:
    """Takes the lock, or returns False and sets `_holder`."""
    file = open(self._path, "a+")
    try:
      # `lockf` locks by process, unlike `flock`: forked workers do not inherit.
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      file.seek(0)
      self._holder = file.read().strip() or "another program"
      file.close()
      return False
    except OSError as error:
      # This file system has no locks; the run goes unprotected.
      logging.warning("%s cannot be locked: %s.", self._path, error)
    file.truncate(0)
    file.write(self._name)
    file.flush()
    self._file = file
    return True


class Lease(DirectoryLock):
  """A lock on a folder in a bucket."""

  # A dead holder is followed after a lease; who waits longer has a living one.
  _patience_seconds = 60.0

  def __init__(self, directory: epath.Path):
    super().__init__(directory)
    self._path = f"{directory}/lease"
    context = ts.Context({"gcs_request_retries": _RETRIES})
    self._store = ts.KvStore.open(self._path, context=context).result()
    self._content = f"{self._name}{uuid.uuid4()}\n".encode()
    self._is_over, self._one_thread = threading.Event(), threading.Lock()
    # The version of our object, and when it was known to be the newest.
    self._version, self._time = b"", 0.0
    self._seen, self._since = b"", 0.0  # As much of that of another holder.

  def check(self) -> None:
    """Writes the object again, now and then."""
    with self._one_thread:
      is_held = bool(self._version) and not self._is_over.is_set()
      is_recent = _now() - self._time < _RENEWAL_SECONDS
      if is_held and not is_recent and not self._write(self._version):
        logging.error(
          "Another run has taken %s while this process stood still or was cut "
          "off from the bucket. This run leaves the workdir to it.",
          self._path,
        )
        initialize.shutdown(ExitCode.FAILED)

  def release(self) -> None:
    """Removes the object."""
    with self._one_thread:
      self._is_over.set()
      if self._version:
        with contextlib.suppress(ValueError):  # It runs out by itself.
          self._store.write("", None, if_equal=self._version).result()

  def _try_lock(self) -> bool:
    found, now = self._store.read("").result(), _now()
    if found.stamp.generation != self._seen:
      self._seen, self._since = found.stamp.generation, now
    is_free = found.state == "missing" or now - self._since >= _LEASE_SECONDS
    if is_free and self._write(self._seen):
      threading.Thread(target=self._renew, name="lease", daemon=True).start()
      return True
    holder = found.value.partition(b"\n")[0].decode(errors="replace")
    self._holder = untrusted.shorten(holder)
    return False

  def _renew(self) -> None:
    while not self._is_over.wait(1.0):
      with contextlib.suppress(ValueError):  # The bucket is away.
        self.check()

  def _write(self, version: bytes) -> bool:
    """Writes the object if it has this version; returns True if it is ours.

    If the answer was lost, it has another version although we wrote it.
    """
    now = _now()
    write = self._store.write("", self._content, if_equal=version)
    if not (written := write.result().generation):
      found = self._store.read("").result()
      if found.value != self._content:
        return False
      written = found.stamp.generation
    self._version, self._time = written, now
    return True


def _now() -> float:
  return time.clock_gettime(_CLOCK)
