"""Says what a long step is at, so that nobody takes it for a hang.

Nothing is said of what is over soon. Like a log, this module serves the whole
process: the main thread notes what it does, and another thread says it at
intervals while `reporting`. The clock decides about words alone, never about
what is computed.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator, Sized

from absl import logging

_SECONDS_BETWEEN_LINES = 20.0


@dataclasses.dataclass
class Task:
  """Something that the main thread does, perhaps as a part of another task.

  Attributes:
    name: The name in the log, as in "rollout".
    total: The number of its parts; 0 if it has none.
    unit: The parts, as in "tokens".
    done: The number of parts that are done.
  """

  name: str
  total: int = 0
  unit: str = ""
  done: int = 0

  def __str__(self) -> str:
    """As in "rollout, 512 of 1024 tokens"."""
    parts = f", {self.done} of {self.total} {self.unit}" if self.total else ""
    return f"{self.name}{parts}"


# From the outermost task to the innermost.
_tasks: list[Task] = []
_said = 0.0


@contextlib.contextmanager
def doing(name: str, *, total: int = 0, unit: str = "") -> Iterator[Task]:
  """Notes a task for the time of the context."""
  global _said
  if not _tasks:
    _said = time.monotonic()
  task = Task(name, total, unit)
  _tasks.append(task)
  try:
    yield task
  finally:
    _tasks.remove(task)


def count_parts[Item](
  name: str, items: Iterable[Item], *, unit: str
) -> Iterator[Item]:
  """Yields the items, each a part of a task if their number is known."""
  total = len(items) if isinstance(items, Sized) else 0
  with doing(name, total=total, unit=unit) as task:
    for item in items:
      yield item
      task.done += 1


def advance() -> None:
  """Counts a part of the innermost task that has parts."""
  for task in reversed(_tasks):
    if task.total:
      task.done += 1
      return


@contextlib.contextmanager
def reporting(seconds: float = _SECONDS_BETWEEN_LINES) -> Iterator[None]:
  """Says what the process does if that lasts longer than `seconds`."""
  is_over = threading.Event()

  def report() -> None:
    global _said
    while not is_over.wait(min(seconds / 10, 1.0)):
      tasks = list(_tasks)
      if tasks and time.monotonic() - _said >= seconds:
        _said = time.monotonic()
        logging.info("%s", ": ".join(map(str, tasks)))

  thread = threading.Thread(target=report, name="activity", daemon=True)
  thread.start()
  try:
    yield
  finally:
    is_over.set()
    thread.join()
