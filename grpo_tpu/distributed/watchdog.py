"""Ends a process that makes no progress, and dumps its stacks.

JAX's heartbeats notice a process that is gone or frozen. The watchdog notices
a process that is alive but waits for ever or loops without end.
"""

import faulthandler
import os
import pathlib
import threading
from collections.abc import Callable
from typing import NoReturn, Self

from absl import logging

from data_pipelines.validation import ExitCode
from grpo_tpu.distributed import compile_cache


class Watchdog:
  """A thread that waits for signs of progress; use as a context manager."""

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
      dump: The file for the stacks of all threads, which go to stderr as well.
      seconds: How long the process may make no progress; 0 for any time.
      start_seconds: The same limit until `end_startup` is called.
      report: Called with the reason just before the process ends.
    """
    self._dump, self._report = dump, report
    self._seconds, self._allowed = seconds, start_seconds
    # Counted by the thread, because the time during which the process was
    # suspended must not count.
    self._silence = 0.0
    self._is_done = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="watchdog", daemon=True
    )

  def mark(self) -> None:
    """Records progress."""
    self._silence = 0.0

  def end_startup(self) -> None:
    """Applies the limit of `seconds` from now on: the first step is done."""
    self._allowed = self._seconds
    self.mark()

  def __enter__(self) -> Self:
    if self._seconds:
      compile_cache.on_compile(lambda _: self.mark())
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._is_done.set()
    if self._thread.is_alive():
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    interval = min(self._seconds / 10, 1.0)
    while not self._is_done.wait(interval):
      # This thread cannot run while another one holds the interpreter. Then
      # Python itself dumps the stacks and exits with 1.
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
