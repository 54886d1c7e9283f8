"""Maps a function over batches of records on all cores, in order.

The results depend neither on the number of processes nor on their speed, and
only a few batches are in memory. A process that dies or hangs costs the one
record that it dies of. Knows nothing of what records are.
"""

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent import futures
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

  Args:
    function: Gives one result for each record of a batch. What it raises ends
      the iteration.
    batches: The records, which are read a few batches ahead.
    num_workers: The number of processes; with 0 all is done in this one.
    lost: The result of a record whose process died or hung, and how.

  The iteration must be closed, as by `contextlib.closing`, or ended.
  """
  if not num_workers:
    for batch in batches:
      yield from function(batch)
    return
  workers = _Workers(function, num_workers, lost)
  pending: collections.deque[futures.Future[list[R]]] = collections.deque()
  try:
    for batch in batches:
      pending.append(workers.submit(batch))
      if len(pending) > 2 * num_workers:
        yield from pending.popleft().result()
    while pending:
      yield from pending.popleft().result()
  finally:
    workers.close()


class _Workers:
  """Processes, each with a thread of this process that waits for it."""

  def __init__(self, function: Any, num_workers: int, lost: Any):
    self._function, self._lost = function, lost
    self._threads = futures.ThreadPoolExecutor(num_workers)
    self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
    self._all: set[_Worker] = set()
    self._lock, self._is_closed = threading.Lock(), False
    for _ in range(num_workers):
      self._idle.put(None)

  def submit(self, batch: Sequence[Any]) -> futures.Future[list[Any]]:
    return self._threads.submit(self._call, batch)

  def _call(self, batch: Sequence[Any]) -> list[Any]:
    worker = self._idle.get()
    try:
      worker = worker or self._start()
      how = worker.exchange(batch)
      if not isinstance(how, str):
        return how
      # One of these records is to blame: each gets a process of its own.
      results = []
      for record in batch:
        self._end(worker)
        worker = self._start()
        how = worker.exchange([record])
        is_lost = isinstance(how, str)
        results.append(self._lost(record, how) if is_lost else how[0])
      self._end(worker)
      worker = None
      return results
    finally:
      self._idle.put(worker)

  def _start(self) -> "_Worker":
    with self._lock:
      if self._is_closed:
        raise futures.CancelledError
      worker = _Worker(self._function)
      self._all.add(worker)
    worker.wait_until_ready()
    return worker

  def _end(self, worker: "_Worker") -> None:
    with self._lock:
      self._all.discard(worker)
    worker.end()

  def close(self) -> None:
    """Kills every process; a running call then ends."""
    with self._lock:
      self._is_closed = True
      for worker in self._all:
        worker.kill()
    self._threads.shutdown(cancel_futures=True)
    for worker in self._all:
      worker.end()


class _Worker:
  """A process that calls a function on each batch that it receives."""

  def __init__(self, function: Callable[[Sequence[Any]], list[Any]]):
    context = multiprocessing.get_context("forkserver")
    # What every worker imports is imported once. The main module, which may be
    # large, is not among it.
    context.set_forkserver_preload([function.__module__])
    self._connection, theirs = context.Pipe()
    self._process = context.Process(
      target=_serve, args=(theirs, function), daemon=True
    )
    # Ctrl-C reaches the whole group; only this process must act on it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
      self._process.start()
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
      theirs.close()

  def wait_until_ready(self) -> None:
    """Waits for the imports.

    Raises:
      RuntimeError: The process cannot start.
    """
    how = self._receive()
    if how is not None:
      raise RuntimeError(
        f"a process that reads records cannot start: it {how}."
      )

  def exchange(self, batch: Sequence[Any]) -> Any:
    """The results for a batch, or how the process failed, in words."""
    with contextlib.suppress(OSError):  # `_receive` says what happened.
      self._connection.send(batch)
    result = self._receive()
    if isinstance(result, Exception):
      raise result
    return result

  def _receive(self) -> Any:
    try:
      if self._connection.poll(_PATIENCE_SECONDS):
        return self._connection.recv()
    except (EOFError, OSError):
      self._process.join()
      code = self._process.exitcode or 0
      if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
      return f"ended with exit code {code}"
    return f"took longer than {_PATIENCE_SECONDS:g} seconds"

  def kill(self) -> None:
    """Kills the process, which may be busy."""
    self._process.kill()

  def end(self) -> None:
    """Kills the process and waits for its end."""
    self._process.kill()
    self._process.join()
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
