"""A program on a terminal of its own, whose keys a test presses."""

import os
import pathlib
import pty
import select
import subprocess
import sys
import termios
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Takes the terminal, as a shell's job does, then becomes the program.
_BECOME = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
  """Runs a program, from the checkout by default.

  Attributes:
    process: The program.
    text: All that it has written so far.
  """

  def __init__(
    self,
    *command: str,
    environment: dict[str, str] | None = None,
    seconds: float = 60,
    folder: pathlib.Path = ROOT,
  ):
    """Starts the program; it has so many seconds for each thing."""
    self._seconds = seconds
    self._ours, theirs = pty.openpty()
    self.process = subprocess.Popen(
      [sys.executable, "-c", _BECOME, *command],
      cwd=folder,
      env=environment,
      stdin=theirs,
      stdout=theirs,
      stderr=theirs,
      start_new_session=True,
    )
    os.close(theirs)
    self.text = ""

  def wait_for(self, words: str) -> None:
    """Waits until the program has written the words."""
    deadline = time.monotonic() + self._seconds
    while words not in self.text:
      assert time.monotonic() < deadline, self.text
      assert self._read(0.1), self.text

  def press(self, key: bytes = b"\x03") -> None:
    """Presses a key, Ctrl-C by default: a signal to the whole group."""
    os.write(self._ours, key)

  @property
  def echoes(self) -> bool:
    """True if the terminal shows what is typed."""
    return bool(termios.tcgetattr(self._ours)[3] & termios.ECHO)

  def end(self) -> int:
    """Waits for the end of the program, and returns its exit code."""
    deadline = time.monotonic() + self._seconds
    while self._read(0.1) and time.monotonic() < deadline:
      pass
    return self.process.wait(timeout=self._seconds)

  def close(self) -> None:
    """Kills the program, unless it has ended."""
    self.process.kill()
    self.process.wait()
    os.close(self._ours)

  def _read(self, seconds: float) -> bool:
    """Reads what there is; False once every writer has ended."""
    if select.select([self._ours], [], [], seconds)[0]:
      try:
        self.text += os.read(self._ours, 4096).decode(errors="replace")
      except OSError:
        return False
    return True
