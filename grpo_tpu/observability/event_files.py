"""TensorBoard's event files, written by a background thread.

CLU imports TensorFlow, which takes ten seconds or more. The thread does the
import too, and calls wait in a queue meanwhile, so training never waits. CLU's
own `AsyncWriter` would import it in the main thread, and raises errors there.

References:
  CLU, https://github.com/google/CommonLoopUtils
"""

import contextlib
import pathlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from absl import logging


class EventFiles:
  """The event files in one folder. An error in them never stops the run.

  Attributes:
    failures: The number of failed calls.
  """

  def __init__(self, workdir: pathlib.Path, *, resume_step: int | None) -> None:
    """Starts the thread, which opens the files in the existing folder.

    Files that exist keep the steps up to `resume_step`; None removes the files.
    """
    self._workdir = workdir
    self.failures = 0
    # Holds calls to make, and None to end.
    self._queue: queue.SimpleQueue[Callable[[Any], None] | None] = (
      queue.SimpleQueue()
    )
    self._thread = threading.Thread(
      target=self._run, args=(resume_step,), name="events", daemon=True
    )
    self._thread.start()

  def write(self, call: Callable[[Any], None]) -> None:
    """Queues a call, which the thread makes with the CLU writer."""
    self._queue.put(call)

  def close(self) -> None:
    """Waits until everything is on disk and ends the thread."""
    self._queue.put(None)
    self._thread.join()

  def _run(self, resume_step: int | None) -> None:
    events = self._attempt(_open_events, self._workdir, resume_step)
    while (call := self._queue.get()) is not None:
      if events is not None:
        self._attempt(call, events)
        # A flush per step loses little in a kill; the calls that waited for
        # the import share one.
        if self._queue.empty():
          self._attempt(events.flush)
    if events is not None:
      self._attempt(events.close)

  def _attempt(self, call: Callable[..., Any], *args: Any) -> Any:
    try:
      return call(*args)
    except Exception as error:
      self.failures += 1
      if str(self.failures).strip("0") == "1":  # And at ten times the count.
        logging.warning(
          "TensorBoard files in %s are incomplete: %d writes failed, last: %r.",
          *(self._workdir, self.failures, error),
        )


def _open_events(workdir: pathlib.Path, resume_step: int | None) -> Any:
  """Makes a CLU writer, after the files that exist are rewound or removed."""
  from clu import metric_writers

  for path in sorted(workdir.glob("events.out.tfevents.*")):
    try:
      if resume_step is None:
        path.unlink()
      else:
        _rewind(path, resume_step)
    except OSError as error:  # The new file does not depend on the old ones.
      logging.warning("%s stays as it is: %s", path, error)
  return metric_writers.SummaryWriter(str(workdir))


def _rewind(path: pathlib.Path, resume_step: int) -> None:
  """Keeps the events up to `resume_step` that lie before the first bad record.

  A session's START event would hide the others from TensorBoard's own server,
  but not from other readers.
  """
  import tensorflow as tf
  from google.protobuf import message
  from tensorboard.backend.event_processing import event_file_loader

  if not path.is_file():
    raise OSError("it is no regular file")
  # TensorBoard must not take the unfinished copy for an event file.
  temporary = path.with_name("rewound.tmp")
  end, num_bytes = 0, path.stat().st_size
  reader = event_file_loader.RawEventFileLoader(str(path))
  with (
    tf.io.TFRecordWriter(str(temporary)) as kept,
    contextlib.suppress(message.DecodeError),
  ):
    for content in reader.Load():
      if tf.compat.v1.Event.FromString(content).step <= resume_step:
        kept.write(content)
      end += len(content) + 16  # The length, and two checksums.
  if end < num_bytes:
    logging.warning(
      "%s: removed the last %d bytes, which a kill or a crash has damaged.",
      *(path, num_bytes - end),
    )
  temporary.replace(path)
