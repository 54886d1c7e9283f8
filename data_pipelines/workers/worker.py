"""The program of a worker: calls functions until its connection closes.

It imports neither jax nor TensorFlow nor the main program, so many workers
start within a second. It forks: the child is the worker, and this process is
its guardian, which runs none of the users' code. When the worker ends, when
SIGTERM arrives, or when the parent is gone, it kills all that the worker has
started, on Linux in whatever session, because orphans become its children.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import resource
import signal
import socket
import sys
from typing import Any

from data_pipelines.workers import functions

_HEADER_BYTES = 8
_IS_LINUX = sys.platform == "linux"
# From linux/prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_AWAITED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGALRM}
# The time within which the guardian notices that the parent is gone.
_POLL_SECONDS = 1.0


def serve(connection: socket.socket) -> None:
  """Serves calls until the other end of the connection closes.

  The first message holds the paths of all functions and the memory limit, each
  later one a path and arguments; answers have a `result` or an `error`.
  """
  reader = connection.makefile("rb")

  def receive() -> Any:
    header = reader.read(_HEADER_BYTES)
    if not header:
      raise EOFError
    return json.loads(reader.read(int.from_bytes(header)))

  def send(answer: dict[str, Any]) -> None:
    document = json.dumps(answer, allow_nan=False).encode()
    connection.sendall(len(document).to_bytes(_HEADER_BYTES) + document)

  paths, memory_bytes = receive()
  _limit(memory_bytes)
  try:
    resolved = {path: functions.resolve(path) for path in paths}
  except ValueError as error:
    send({"error": str(error)})
    return
  send({"result": None})
  while True:
    path, arguments = receive()
    result = functions.call(resolved[path], arguments)
    with contextlib.suppress(Exception):  # A function may have closed it.
      sys.stdout.flush()
    if isinstance(result, functions.Failure):
      send({"error": result.reason})
      continue
    try:
      send({"result": result})
    except (TypeError, ValueError, RecursionError) as error:
      send({"error": f"its result is not JSON: {functions.one_line(error)}"})


def _limit(memory_bytes: int) -> None:
  """Limits this process and, each on its own, those that it starts."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with contextlib.suppress(OSError, ValueError):  # macOS may refuse.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most != resource.RLIM_INFINITY:
      memory_bytes = min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
  with contextlib.suppress(OSError):
    # When the machine runs out of memory, the system kills this first.
    pathlib.Path("/proc/self/oom_score_adj").write_text("1000")


def guard(worker: int, parent: int) -> int:
  """Kills all the worker started at its end or an order; its exit code."""
  signal.setitimer(signal.ITIMER_REAL, _POLL_SECONDS, _POLL_SECONDS)
  status = None
  while status is None and os.getppid() == parent:
    if signal.sigwait(_AWAITED) == signal.SIGTERM:
      break
    ended = -1
    while status is None and ended:  # Reaps all that has ended.
      ended, raw = os.waitpid(-1, os.WNOHANG)
      status = raw if ended == worker else None
  if status is None:
    os.kill(worker, signal.SIGKILL)  # It may have no group yet.
  with contextlib.suppress(OSError):
    os.killpg(worker, signal.SIGKILL)
  while True:
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):  # None on macOS.
      with contextlib.suppress(OSError):
        above = path.read_bytes().rpartition(b")")[2].split()[1]
        if int(above) == os.getpid():
          os.kill(int(path.parent.name), signal.SIGKILL)
    try:
      # A process is this one's child before its own parent can be reaped.
      ended, raw = os.waitpid(-1, 0)
    except ChildProcessError:
      break
    status = raw if ended == worker else status
  code = os.waitstatus_to_exitcode(status or 0)
  return code if code >= 0 else 128 - code


def main() -> None:
  """Forks the worker that serves the first argument's file descriptor."""
  descriptor, parent = map(int, sys.argv[1:])
  libc = ctypes.CDLL(None)
  guardian = os.getpid()
  signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
  if _IS_LINUX:
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
  if worker := os.fork():
    null = os.open(os.devnull, os.O_RDWR)
    for number in (descriptor, 1, 2):
      os.dup2(null, number)
    # At once: nothing of this process is worth a clean end.
    os._exit(guard(worker, parent))
  if _IS_LINUX:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != guardian:
    return
  os.setsid()
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
  with socket.socket(fileno=descriptor) as connection:
    with contextlib.suppress(EOFError, OSError):  # The parent is gone.
      serve(connection)


if __name__ == "__main__":
  main()
