"""Ctrl-C: the first one saves a training run, the next one leaves at once.

A signal handler of Python runs between two bytecodes of the main thread, and a
compilation may keep that thread for minutes. Python also writes the number of
the signal into a socket, at once, and a thread reads it here.

A run hears the first Ctrl-C as it hears SIGTERM, see `preemption`. Processes
that this one starts leave Ctrl-C to it.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import NoReturn

from absl import logging

from data_pipelines.validation import ExitCode

_can_save = threading.Event()
_is_pressed = threading.Event()


def listen() -> None:
  """Watches for Ctrl-C, which ends the program at once outside of `saving`.

  Does nothing if the program must ignore it, as a shell's background job does.
  """
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    return
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
  signal.signal(signal.SIGINT, lambda number, frame: None)
  os.register_at_fork(after_in_child=_ignore)
  threading.Thread(
    target=_watch, args=(ours,), name="interrupts", daemon=True
  ).start()


@contextlib.contextmanager
def saving() -> Iterator[None]:
  """Makes the first Ctrl-C in the context a notice of preemption."""
  _can_save.set()
  try:
    yield
  finally:
    _can_save.clear()


@contextlib.contextmanager
def editing() -> Iterator[None]:
  """Lets a line editor restore the terminal before Ctrl-C ends the program."""
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  socket_number = signal.set_wakeup_fd(-1)
  try:
    yield
  except KeyboardInterrupt:
    _leave()
  finally:
    signal.set_wakeup_fd(socket_number, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, handler)


def is_pressed() -> bool:
  """True once a Ctrl-C makes the run save."""
  return _is_pressed.is_set()


def _watch(numbers: socket.socket) -> None:
  while number := numbers.recv(1):
    if number[0] != signal.SIGINT:
      continue
    if _is_pressed.is_set() or not _can_save.is_set():
      _leave()
    _is_pressed.set()
    logging.warning("Interrupted: saving; press Ctrl-C again to leave at once.")
    os.kill(os.getpid(), signal.SIGTERM)


def _leave() -> NoReturn:
  try:
    logging.warning(
      "Interrupted: leaving at once, nothing is saved (exit code %d).",
      ExitCode.INTERRUPTED,
    )
  finally:
    os._exit(ExitCode.INTERRUPTED)


def _ignore() -> None:
  """Leaves Ctrl-C to the parent: the terminal sends it to all processes."""
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
