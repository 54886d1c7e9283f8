"""One worker process as the trainer sees it: nothing that it sends is trusted.

A message is its length in 8 bytes and a JSON document. A reader takes only
documents of a bounded size, and never runs code because of one.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from absl import logging

from data_pipelines.text import untrusted
from data_pipelines.validation import printable

_HEADER_BYTES = 8
_MAX_ANSWER_BYTES = 16 * 2**20
# What one call may print; the rest is dropped and counted.
_MAX_PRINTED_BYTES = 16_384
_MAX_PRINTED_LINES = 100
# Time for the guardian to kill and reap everything below it.
_PATIENCE_SECONDS = 10.0


class Process:
  """A guardian process and, below it, the worker; see `worker`."""

  def __init__(self) -> None:
    """Starts the process without waiting for it."""
    self._socket, theirs = socket.socketpair()
    self._socket.setblocking(False)
    self._printed = bytearray()
    self._num_dropped = 0  # Bytes printed beyond the limit.
    environment = os.environ | {
      # The worker finds users' modules where this process does.
      "PYTHONPATH": os.pathsep.join(sys.path),
      # Functions that depend on hash order agree in all workers.
      "PYTHONHASHSEED": "0",
    }
    arguments = map(str, (theirs.fileno(), os.getpid()))
    with theirs:
      self._popen = subprocess.Popen(
        [sys.executable, "-m", "data_pipelines.workers.worker", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(theirs.fileno(),),
        # Ctrl-C must reach the trainer alone.
        start_new_session=True,
        env=environment,
      )
    assert self._popen.stdout is not None
    self._output = self._popen.stdout.fileno()
    os.set_blocking(self._output, False)

  def is_idle(self) -> bool:
    """False once the worker has ended, or has sent what nobody asked for."""
    try:
      self._socket.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
      return True
    except OSError:
      pass
    return False

  def exchange(self, message: Any, *, timeout_seconds: float) -> dict[str, Any]:
    """Sends a message and returns the answer, both within the time.

    Raises:
      TimeoutError: The worker did not read all or did not answer.
      EOFError: The worker ended, or closed its end.
      ValueError: The answer is too long, no JSON object, or not alone.
    """
    deadline = time.monotonic() + timeout_seconds
    document = json.dumps(message).encode()
    unsent = memoryview(len(document).to_bytes(_HEADER_BYTES) + document)
    answer = bytearray()
    with selectors.DefaultSelector() as selector:
      both = selectors.EVENT_READ | selectors.EVENT_WRITE
      selector.register(self._socket, both)
      selector.register(self._output, selectors.EVENT_READ)
      while not _is_whole(answer):
        left = deadline - time.monotonic()
        if left <= 0:
          raise TimeoutError
        for key, events in selector.select(left):
          if key.fileobj == self._output:
            if self._read_output() == 0:
              selector.unregister(self._output)
            continue
          if events & selectors.EVENT_WRITE:
            with contextlib.suppress(BlockingIOError):
              unsent = unsent[self._socket.send(unsent) :]
            if not unsent:
              selector.modify(self._socket, selectors.EVENT_READ)
          if events & selectors.EVENT_READ:
            received = self._socket.recv(65_536)
            if not received:
              raise EOFError
            answer += received
    if unsent:
      raise ValueError("it answered before it had read the call")
    return untrusted.parse_json(bytes(answer[_HEADER_BYTES:]), "its answer")

  def log_output(self) -> None:
    """Logs what the worker has printed since the last time, within limits."""
    for _ in range(16):  # A process that never stops printing must not hold us.
      if not self._read_output():
        break
    lines = self._printed.decode(errors="replace").splitlines()
    for line in lines[:_MAX_PRINTED_LINES]:
      logging.info("A worker printed: %s", printable(line, keep="\t"))
    cut = "".join(lines[_MAX_PRINTED_LINES:])
    if dropped := self._num_dropped + len(cut):
      logging.warning("A worker printed %d bytes more.", dropped)
    self._printed.clear()
    self._num_dropped = 0

  def _read_output(self) -> int | None:
    """Reads some output: 0 bytes at its end, None if there is none yet."""
    try:
      data = os.read(self._output, 65_536)
    except BlockingIOError:
      return None
    room = _MAX_PRINTED_BYTES - len(self._printed)
    self._printed += data[:room]
    self._num_dropped += max(0, len(data) - room)
    return len(data)

  def kill(self) -> str:
    """Kills the worker and all that it started, and says how it ended."""
    self._popen.terminate()  # An order to the guardian.
    try:
      code = self._popen.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
      self._popen.kill()
      code = self._popen.wait()
    if code > 128:  # The guardian's way to tell a signal.
      with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code}"

  def close(self) -> None:
    """Closes the connection of a process that was killed."""
    self._socket.close()
    assert self._popen.stdout is not None
    self._popen.stdout.close()


def _is_whole(answer: bytearray) -> bool:
  """True if the bytes are one message, False if they are its beginning."""
  if len(answer) < _HEADER_BYTES:
    return False
  size = int.from_bytes(answer[:_HEADER_BYTES])
  if size > _MAX_ANSWER_BYTES or len(answer) > _HEADER_BYTES + size:
    raise ValueError("its answer is no message, or too long")
  return len(answer) == _HEADER_BYTES + size
