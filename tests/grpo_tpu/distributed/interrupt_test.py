"""Ctrl-C in a terminal: processes of their own on a pseudo-terminal."""

import signal
import subprocess
import sys
import time

import pytest

from tests.terminal import ROOT, Terminal

START = """
import contextlib, hashlib, os, signal, sys, time
from grpo_tpu.distributed import interrupt
interrupt.listen()
is_run = {is_run}
if is_run:
  # As JAX's own handler, which is none of Python's.
  import ctypes
  notice = ctypes.CFUNCTYPE(None, ctypes.c_int)(
    lambda number: os.write(1, b"notice\\n")
  )
  ctypes.CDLL(None).signal(signal.SIGTERM, notice)
with interrupt.saving() if is_run else contextlib.nullcontext():
  print("ready", flush=True)
  {body}
print("done", flush=True)
"""
POLL = """
  while not interrupt.is_pressed():
    time.sleep(0.01)
  time.sleep(1)
"""
# A call of C that no signal interrupts, as a compilation is.
COMPILE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
FORK = """
  if not os.fork():
    time.sleep(3)
    os._exit(0)
  time.sleep(0.5)
  print("forked", flush=True)
  while not interrupt.is_pressed():
    time.sleep(0.01)
  print("child", os.wait()[1], flush=True)
"""


@pytest.fixture
def start():
  opened = []

  def new(body: str, *, is_run: bool = True) -> Terminal:
    code = START.format(is_run=is_run, body=body)
    opened.append(Terminal(sys.executable, "-c", code))
    opened[-1].wait_for("ready")
    return opened[-1]

  yield new
  for each in opened:
    each.close()


def test_the_first_interrupt_of_a_run_is_a_notice_and_the_run_goes_on(start):
  terminal = start(POLL)
  terminal.press()
  terminal.wait_for("Interrupted: saving; press Ctrl-C again to leave at once.")
  terminal.wait_for("notice")
  terminal.wait_for("done")
  assert terminal.end() == 0
  assert "Traceback" not in terminal.text


def test_the_second_interrupt_leaves_even_from_a_compilation(start):
  terminal = start(COMPILE)
  terminal.press()
  terminal.wait_for("Interrupted: saving")
  time.sleep(0.3)
  assert terminal.process.poll() is None
  terminal.press()
  terminal.wait_for("leaving at once, nothing is saved (exit code 130)")
  assert terminal.end() == 130


@pytest.mark.parametrize("body", [POLL, COMPILE])
def test_one_interrupt_ends_a_mode_that_has_nothing_to_save(start, body):
  terminal = start(body, is_run=False)
  terminal.press()
  terminal.wait_for("Interrupted: leaving at once")
  assert terminal.end() == 130
  assert "Traceback" not in terminal.text


def test_an_interrupt_in_a_line_leaves_the_terminal_as_it_was(start):
  """Where a line is edited, the terminal does not echo what is typed."""
  body = "import readline\n  with interrupt.editing(): input('> ')"
  terminal = start(body, is_run=False)
  terminal.wait_for("> ")
  assert not terminal.echoes
  # Python misses a key between the prompt and its wait for the line, as if
  # nobody had pressed; a user presses again.
  while terminal.process.poll() is None:
    terminal.press()
    time.sleep(1)
  terminal.wait_for("Interrupted: leaving at once")
  assert terminal.end() == 130
  assert "Traceback" not in terminal.text and terminal.echoes


def test_a_forked_child_leaves_the_interrupt_to_its_parent(start):
  """The child has the socket too, and one key must not count twice."""
  terminal = start(FORK)
  terminal.wait_for("forked")
  terminal.press()
  terminal.wait_for("child 0")
  terminal.wait_for("done")
  assert terminal.end() == 0


def test_a_job_in_the_background_goes_on_ignoring_interrupts():
  code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
  code += START.format(is_run=False, body="time.sleep(0.5)")
  process = subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  with process:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == "done\n"
  assert process.returncode == 0
