"""Rewards that fail on every eighth problem, each in a way of its own.

Each writes the ids of the processes that it has started, and of its own, to
`$HOSTILE_FOLDER`, where a bomb would make the file "exploded".
"""

import os
import pathlib
import signal
import subprocess
import time
import zlib

from tests.data_pipelines.workers import hostile

FOLDER = pathlib.Path(os.environ.get("HOSTILE_FOLDER", "/nowhere"))
NAMES = ("bombing", "stopping", "forking", "eating")


def is_trap(name, pid):
  return zlib.crc32(pid.encode()) % 8 == NAMES.index(name)


def _note(*pids):
  with (FOLDER / "pids").open("a") as file:
    file.write("".join(f"{pid}\n" for pid in (os.getpid(), *pids)))


def _failing(name, fail):
  def reward(completions, problems):
    _note()
    if any(is_trap(name, problem.pid) for problem in problems):
      fail()
    return [float(len(text) % 3) for text in completions]

  return reward


def _fork():
  """Leaves a fork and a daemon, and exits."""
  child = os.fork()
  if not child:
    time.sleep(1000)
  daemon = subprocess.Popen(["sleep", "1000"], start_new_session=True)
  _note(child, daemon.pid)
  os._exit(0)


bombing = _failing(
  "bombing", lambda: hostile.write_bomb(str(FOLDER / "exploded"))
)
stopping = _failing("stopping", lambda: os.kill(os.getpid(), signal.SIGSTOP))
forking = _failing("forking", _fork)
eating = _failing("eating", lambda: hostile.take_memory(100))


def lasting(completions, problems):
  """Never fails, and leaves a process in a session of its own."""
  daemon = subprocess.Popen(["sleep", "1000"], start_new_session=True)
  _note(daemon.pid)
  return [1.0] * len(completions)
