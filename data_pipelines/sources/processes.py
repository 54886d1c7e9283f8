"""Maps a function over batches of records on all cores, in order.

Only a few batches are in memory. A process that dies or hangs costs the one
record that it dies of.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent import futures
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

# The time for a batch; each record alone is known to take less than a tenth.
_PATIENCE_SECONDS = 300.0


def count_cores() -> int:
  """The cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def map_in_order[T, R](
  function: Callable[[Sequence[T]], list[R]],
  batches: Iterable[Sequence[T]],
  *,
  num_workers: int,
  lost: Callable[[T, str], R],
) -> Generator[R, None, None]:
  """The results of a picklable function, record by record.

  An exception of the function ends the iteration. `lost` gives the result of a
  record whose process died or hung. With 0 workers all is done in this process.
  The iteration must be closed, as by `contextlib.closing`, or ended.
  """
  if not num_workers:
    for batch in batches:
      yield from function(batch)
    return
  pending: collections.deque[futures.Future[list[R]]] = collections.deque()
  workers = _Workers(function, num_workers, lost)
  with contextlib.closing(workers):
    for batch in batches:
      pending.append(workers.threads.submit(workers.call, batch))
      if len(pending) > 2 * num_workers:
        yield from pending.popleft().result()
    while pending:
      yield from pending.popleft().result()


class _Workers:
  """Threads of this process, each with a process that it waits for."""

  def __init__(self, function: Any, num_workers: int, lost: Any):
    self._function, self._lost = function, lost
    self.threads = futures.ThreadPoolExecutor(num_workers)
    self._own = threading.local()
    self._all: set[_Worker] = set()
    self._lock, self._is_closed = threading.Lock(), False

  def call(self, batch: Sequence[Any]) -> list[Any]:
    how = self._exchange(batch)
    if not isinstance(how, str):
      return how
    # One of these records is to blame: each gets a process of its own.
    results = []
    for record in batch:
      how = self._exchange([record])
      if isinstance(how, str):
        results.append(self._lost(record, how))
      else:
        results += how
        self._end(self._own.worker)
    return results

  def _exchange(self, batch: Sequence[Any]) -> Any:
    """The results of the thread's process, or how it ended."""
    worker = getattr(self._own, "worker", None)
    if worker not in self._all:
      with self._lock:
        if self._is_closed:
          raise futures.CancelledError
        self._own.worker = worker = _Worker(self._function)
        self._all.add(worker)
      if how := worker.receive():
        raise RuntimeError(
          f"a process that reads records cannot start: it {how}."
        )
    result = worker.exchange(batch)
    if isinstance(result, str):
      self._end(worker)
    return result

  def _end(self, worker: "_Worker") -> None:
    with self._lock:
      self._all.discard(worker)
    worker.end()

  def close(self) -> None:
    """Kills every process; a running call then ends."""
    with self._lock:
      self._is_closed = True
      for worker in self._all:
        worker.process.kill()
    self.threads.shutdown(cancel_futures=True)
    for worker in self._all:
      worker.end()


class _Worker:
  """A process that calls a function on each batch that it receives.

  At first it sends None, once its imports are done.
  """

  def __init__(self, function: Callable[[Sequence[Any]], list[Any]]):
    context = multiprocessing.get_context("forkserver")
    # What every worker imports is imported once. The main module, which may be
    # large, is not among it.
    context.set_forkserver_preload([function.__module__])
    self._connection, theirs = context.Pipe()
    self.process = context.Process(
      target=_serve, args=(theirs, function), daemon=True
    )
    # Ctrl-C reaches the whole group; only this process must act on it. Starting
    # the tracker of resources unblocks it, so that comes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
      self.process.start()
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
      theirs.close()

  def exchange(self, batch: Sequence[Any]) -> Any:
    """The results for a batch, or how the process failed, in words."""
    with contextlib.suppress(OSError):  # `receive` says what happened.
      self._connection.send(batch)
    result = self.receive()
    if isinstance(result, Exception):
      raise result
    return result

  def receive(self) -> Any:
    """The next message of the process, or how it failed, in words."""
    try:
      if self._connection.poll(_PATIENCE_SECONDS):
        return self._connection.recv()
    except (EOFError, OSError):
      self.process.join()
      code = self.process.exitcode or 0
      if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
      return f"ended with exit code {code}"
    return f"took longer than {_PATIENCE_SECONDS:g} seconds"

  def end(self) -> None:
    """Kills the process, which may be busy, and waits for its end."""
    self.process.kill()
    self.process.join()
    self._connection.close()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
  """Answers batches until the other end is closed."""
  connection.send(None)
  with contextlib.suppress(EOFError, OSError):
    while True:
      batch = connection.recv()
      try:
        results = function(batch)
      except Exception as error:
        results = error
      connection.send(results)
