"""Runs on machines of which nothing stays but what lies in a bucket."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tests.gcs import fake

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 600
# A reward that pays nothing, and makes a step as long as `$STEP_SECONDS` says.
WAITING = (
  "--config.rewards.custom=('tests.e2e.buckets:waiting',)",
  "--config.rewards.custom_weights=(0.1,)",
  "--config.rewards.num_workers=0",
)
_COMPLETIONS = 32


def waiting(completions, problems):
  seconds = float(os.environ.get("STEP_SECONDS", "0"))
  time.sleep(seconds * len(completions) / _COMPLETIONS)
  return [0.0] * len(completions)


class Start:
  """The processes of one start, each with a disk and a home of its own."""

  def __init__(
    self,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    folder: pathlib.Path,
    *,
    hosts: int = 1,
  ) -> None:
    """Starts them, in sessions of their own; the folder must not exist."""
    folder.mkdir(parents=True)
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    self._disks, self._logs, self.processes = [], [], []
    self._one_thread, self._is_over = threading.Lock(), False
    for index in range(hosts):
      disk, log = folder / f"disk-{index}", folder / f"{index}.txt"
      disk.mkdir()
      own = {"HOME": str(disk), "TMPDIR": str(disk)}
      joined = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(hosts),
        "JAX_PROCESS_ID": str(index),
      }
      with log.open("wb") as file:
        process = subprocess.Popen(
          [sys.executable, "-m", *arguments],
          cwd=ROOT,
          env=environment | own | (joined if hosts > 1 else {}),
          stdout=file,
          stderr=subprocess.STDOUT,
          start_new_session=True,
        )
      self._disks.append(disk)
      self._logs.append(log)
      self.processes.append(process)

  def log(self, host: int = 0) -> str:
    return self._logs[host].read_text(errors="replace")

  def is_running(self) -> bool:
    return any(process.poll() is None for process in self.processes)

  def step(self) -> int:
    """The newest step of which it has said something; -1 before the first."""
    return max(map(int, re.findall(r"\] step (\d+)/", self.log())), default=-1)

  def wait_until(self, reached: Callable[[], object]) -> None:
    """Waits, while it runs."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not reached():
      tails = "\n".join(self.log(x)[-3000:] for x in range(len(self._logs)))
      assert self.is_running(), tails
      assert time.monotonic() < deadline, tails
      time.sleep(0.05)

  def kill(self) -> bool:
    """Ends all processes and their disks at once; False if one had ended."""
    with self._one_thread:
      if not self._is_over:  # Or a number might be another process's by now.
        for process in self.processes:
          with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
      self._is_over = True
      ends = [process.wait() for process in self.processes]
      for disk in self._disks:
        shutil.rmtree(disk, ignore_errors=True)
    return all(end == -signal.SIGKILL for end in ends)

  def end(self) -> list[int]:
    """Their exit codes; their disks are gone then."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
      while self.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
      ended = not self.is_running()
    finally:
      self.kill()
    assert ended, self.log()[-4000:]
    return [process.returncode for process in self.processes]


class BucketRun:
  """A workdir in the bucket, and the command that trains there."""

  def __init__(
    self,
    server: fake.Server,
    environment: dict[str, str],
    folder: pathlib.Path,
    *settings: str,
    name: str = "runs/one",
  ) -> None:
    self.server = server
    self.workdir = f"gs://bucket/{name}"
    self._name, self._folder = name, folder
    self._environment = environment | server.environment()
    self._arguments = (
      "grpo_tpu.main",
      f"--workdir={self.workdir}",
      *settings,
    )
    self._starts: list[Start] = []

  def start(self, *more: str, hosts: int = 1, **environment: str) -> Start:
    """The command, on machines that have nothing."""
    start = Start(
      (*self._arguments, *more),
      self._environment | environment,
      self._folder / f"start-{len(self._starts)}",
      hosts=hosts,
    )
    self._starts.append(start)
    return start

  def close(self) -> None:
    """Ends what still runs."""
    for start in self._starts:
      start.kill()

  def finish(self, *more: str, hosts: int = 1, **environment: str) -> Start:
    """Trains to the end, which must be a good one."""
    start = self.start(*more, hosts=hosts, **environment)
    codes = start.end()
    logs = "\n\n".join(start.log(host)[-4000:] for host in range(hosts))
    assert codes == [0] * hosts, f"exit codes {codes}\n{logs}"
    return start

  def files(self) -> Iterator[tuple[str, bytes]]:
    """The objects of the workdir, by name."""
    store = self.server.store
    for name in store.names("bucket", f"{self._name}/"):
      blob = store.objects.get(("bucket", name))
      if blob and not name.endswith("/"):  # A mark of a folder.
        yield name.removeprefix(f"{self._name}/"), bytes(blob.data)

  def checkpoints(self) -> list[int]:
    """The steps of whole checkpoints."""
    names = [name for name, _ in self.files()]
    found = (
      re.fullmatch(r"checkpoints/(\d+)\.manifest\.json", x) for x in names
    )
    return sorted(int(match[1]) for match in found if match)

  def copy(self, folder: pathlib.Path) -> pathlib.Path:
    """Puts the workdir, as it is in the bucket, in a folder on this disk."""
    for name, data in self.files():
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
    return folder

  def kill_at_put(self, start: Start, number: int) -> None:
    """Kills it as soon as so many more objects are stored."""
    struck = threading.Event()

    def strike() -> None:
      struck.set()
      start.kill()

    self.server.store.at_put(number, strike)
    start.wait_until(struck.is_set)
    assert start.kill()

  def release(self) -> None:
    """Takes the lease of a killed run away, which it would soon lose."""
    objects = self.server.store.objects
    objects.pop(("bucket", f"{self._name}/checkpoints/lease"), None)


def upload(server: fake.Server, folder: pathlib.Path, name: str) -> str:
  """Puts a folder into the bucket; returns its gs:// path."""
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      place = f"{name}/{path.relative_to(folder).as_posix()}"
      kind = "application/octet-stream"
      server.store.put("bucket", place, path.read_bytes(), kind, {})
  return f"gs://bucket/{name}"
