"""TensorBoard's event files, written by a background thread.

CLU imports TensorFlow, which takes ten seconds or more. The thread does the
import too, and calls wait in a queue meanwhile, so training never waits. CLU's
own `AsyncWriter` would import it in the main thread, and raises errors there.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

from absl import logging

from grpo_tpu.observability import background

# A larger file is followed by a new one where files are copied whole.
_ROLLED_BYTES = 8 * 2**20
_PATTERN = "events.out.tfevents.*"


class EventFiles(background.Background):
  """The event files in one folder."""

  def __init__(self, workdir: pathlib.Path, *, resume_step: int | None) -> None:
    """Opens the files in the existing folder.

    Files that exist keep the steps up to `resume_step`; None removes the files.
    """
    super().__init__(f"TensorBoard files in {workdir}")
    self._workdir = workdir
    self._events: Any = None
    self.submit(self._open, resume_step)

  def write(self, call: Callable[[Any], None]) -> None:
    """Queues a call, which the thread makes with the CLU writer."""
    self.submit(self._write, call)

  def roll(self) -> None:
    """Begins a new file if the newest one is large."""
    self.write(self._roll)

  def close(self) -> None:
    """Waits until everything is on disk and ends the thread."""
    self.write(lambda events: events.close())
    super().close()

  def _open(self, resume_step: int | None) -> None:
    self._events = _open_events(self._workdir, resume_step)

  def _roll(self, events: Any) -> None:
    files = [path.stat() for path in self._workdir.glob(_PATTERN)]
    newest = max(files, key=lambda status: status.st_mtime_ns)
    if newest.st_size > _ROLLED_BYTES:
      events.close()
      self._events = _make_writer(self._workdir)

  def _write(self, call: Callable[[Any], None]) -> None:
    if self._events is not None:
      call(self._events)
      self._events.flush()  # A kill loses little.


def _open_events(workdir: pathlib.Path, resume_step: int | None) -> Any:
  """Makes a CLU writer, after the files that exist are rewound or removed."""
  for path in sorted(workdir.glob(_PATTERN)):
    try:
      if resume_step is None:
        path.unlink()
      else:
        _rewind(path, resume_step)
    except OSError as error:  # The new file does not depend on the old ones.
      logging.warning("%s stays as it is: %s", path, error)
  return _make_writer(workdir)


def _make_writer(workdir: pathlib.Path) -> Any:
  from clu import metric_writers

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
