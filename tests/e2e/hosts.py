"""Several processes that take themselves for the hosts of one run."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 800


@dataclasses.dataclass
class End:
  """How the processes of one start have ended.

  Attributes:
    codes: Exit codes, by process; below 0 for a signal.
    seconds: From the event that was waited for to the end of each.
    logs: What each has said.
  """

  codes: list[int]
  seconds: list[float]
  logs: list[str]


class Hosts:
  """`python -m grpo_tpu.main` once for each host, on one CPU device each."""

  def __init__(
    self,
    arguments: Sequence[Sequence[str]],
    environment: dict[str, str],
    logs: pathlib.Path,
    *,
    fault: str = "",
  ):
    """Starts them.

    Args:
      arguments: Of each host.
      environment: Of all.
      logs: A folder for what they say.
      fault: As in `tests/faults.py`.
    """
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    self._logs = []
    self.processes = []
    logs.mkdir(parents=True, exist_ok=True)
    number = len(list(logs.iterdir()))
    for index, given in enumerate(arguments):
      log = logs / f"{number + index}.txt"
      joined = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(len(arguments)),
        "JAX_PROCESS_ID": str(index),
      }
      program = ["-m", "grpo_tpu.main", *given]
      if fault:
        program = ["tests/faults.py", *program]
      with log.open("wb") as file:
        process = subprocess.Popen(
          [sys.executable, *program],
          cwd=ROOT,
          env=environment
          | (joined if len(arguments) > 1 else {})
          | {"FAULT": fault},
          stdout=file,
          stderr=subprocess.STDOUT,
        )
      self.processes.append(process)
      self._logs.append(log)

  def said(self) -> list[str]:
    return [log.read_text(errors="replace") for log in self._logs]

  def wait_for(self, words: str, host: int) -> None:
    """Until a host has said something."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
      while words not in self._logs[host].read_text(errors="replace"):
        assert self.processes[host].poll() is None, self._tails()
        assert time.monotonic() < deadline, self._tails()
        time.sleep(0.01)
    except BaseException:
      self.kill()
      raise

  def kill(self) -> None:
    for process in self.processes:
      process.kill()
    for process in self.processes:
      process.wait()

  def end(self, *, without: Sequence[int] = ()) -> End:
    """How they end, but those that never will, which are killed."""
    start = time.monotonic()
    waiting = set(range(len(self.processes))) - set(without)
    seconds = [float("nan")] * len(self.processes)
    try:
      while waiting:
        assert time.monotonic() < start + TIMEOUT_SECONDS, self._tails()
        for index in sorted(waiting):
          if self.processes[index].poll() is not None:
            seconds[index] = time.monotonic() - start
            waiting.remove(index)
        time.sleep(0.01)
    finally:
      self.kill()
    return End([p.returncode for p in self.processes], seconds, self.said())

  def signal(self, host: int, number: signal.Signals) -> None:
    os.kill(self.processes[host].pid, number)

  def _tails(self) -> str:
    return "\n\n".join(text[-3000:] for text in self.said())
