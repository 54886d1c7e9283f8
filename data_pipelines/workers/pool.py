"""Worker processes for calls that may hang, crash or answer nonsense.

Each worker has its own thread and its own connection, so a fault is always that
of exactly one call. docs/adr/0005-a-pipe-for-each-reward-worker.md says why no
library does this.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from absl import logging

from data_pipelines.text import untrusted
from data_pipelines.validation import printable
from data_pipelines.workers import functions
from data_pipelines.workers.process import Process

# Time for Python to start and to import the users' modules.
_START_SECONDS = 120.0
_SET_UP_SECONDS = 600.0
_MAX_ERROR_CHARACTERS = 1000
_OPEN_POOLS: "weakref.WeakSet[Pool]" = weakref.WeakSet()

# A function's path and its arguments.
type Task = tuple[str, tuple]
# Raises a ValueError for a result that its caller cannot use.
type Check = Callable[[Any], None]


class Pool:
  """Calls functions in `num_workers` processes, which start when needed."""

  def __init__(
    self,
    paths: Sequence[str],
    *,
    num_workers: int,
    timeout_seconds: float,
    memory_gib: float,
    set_up: Task | None = None,
  ):
    """Creates the pool without starting a process.

    Each worker first imports the functions at `paths`, then calls `set_up`. The
    limits are those of a call; a set-up has 10 minutes. With 0 workers, calls
    run in this process, without set-up and limits.
    """
    limits = (timeout_seconds, memory_gib, set_up)
    self._workers = [_Worker(tuple(paths), *limits) for _ in range(num_workers)]
    # The last to finish is the next to work: others need not start.
    self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
    for worker in self._workers:
      self._idle.put(worker)
    self._threads = futures.ThreadPoolExecutor(num_workers or 1)
    self.is_closed = False
    _OPEN_POOLS.add(self)

  def submit(
    self, path: str, *arguments: Any, check: Check = lambda _: None
  ) -> futures.Future[Any]:
    """Starts a call of one of the pool's functions, with JSON's values.

    The future is of the result, a JSON value, or of a `functions.Failure` if
    the function raised, was killed, ended its process, or if `check` raised a
    ValueError for the result, whose worker is then replaced. The future raises
    RuntimeError if no worker can be started.
    """
    if self._workers:
      return self._threads.submit(self._call, (path, arguments), check)
    result = functions.call(functions.resolve(path), arguments)
    try:
      if not isinstance(result, functions.Failure):
        check(result)
    except ValueError as error:
      result = functions.Failure(str(error))
    done: futures.Future[Any] = futures.Future()
    done.set_result(result)
    return done

  def _call(self, task: Task, check: Check) -> Any:
    worker = self._idle.get()
    try:
      return worker.call(task, check)
    finally:
      self._idle.put(worker)

  def close(self) -> None:
    """Kills every process, also a busy one, and waits for their ends."""
    self.is_closed = True
    _OPEN_POOLS.discard(self)
    self._threads.shutdown(wait=False, cancel_futures=True)
    for worker in self._workers:
      worker.close()
    self._threads.shutdown(wait=True)
    for worker in self._workers:
      worker.end()


def close_all() -> None:
  """Closes every pool of this process, for a program that ends at once."""
  for each in tuple(_OPEN_POOLS):
    each.close()


class _Worker:
  """One process at a time. Calls come from one thread at a time."""

  def __init__(
    self,
    paths: tuple[str, ...],
    timeout_seconds: float,
    memory_gib: float,
    set_up: Task | None,
  ):
    self._paths, self._memory_gib, self._set_up = paths, memory_gib, set_up
    self._timeout_seconds = timeout_seconds
    self._lock = threading.Lock()
    self._process: Process | None = None
    self._is_closed = False

  def call(self, task: Task, check: Check) -> Any:
    """Runs one call; kills the process unless it answers as it should."""
    process = self._process
    if process is not None and not process.is_idle():
      logging.warning("A worker %s between two calls.", self.end())
      process = None
    process = process or self._start()
    result = self._exchange(process, task, self._timeout_seconds, check)
    if not isinstance(result, functions.Failure):
      return result
    if result.reason.partition(":")[0].endswith("MemoryError"):
      self.end()  # What it still holds may leave no room for the next call.
      limit = f" (a worker may take {self._memory_gib:g} GiB)"
      result = functions.Failure(result.reason + limit)
    return result

  def _exchange(
    self, process: Process, message: Any, seconds: float, check: Check
  ) -> Any:
    """The result of a call; ends the process if it is at fault."""
    try:
      answer = process.exchange(message, timeout_seconds=seconds)
      if "error" in answer:
        error = untrusted.get_field(answer, "error", str, "its answer")
        process.log_output()
        return functions.Failure(printable(error[:_MAX_ERROR_CHARACTERS]))
      result = answer.get("result")
      check(result)
      process.log_output()
      return result
    except TimeoutError:
      reason = f"it took longer than {seconds:g} seconds"
      self.end()
    except (EOFError, OSError):
      reason = f"its process {self.end()}"
    except (ValueError, RecursionError) as error:
      reason = printable(str(error)[:_MAX_ERROR_CHARACTERS]).rstrip(".")
      self.end()
    return functions.Failure(reason)

  def _start(self) -> Process:
    with self._lock:
      if self._is_closed:
        raise RuntimeError("the pool is closed, so it starts no worker.")
      try:
        self._process = process = Process()
      except OSError as error:
        raise RuntimeError(f"a worker cannot be started: {error}.") from error
    message = (self._paths, int(self._memory_gib * 2**30))
    result = self._exchange(process, message, _START_SECONDS, lambda _: None)
    if self._set_up and not isinstance(result, functions.Failure):
      message = self._set_up
      result = self._exchange(process, message, _SET_UP_SECONDS, lambda _: None)
    if not isinstance(result, functions.Failure):
      return process
    self.end()
    raise RuntimeError(
      f"a worker for {self._paths} cannot be started: {result.reason}."
    )

  def end(self) -> str:
    """Kills the process, if there is one, and says how it ended."""
    with self._lock:
      process, self._process = self._process, None
    if process is None:
      return "has ended"
    how = process.kill()
    process.log_output()
    process.close()
    return how

  def close(self) -> None:
    """Kills the process for good; a running call then fails."""
    with self._lock:
      self._is_closed = True
      if self._process is not None:
        # The connection stays open: another thread may be waiting on it.
        self._process.kill()
