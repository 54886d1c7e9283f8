"""Ends a process that has stopped getting anywhere, and shows where it stood.

JAX's heartbeats notice a process that is gone or frozen. One that is alive but
waits for something that never comes, or turns in a circle, is noticed here.
"""

import faulthandler
import os
import pathlib
import threading
from collections.abc import Callable
from typing import NoReturn, Self

import jax
from absl import logging

from data_pipelines.validation import ExitCode

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Watchdog:
  """A thread that wants to hear of progress; use as a context manager."""

  def __init__(
    self,
    dump: pathlib.Path,
    *,
    seconds: float,
    start_seconds: float,
    report: Callable[[str], None],
  ):
    """Prepares the thread, which starts with the context.

    Args:
      dump: Where the stacks of all threads go, beside stderr.
      seconds: Without progress that are too many; 0 for never.
      start_seconds: The same until `started` is called.
      report: Told why the process ends, just before it does.
    """
    self._dump, self._report = dump, report
    self._seconds, self._allowed = seconds, start_seconds
    # Counted by the thread, so that the time of a process that was stopped and
    # goes on is not held against it.
    self._silence = 0.0
    self._is_done = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="watchdog", daemon=True
    )

  def mark(self) -> None:
    """Something was achieved."""
    self._silence = 0.0

  def end_startup(self) -> None:
    """From here on, with the first step done, less time is allowed."""
    self._allowed = self._seconds
    self.mark()

  def __enter__(self) -> Self:
    if self._seconds:
      jax.monitoring.register_event_duration_secs_listener(self._listen)
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._is_done.set()
    if self._thread.is_alive():
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      self.mark()

  def _watch(self) -> None:
    interval = min(self._seconds / 10, 1.0)
    while not self._is_done.wait(interval):
      # Also for this thread, which cannot run while another one holds the
      # interpreter: then Python itself dumps the stacks, and exits with 1.
      faulthandler.dump_traceback_later(2 * self._allowed, exit=True)
      self._silence += interval
      if self._silence > self._allowed:
        self._end()

  def _end(self) -> NoReturn:
    try:
      faulthandler.dump_traceback(all_threads=True)
      self._dump.parent.mkdir(parents=True, exist_ok=True)
      with self._dump.open("w") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
    except OSError as error:
      logging.error("The stacks could not be written: %s", error)
    try:
      self._report(
        f"no progress for more than the {self._allowed:g} s that "
        "distributed.watchdog_seconds and watchdog_start_seconds allow; the "
        f"stacks of all threads are above and in {self._dump}"
      )
    finally:
      os._exit(ExitCode.STUCK)
