"""TensorBoard's event files, written behind the run by a thread of their own.

Knows nothing of what is written: it is handed calls to make with a CLU writer.
CLU imports TensorFlow, which takes ten seconds and more: the thread does that
too, calls wait in a queue meanwhile, and training waits for neither.

References:
  CLU, https://github.com/google/CommonLoopUtils
"""

import pathlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import logging

_SECONDS_BETWEEN_REPORTS = 60.0


class EventFiles:
  """The event files in one folder. Trouble with them never stops the run.

  Attributes:
    failures: How many calls have failed so far.
  """

  def __init__(self, workdir: pathlib.Path, *, resume_step: int | None) -> None:
    """Starts the thread, which opens the files.

    Args:
      workdir: The folder, which is there.
      resume_step: What the files say of later steps no longer counts. None:
        the run starts anew, and files that are there are removed.
    """
    self._workdir = workdir
    self.failures = 0
    # Since the last report: how many, the first of them, and when that was.
    self._num_failures, self._first_error = 0, None
    self._reported = time.monotonic()
    # What the thread is to do; an `Event` to set once all before it is on disk;
    # None to end.
    self._queue: queue.SimpleQueue[
      Callable[[Any], None] | threading.Event | None
    ] = queue.SimpleQueue()
    self._thread = threading.Thread(
      target=self._run, args=(resume_step,), name="events", daemon=True
    )
    self._thread.start()

  def write(self, call: Callable[[Any], None]) -> None:
    """Has `call` made with the CLU writer, in its turn."""
    self._queue.put(call)
    if time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS:
      self._report()

  def flush(self) -> None:
    """Returns when all is on disk; logs what went wrong."""
    is_flushed = threading.Event()
    self._queue.put(is_flushed)
    is_flushed.wait()
    self._report()

  def close(self) -> None:
    """Flushes and ends the thread; nothing can be written after."""
    self._queue.put(None)
    self._thread.join()
    self._report()

  def _run(self, resume_step: int | None) -> None:
    events = self._attempt(_open_events, self._workdir, resume_step)
    while (item := self._queue.get()) is not None:
      if events is not None and not isinstance(item, threading.Event):
        self._attempt(item, events)
      # A kill should lose little, and a reader see what there is; but many
      # that waited for the import are one write.
      if events is not None and self._queue.empty():
        self._attempt(events.flush)
      if isinstance(item, threading.Event):
        item.set()
    if events is not None:
      self._attempt(events.close)

  def _attempt(self, call: Callable[..., Any], *args: Any) -> Any:
    try:
      return call(*args)
    except Exception as error:
      self.failures += 1
      self._num_failures += 1
      self._first_error = self._first_error or error
      return None

  def _report(self) -> None:
    count, error = self._num_failures, self._first_error
    self._num_failures, self._first_error = 0, None
    self._reported = time.monotonic()
    if count:
      logging.warning(
        "The event files in %s lack something: %d calls failed, first with %r.",
        self._workdir,
        count,
        error,
      )


def _open_events(workdir: pathlib.Path, resume_step: int | None) -> Any:
  """A CLU writer, beside what still counts of the files that are there."""
  from clu import metric_writers

  for path in sorted(workdir.glob("events.out.tfevents.*")):
    if resume_step is None:
      path.unlink()
    else:
      _rewind(path, resume_step)
  return metric_writers.SummaryWriter(str(workdir))


def _rewind(path: pathlib.Path, resume_step: int) -> None:
  """Leaves the whole events up to `resume_step` in the file.

  A session's START event would have the same said of TensorBoard's own server,
  but other readers do not heed it.
  """
  import tensorflow as tf

  # TensorBoard must not take the unfinished copy for an event file.
  beside = path.with_name("rewound.tmp")
  with path.open("rb") as file, beside.open("wb") as kept:
    # A record: its length in 8 bytes, 4 of checksum, content, 4 of checksum.
    while len(head := file.read(12)) == 12:
      length = int.from_bytes(head[:8], "little")
      body = file.read(length + 4)
      if len(body) < length + 4:
        break  # Torn by a kill.
      if tf.compat.v1.Event.FromString(body[:length]).step <= resume_step:
        kept.write(head + body)
  beside.replace(path)
