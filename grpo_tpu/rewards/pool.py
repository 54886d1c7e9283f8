"""Worker processes for users' rewards, each killed and replaced if it hangs.

A thread and a pipe for each worker: whatever happens to one process is the
fault of the one call it was given, and of no other. Not `multiprocessing`'s
processes: those import the program's main module, and jax with it, and forked
ones inherit JAX's locks without the threads that hold them. Not a library's
pool either: see docs/adr/0005-a-pipe-for-each-reward-worker.md.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent import futures
from multiprocessing import connection

from data_pipelines import records

# For Python to start and the users' modules to be imported.
_START_SECONDS = 120.0


class Pool:
  """Calls users' rewards in `num_workers` processes, started when needed."""

  def __init__(
    self, paths: Sequence[str], *, num_workers: int, timeout_seconds: float
  ):
    """Starts no process yet.

    Args:
      paths: Of all functions that will be called; see `custom.resolve`.
      num_workers: How many calls run at a time.
      timeout_seconds: After which a call is ended.
    """
    self._workers = [
      _Worker(tuple(paths), timeout_seconds) for _ in range(num_workers)
    ]
    self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in self._workers:
      self._idle.put(worker)
    self._threads = futures.ThreadPoolExecutor(num_workers)

  def submit(
    self,
    path: str,
    completions: Sequence[str],
    problems: Sequence[records.Problem],
  ) -> futures.Future[list[float] | str]:
    """A call to be; its result is as of `custom.call`.

    The result raises RuntimeError if no worker can be started.
    """
    return self._threads.submit(
      self._call, (path, list(completions), list(problems))
    )

  def _call(self, task: tuple) -> list[float] | str:
    worker = self._idle.get()
    try:
      return worker.call(task)
    finally:
      self._idle.put(worker)

  def close(self) -> None:
    """Ends every process, whatever it is doing, and waits until it is gone."""
    self._threads.shutdown(wait=False, cancel_futures=True)
    for worker in self._workers:
      worker.close()
    self._threads.shutdown(wait=True)


class _Worker:
  """One process at a time, and the pipe to it. Calls come from one thread."""

  def __init__(self, paths: tuple[str, ...], timeout_seconds: float):
    self._paths = paths
    self._timeout_seconds = timeout_seconds
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None
    self._pipe: connection.Connection | None = None
    self._is_closed = False

  def call(self, task: tuple) -> list[float] | str:
    pipe = self._pipe or self._start()
    try:
      pipe.send(task)
      if pipe.poll(self._timeout_seconds):
        return pipe.recv()
      reason = f"it took longer than {self._timeout_seconds:g} seconds"
      self._end()
    except (EOFError, OSError):
      reason = f"its process ended with exit code {self._end(patience=1.0)}"
    return reason

  def _start(self) -> connection.Connection:
    ours, theirs = multiprocessing.Pipe()
    with self._lock:
      if self._is_closed:
        raise RuntimeError("a pool that is closed starts no worker.")
      with theirs:
        self._process = subprocess.Popen(
          [
            *(sys.executable, "-m", "grpo_tpu.rewards.worker"),
            str(theirs.fileno()),
          ],
          stdin=subprocess.DEVNULL,
          pass_fds=(theirs.fileno(),),
          # Ctrl-C is for the trainer; and what a reward has started, and left
          # hanging, is ended with it.
          start_new_session=True,
          env=os.environ
          | {
            # Finds the users' modules where this process does.
            "PYTHONPATH": os.pathsep.join(sys.path),
            # A reward that orders by hash says the same in every worker.
            "PYTHONHASHSEED": "0",
          },
        )
      self._pipe = ours
    try:
      ours.send((self._paths, self._timeout_seconds))
      fault = (
        "it is not ready" if not ours.poll(_START_SECONDS) else ours.recv()
      )
    except (EOFError, OSError):
      fault = "it ended, and its last words stand above"
    if fault is not None:
      self._end()
      raise RuntimeError(
        f"a worker of rewards.custom {self._paths} cannot be started: {fault}."
      )
    return ours

  def _end(self, *, patience: float = 0.0) -> int:
    """Ends the process, if it does not end by itself within `patience` seconds.

    Returns:
      Its exit code, below 0 for a signal.
    """
    with self._lock:
      process, pipe = self._process, self._pipe
      self._process = self._pipe = None
    assert process is not None and pipe is not None
    pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(patience)
    return _killed(process)

  def close(self) -> None:
    """Ends the process for good; a call of another thread then fails."""
    with self._lock:
      self._is_closed = True
      if self._process is not None:
        # The pipe stays open: another thread may be waiting on it.
        _killed(self._process)


def _killed(process: subprocess.Popen) -> int:
  """The exit code of a process that is now gone, with all it started."""
  if process.returncode is None:  # Or the id may be another's by now.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
  return process.wait()
