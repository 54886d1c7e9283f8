"""Worker processes for calls that may hang or crash.

Each worker has its own thread and its own pipe, so a crash is always the fault
of exactly one call. `multiprocessing` processes are no alternative: spawned
ones import the program's main module, and jax with it; forked ones inherit
JAX's locks without the threads that hold them. For the choice against a library
see docs/adr/0005-a-pipe-for-each-reward-worker.md.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent import futures
from multiprocessing import connection
from typing import Any

from data_pipelines.workers import functions

# Time for Python to start and to import the users' modules.
_START_SECONDS = 120.0
_OPEN_POOLS: "weakref.WeakSet[Pool]" = weakref.WeakSet()


class Pool:
  """Calls functions in `num_workers` processes, which start when needed."""

  def __init__(
    self, paths: Sequence[str], *, num_workers: int, timeout_seconds: float
  ):
    """Creates the pool without starting a process.

    Args:
      paths: The functions that each worker imports before its first call.
      num_workers: With 0, calls run in this process and have no timeout.
      timeout_seconds: Time after which a call is killed.
    """
    self._workers = [
      _Worker(tuple(paths), timeout_seconds) for _ in range(num_workers)
    ]
    self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in self._workers:
      self._idle.put(worker)
    self._threads = futures.ThreadPoolExecutor(num_workers or 1)
    _OPEN_POOLS.add(self)

  def submit(self, path: str, *arguments: Any) -> futures.Future[Any]:
    """Starts a call of one of the pool's functions.

    The arguments and the result are pickled.

    Returns:
      A future of the function's result, or of a `functions.Failure` if the
      function raised, was killed or ended its process. The future raises
      RuntimeError if no worker can be started.
    """
    if self._workers:
      return self._threads.submit(self._call, path, arguments)
    done: futures.Future[Any] = futures.Future()
    done.set_result(functions.call(functions.resolve(path), arguments))
    return done

  def _call(self, path: str, arguments: tuple) -> Any:
    worker = self._idle.get()
    try:
      return worker.call((path, arguments))
    finally:
      self._idle.put(worker)

  def close(self) -> None:
    """Kills every process, also a busy one, and waits for their ends."""
    _OPEN_POOLS.discard(self)
    self._threads.shutdown(wait=False, cancel_futures=True)
    for worker in self._workers:
      worker.close()
    self._threads.shutdown(wait=True)


def close_all() -> None:
  """Closes every pool of this process, for a program that ends at once."""
  for each in tuple(_OPEN_POOLS):
    each.close()


class _Worker:
  """One process at a time with its pipe. Calls come from one thread."""

  def __init__(self, paths: tuple[str, ...], timeout_seconds: float):
    self._paths = paths
    self._timeout_seconds = timeout_seconds
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None
    self._pipe: connection.Connection | None = None
    self._is_closed = False

  def call(self, task: tuple[str, tuple]) -> Any:
    """Runs one call; kills the process if it takes too long."""
    pipe = self._pipe or self._start()
    try:
      pipe.send(task)
      if pipe.poll(self._timeout_seconds):
        return pipe.recv()
      reason = f"it took longer than {self._timeout_seconds:g} seconds"
      self._end()
    except (EOFError, OSError):
      reason = f"its process ended with exit code {self._end(patience=1.0)}"
    return functions.Failure(reason)

  def _start(self) -> connection.Connection:
    ours, theirs = multiprocessing.Pipe()
    environment = os.environ | {
      # The worker finds users' modules where this process does.
      "PYTHONPATH": os.pathsep.join(sys.path),
      # Functions that depend on hash order agree in all workers.
      "PYTHONHASHSEED": "0",
    }
    command = [sys.executable, "-m", "data_pipelines.workers.worker"]
    with self._lock:
      if self._is_closed:
        raise RuntimeError("the pool is closed, so it starts no worker.")
      with theirs:
        self._process = subprocess.Popen(
          [*command, str(theirs.fileno())],
          stdin=subprocess.DEVNULL,
          pass_fds=(theirs.fileno(),),
          # Ctrl-C must reach the trainer alone. The session also groups the
          # worker with its own children, which are killed together.
          start_new_session=True,
          env=environment,
        )
      self._pipe = ours
    fault = "it does not respond"
    try:
      ours.send((self._paths, self._timeout_seconds))
      if ours.poll(_START_SECONDS):
        fault = ours.recv()
    except (EOFError, OSError):
      fault = "its process ended; see its output above"
    if fault is None:
      return ours
    self._end()
    raise RuntimeError(
      f"a worker for {self._paths} cannot be started: {fault}."
    )

  def _end(self, *, patience: float = 0.0) -> int:
    """The exit code; kills the process if it outlives `patience` seconds."""
    with self._lock:
      process, pipe = self._process, self._pipe
      self._process = self._pipe = None
    assert process is not None and pipe is not None
    pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(patience)
    return _kill(process)

  def close(self) -> None:
    """Kills the process for good; a running call then fails."""
    with self._lock:
      self._is_closed = True
      if self._process is not None:
        # The pipe stays open: another thread may be waiting on it.
        _kill(self._process)


def _kill(process: subprocess.Popen) -> int:
  """Kills a process and its children, and returns its exit code."""
  if process.returncode is None:  # Else its id may belong to another process.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
  return process.wait()
