"""Lease on a folder in a bucket, so that one run at a time writes to it.

The holder writes an object again and again, each time on condition that nobody
else has. Who finds it unchanged for the time of a lease takes it over, on the
same condition. So a killed run blocks the next one for less than a minute, and
no two clocks are compared.

A holder that stood still for so long, on a laptop that slept for example, may
find another one in its place. It ends at once and writes nothing more.
"""

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

_NAME = "lease"
_RENEWAL_SECONDS = 10.0
_LEASE_SECONDS = 40.0
# Of a newcomer, after which the holder is known to be alive.
_PATIENCE_SECONDS = 60.0
# The client's own attempts at a request, for three quarters of a minute.
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}
# Counts the time that a machine sleeps, where the system can tell it.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Lease:
  """A lease on `directory`, held from `acquire` to `release`."""

  def __init__(self, directory: epath.Path):
    self._path = directory / _NAME
    name = f"process {os.getpid()} of {socket.gethostname()}"
    self._content = f"{name}\n{uuid.uuid4()}\n".encode()
    self._is_over = threading.Event()
    self._one_thread = threading.Lock()
    self._generation = b""

  def acquire(self) -> None:
    """Takes the lease; waits up to a minute for another holder.

    Raises:
      OSError: Another process keeps the lease.
      ValueError: The bucket refuses, or does not answer.
    """
    context = ts.Context({"gcs_request_retries": _RETRIES})
    store = ts.KvStore.open(f"{self._path.parent}/", context=context)
    self._store = store.result()
    start, seen, since = _now(), b"", 0.0
    while True:
      found, now = self._store.read(_NAME).result(), _now()
      if found.stamp.generation != seen:
        seen, since = found.stamp.generation, now
      is_free = found.state == "missing" or now - since >= _LEASE_SECONDS
      if is_free and self._write(seen):
        break
      holder = untrusted.shorten(found.value.decode(errors="replace")[:200])
      if now - start >= _PATIENCE_SECONDS:
        raise OSError(
          f"{holder} is writing there: end that run, or use another workdir"
        )
      text = "Waits up to %d s for %s, unless that run has been killed: %s"
      seconds = _PATIENCE_SECONDS - (now - start)
      values = seconds, self._path, holder
      logging.log_every_n_seconds(logging.WARNING, text, 15, *values)
      time.sleep(0.5)
    threading.Thread(target=self._renew, name="lease", daemon=True).start()

  def check(self) -> None:
    """Returns if this process surely holds the lease; else ends the process.

    Raises:
      ValueError: The bucket does not answer.
    """
    with self._one_thread:
      is_recent = _now() - self._renewed < _RENEWAL_SECONDS
      if self._is_over.is_set() or is_recent or self._write(self._generation):
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
      try:
        if self._generation:
          write = self._store.write(_NAME, None, if_equal=self._generation)
          write.result()
      except ValueError as error:
        logging.warning("%s stays until it runs out: %s", self._path, error)

  def _renew(self) -> None:
    while not self._is_over.wait(1.0):
      try:
        self.check()
      except ValueError as error:
        text = "%s could not be renewed: %s"
        values = self._path, error
        logging.log_every_n_seconds(logging.WARNING, text, 60, *values)

  def _write(self, generation: bytes) -> bool:
    """Writes the object if it has this generation; returns True if it is ours.

    If the answer was lost, it has another one although we wrote it.
    """
    start = _now()
    write = self._store.write(_NAME, self._content, if_equal=generation)
    written = write.result().generation
    if not written:
      found = self._store.read(_NAME).result()
      if found.value != self._content:
        return False
      written = found.stamp.generation
    self._generation, self._renewed = written, start
    return True


def _now() -> float:
  return time.clock_gettime(_CLOCK)
