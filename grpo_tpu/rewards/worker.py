"""A process that calls users' rewards, and can be killed while it does.

Started by `pool` as `python -m grpo_tpu.rewards.worker FD`. It imports neither
jax nor TensorFlow, nor the program that started it: many of it start in a
second. It ends by itself when that program is gone, whether idle (the pipe
ends) or hanging (an alarm, which no code can hold up).
"""

import signal
import sys
from multiprocessing import connection

from grpo_tpu.rewards import custom

# The pool kills what takes too long; this much later there is no pool left.
_ALONE_AFTER_SECONDS = 1.0


def serve(pipe: connection.Connection) -> None:
  """Answers calls until the other end closes.

  The first message is the paths of all functions and the timeout of a call,
  answered by None or by what is wrong with them. Each later one is a path,
  completions and problems, answered as `custom.call` does.
  """
  paths, timeout_seconds = pipe.recv()
  try:
    functions = {path: custom.resolve(path) for path in paths}
  except ValueError as error:
    pipe.send(str(error))
    return
  pipe.send(None)
  while True:
    path, completions, problems = pipe.recv()
    # The default action, without Python: even a loop in C is ended.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_seconds + _ALONE_AFTER_SECONDS)
    answer = custom.call(functions[path], completions, problems)
    signal.setitimer(signal.ITIMER_REAL, 0)
    pipe.send(answer)


def main() -> None:
  """Serves the pipe whose file descriptor is the argument."""
  with connection.Connection(int(sys.argv[1])) as pipe:
    try:
      serve(pipe)
    except (EOFError, OSError):
      pass  # Whoever asked is gone, and with it the need for an answer.


if __name__ == "__main__":
  main()
