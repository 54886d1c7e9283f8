"""The program of a worker process: calls functions until its pipe closes.

`pool` starts it as `python -m data_pipelines.workers.worker FD`. It imports
neither jax nor TensorFlow nor the main program, so many workers start within a
second. When the main program dies, an idle worker ends because the pipe closes,
and a busy one ends by SIGALRM, which no code can delay.
"""

import signal
import sys
from multiprocessing import connection

from data_pipelines.workers import functions

# The pool kills slow calls; this much later there is no pool left.
_GRACE_SECONDS = 1.0


def serve(pipe: connection.Connection) -> None:
  """Serves calls until the other end of the pipe closes.

  The first message holds the paths of all functions and the timeout of a call;
  the reply is None, or the reason why a path cannot be resolved. Each later
  message holds a path and arguments; the reply is that of `functions.call`.
  """
  paths, timeout_seconds = pipe.recv()
  try:
    resolved = {path: functions.resolve(path) for path in paths}
  except ValueError as error:
    pipe.send(str(error))
    return
  pipe.send(None)
  while True:
    path, arguments = pipe.recv()
    # The default action runs no Python code, so it also ends a loop in C.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_seconds + _GRACE_SECONDS)
    result = functions.call(resolved[path], arguments)
    signal.setitimer(signal.ITIMER_REAL, 0)
    pipe.send(result)


def main() -> None:
  """Serves the pipe whose file descriptor is the first argument."""
  with connection.Connection(int(sys.argv[1])) as pipe:
    try:
      serve(pipe)
    except (EOFError, OSError):
      pass  # The main program is gone.


if __name__ == "__main__":
  main()
