"""Lease on a folder in a bucket, so that one run at a time writes to it.

The holder writes an object again and again, each time on condition that nobody
else has. Who finds it unchanged for the time of a lease takes it over, on the
same condition; no clocks of two machines are compared. A holder that stood
still for so long ends as soon as it notices, and writes no more.
"""

import contextlib
import os
import socket
import threading
import time
import uuid

import tensorstore as ts
from absl import logging
from etils import epath

from data_pipelines.text import untrusted
from data_pipelines.validation import ExitCode
from grpo_tpu.distributed import initialize

# A dead holder is followed after a lease; who waits longer has a living one.
_RENEWAL_SECONDS, _LEASE_SECONDS, _PATIENCE_SECONDS = 10.0, 40.0, 60.0
# The client's own attempts at a request, for three quarters of a minute.
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}
# Counts the time that a machine sleeps, where the system can tell it.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Lease:
  """A lease on `directory`, held from `acquire` to `release`."""

  def __init__(self, directory: epath.Path):
    self._path = f"{directory}/lease"
    name = f"process {os.getpid()} of {socket.gethostname()}"
    self._content = f"{name}\n{uuid.uuid4()}\n".encode()
    self._is_over, self._one_thread = threading.Event(), threading.Lock()
    # The version of the object, and when it was known to be the newest.
    self._version, self._time = b"", 0.0

  def acquire(self) -> None:
    """Takes the lease; waits up to a minute for another holder.

    Raises:
      OSError: Another process keeps the lease.
      ValueError: The bucket refuses, or does not answer.
    """
    context = ts.Context({"gcs_request_retries": _RETRIES})
    self._store = ts.KvStore.open(self._path, context=context).result()
    start, seen, since = _now(), b"", 0.0
    while True:
      found, now = self._store.read("").result(), _now()
      if found.stamp.generation != seen:
        seen, since = found.stamp.generation, now
      is_free = found.state == "missing" or now - since >= _LEASE_SECONDS
      if is_free and self._write(seen):
        break
      holder = untrusted.shorten(found.value.partition(b"\n")[0].decode())
      if now - start >= _PATIENCE_SECONDS:
        raise OSError(
          f"{holder} is writing there: end that run, or use another workdir"
        )
      text = "Waiting up to a minute for %s, which %s may still hold."
      logging.log_every_n_seconds(logging.WARNING, text, 60, self._path, holder)
      time.sleep(0.5)
    threading.Thread(target=self._renew, name="lease", daemon=True).start()

  def check(self) -> None:
    """Ends the process if another run has taken the lease from it.

    Raises:
      ValueError: The bucket does not answer.
    """
    with self._one_thread:
      is_held = bool(self._version) and not self._is_over.is_set()
      is_recent = _now() - self._time < _RENEWAL_SECONDS
      if not is_held or is_recent or self._write(self._version):
        return
      logging.error(
        "Another run has taken %s while this process stood still or was cut "
        "off from the bucket. This run ends now and leaves the workdir to it.",
        self._path,
      )
      initialize.shutdown(ExitCode.FAILED)

  def release(self) -> None:
    """Releases the lease, so that the next run need not wait."""
    with self._one_thread:
      self._is_over.set()
      if self._version:
        with contextlib.suppress(ValueError):  # It runs out by itself.
          self._store.write("", None, if_equal=self._version).result()

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
