"""A thread that writes files, so that no step waits for a disk."""

from collections.abc import Callable
from concurrent import futures
from typing import Any

from absl import logging


class Background:
  """Makes calls in a thread, one by one. Their errors never stop the run.

  Attributes:
    failures: The number of failed calls.
  """

  def __init__(self, files: str):
    """Starts the thread; warnings call what it writes `files`."""
    self._files, self.failures = files, 0
    self._thread = futures.ThreadPoolExecutor(max_workers=1)

  def submit(self, call: Callable[..., Any], *args: Any) -> None:
    """Queues a call."""
    self._thread.submit(self._call, call, *args)

  def flush(self) -> None:
    """Waits until all calls are made."""
    self._thread.submit(lambda: None).result()

  def close(self) -> None:
    """Waits until all calls are made and ends the thread."""
    self._thread.shutdown()

  def _call(self, call: Callable[..., Any], *args: Any) -> None:
    try:
      call(*args)
    except Exception as error:
      self.failures += 1
      if str(self.failures).strip("0") == "1":  # And at ten times the count.
        logging.warning(
          "%s are incomplete: %d writes failed, last: %r.",
          *(self._files, self.failures, error),
        )
