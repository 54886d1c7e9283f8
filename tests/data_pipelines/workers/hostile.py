"""Functions that a worker must survive, or must not be survived by."""

import contextlib
import json
import os
import pathlib
import pickle
import select
import signal
import stat
import subprocess
import sys
import threading
import time

LARGE = 50_000_000


def size(value):
  return len(value)


def _sockets():
  found = []
  for number in range(3, 64):
    with contextlib.suppress(OSError):
      if stat.S_ISSOCK(os.fstat(number).st_mode):
        found.append(number)
  return found


def write_to_connection(text):
  """Writes bytes, given as Latin-1, to every socket of this process."""
  for number in _sockets():
    os.write(number, text.encode("latin1"))


def write_message(document):
  """Sends a message as the worker does."""
  data = document.encode()
  write_to_connection((len(data).to_bytes(8) + data).decode("latin1"))


def write_bomb(path):
  """Writes a pickle that creates a file, also framed as Python's pipes do."""

  class Bomb:
    def __reduce__(self):
      return pathlib.Path.touch, (pathlib.Path(path),)

  bomb = pickle.dumps(Bomb())
  for header in (len(bomb).to_bytes(4), len(bomb).to_bytes(8), b""):
    write_to_connection((header + bomb).decode("latin1"))


def answer_twice():
  """Sends an answer of its own behind that of this call."""
  document = json.dumps({"result": "forged"})
  threading.Timer(0.3, write_message, [document]).start()


def answer_early():
  """Leaves a thread that answers the next call as soon as it arrives."""

  def answer():
    select.select(_sockets(), [], [])
    write_message(json.dumps({"result": "forged"}))

  threading.Thread(target=answer).start()


def stop_soon():
  """Returns; a moment later the process no longer reads."""
  threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGSTOP]).start()


def start_children(path, end):
  """Starts processes inside and outside the session and writes their ids."""
  code = (
    "import subprocess, time\n"
    "started = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
    "print(started.pid, flush=True)\n"
    "time.sleep(1000)"
  )
  sleeper = subprocess.Popen(["sleep", "1000"])
  daemon = subprocess.Popen(
    [sys.executable, "-c", code],
    stdout=subprocess.PIPE,
    start_new_session=True,
  )
  grandchild = int(daemon.stdout.readline())
  forked = os.fork()
  if not forked:
    time.sleep(1000)
  ids = (os.getpid(), os.getppid(), sleeper.pid, daemon.pid, grandchild, forked)
  new = pathlib.Path(f"{path}.new")
  new.write_text(json.dumps(ids))
  new.rename(path)
  if end == "exit":
    os._exit(3)
  if end == "abort":
    os.abort()
  if end == "hang":
    time.sleep(1000)


def take_memory(gib):
  return len(bytearray(int(gib * 2**30)))


def alarm_itself():
  """Uses the alarm as timeouts of libraries do."""
  signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
  signal.alarm(1)
  try:
    time.sleep(20)
  except ZeroDivisionError:
    return "rang"


def print_much():
  os.write(1, b"first \x1b[2J\r\x85line\n")
  for _ in range(LARGE // 50_000):
    os.write(2, b"x" * 49_999 + b"\n")
  return "done"


class Unspeakable(Exception):
  def __str__(self):
    raise RuntimeError


def raise_unspeakable():
  _raise(Unspeakable())


def leave():
  _raise(SystemExit(4))


def _raise(error):
  raise error


def score_after(task, answer, entry):
  """A scorer that takes as many seconds as the answer says."""
  time.sleep(float(answer))
  return float(task)
