"""TensorBoard's event files, written by a background thread."""

import pathlib
from collections.abc import Callable
from typing import Any

from absl import logging

from grpo_tpu.observability import background, event_writer

# A larger file is followed by a new one where files are copied whole.
_ROLLED_BYTES = 8 * 2**20


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
    """Queues a call, which the thread makes with the writer."""
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
    if events.num_bytes > _ROLLED_BYTES:
      events.close()
      self._events = event_writer.EventWriter(self._workdir)

  def _write(self, call: Callable[[Any], None]) -> None:
    if self._events is not None:
      call(self._events)


def _open_events(workdir: pathlib.Path, resume_step: int | None) -> Any:
  """Opens a new file, after those that exist are rewound or removed."""
  for path in sorted(workdir.glob(event_writer.PATTERN)):
    try:
      if resume_step is None:
        path.unlink()
      else:
        event_writer.rewind(path, resume_step)
    except OSError as error:  # The new file does not depend on the old ones.
      logging.warning("%s stays as it is: %s", path, error)
  return event_writer.EventWriter(workdir)
