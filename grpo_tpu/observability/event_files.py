"""TensorBoard's event files, written by a background thread.

CLU imports TensorFlow, which takes ten seconds or more. The thread does the
import too, and calls wait in a queue meanwhile, so training never waits. CLU's
own `AsyncWriter` would import it in the main thread, and raises errors there.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from concurrent import futures
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
    self._workdir, self.failures = workdir, 0
    self._events: Any = None
    self._thread = futures.ThreadPoolExecutor(max_workers=1)
    self._thread.submit(self._open, resume_step)

  def write(self, call: Callable[[Any], None]) -> None:
    """Queues a call, which the thread makes with the CLU writer."""
    self._thread.submit(self._call, call)

  def close(self) -> None:
    """Waits until everything is on disk and ends the thread."""
    self._thread.submit(self._call, lambda events: events.close())
    self._thread.shutdown()

  def _open(self, resume_step: int | None) -> None:
    with self._counted_errors():
      self._events = _open_events(self._workdir, resume_step)

  def _call(self, call: Callable[[Any], None]) -> None:
    if self._events is not None:
      with self._counted_errors():
        call(self._events)
        self._events.flush()  # A kill loses little.

  @contextlib.contextmanager
  def _counted_errors(self) -> Iterator[None]:
    try:
      yield
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
