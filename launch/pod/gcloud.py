"""Calls of gcloud: their command lines, and the meaning of their errors."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure, ignore

_ERRORS: dict[str, Any] = tomllib.loads(
  pathlib.Path(__file__).with_name("errors.toml").read_text(encoding="utf-8")
)
# The name of `launch/pod/worker.sh` in the home folder of a worker.
WORKER_SCRIPT = "grpo_tpu_worker.sh"

# Flags that only gcloud alpha has.
_ALPHA = re.compile(
  "--(tunnel-through-iap|provisioning-model|max-run-duration|reservation"
  "|boot-disk|autocheckpoint-enabled)(=|$)"
)


def classify_error(stderr: str) -> Exit:
  """Finds the kind of failure that gcloud reports."""
  for name, patterns in _ERRORS["exits"].items():
    if any(re.search(pattern, stderr) for pattern in patterns):
      return Exit[name]
  return Exit.GCLOUD


def is_alpha(words: Sequence[str]) -> bool:
  """True if only gcloud alpha accepts a call."""
  return any(map(_ALPHA.match, words))


def error_tail(stderr: str) -> str:
  """The last lines of an error output, without gcloud's progress messages."""
  pattern = re.compile(rf"\s*$|{_ERRORS['progress']}")
  lines = [x.rstrip() for x in stderr.splitlines() if not pattern.match(x)]
  return "\n".join(lines[-12:]) or "no reason given"


class Gcloud:
  """The gcloud command line tool, for one slice or several of one run.

  A dry run prints calls instead of making them.

  Attributes:
    zone: The zone of the calls: where the slice is, or is tried next.
    num_workers: The number of workers of all slices, once it is known.
  """

  def __init__(self, settings: pod_settings.Settings, *, dry_run: bool):
    self.settings = settings
    self.dry_run = dry_run
    self.zone = settings.zones[0]
    self.num_workers = 1

  def zones_in_turn(self) -> Iterator[str]:
    """Makes each zone the zone of the calls, the present one first and last."""
    zones = self.settings.zones
    start = zones.index(self.zone)
    for self.zone in zones[start:] + zones[:start]:
      yield self.zone
    self.zone = zones[start]

  def describe(self, kind: str, name: str) -> dict[str, Any] | None:
    """Asks the API for a "tpu-vm" or a "queued-resources"."""
    with ignore(Exit.ABSENT):
      found = self.tpus(kind, "describe", name, "--format=json")
      return json.loads(found or "null")
    return None

  def tpus(self, *words: str) -> str:
    """Runs a command of `gcloud compute tpus`; returns its output."""
    return self._check(self._tpus_call(*words)).stdout

  def call(self, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs another command of gcloud in the project."""
    project = f"--project={self.settings.project}"
    return self._check(["gcloud", *words, project, "--quiet"])

  def _check(self, call: Sequence[str]) -> subprocess.CompletedProcess[str]:
    result = self._run(call)
    if result.returncode == 0:
      return result
    code = classify_error(result.stderr)
    if code == Exit.ABSENT and "create" in call:
      code = Exit.BAD_REQUEST  # What it is made of is missing.
    raise Failure(code, error_tail(result.stderr))

  def copy(self, worker: int, files: Sequence[str]) -> None:
    """Copies files to the home folder of a worker."""
    node, number = self._address(worker)
    words = (*files, f"{node}:.", f"--worker={number}")
    self._run_for(worker, self._worker_call("scp", *words))

  def run_on_worker(self, worker: int, command: Sequence[str]) -> str:
    """Runs a command on a worker; returns its output."""
    return self._run_for(worker, self.ssh_call(worker, command))

  def _run_for(self, worker: int, call: Sequence[str]) -> str:
    result = self._run(call)
    self.check_worker(worker, result.returncode, result.stderr)
    return result.stdout

  def ssh_call(
    self, worker: int, command: Sequence[str], ssh_flags: Sequence[str] = ()
  ) -> list[str]:
    """The call that runs a command on a worker.

    gcloud splits the command at blanks and ssh joins it with blanks, so words
    that are quoted for the worker's shell arrive unchanged.
    """
    node, number = self._address(worker)
    words = (f"--worker={number}", f"--command={shlex.join(command)}")
    call = self._worker_call("ssh", node, *words)
    return [*call, "--", *ssh_flags] if ssh_flags else call

  def _address(self, worker: int) -> tuple[str, int]:
    """The TPU VM of a worker, and the worker's number there."""
    nodes = self.settings.nodes
    node, number = divmod(worker, max(self.num_workers // len(nodes), 1))
    return nodes[node], number

  def start(self, call: Sequence[str], **streams: Any) -> subprocess.Popen[str]:
    """Starts a call. A dry run prints the call and starts `true` instead."""
    if self.dry_run:
      sys.stdout.write(shlex.join(call) + "\n")
      call = ["true"]
    try:
      return subprocess.Popen(call, text=True, errors="replace", **streams)
    except FileNotFoundError as error:
      message = f"{call[0]} was not found on PATH."
      raise Failure(Exit.NO_GCLOUD, message) from error

  def _run(self, call: Sequence[str]) -> subprocess.CompletedProcess[str]:
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    with self.start(call, stdin=none, stdout=pipe, stderr=pipe) as process:
      out, err = process.communicate()
    return subprocess.CompletedProcess(call, process.returncode, out, err)

  def _tpus_call(self, *words: str) -> list[str]:
    track = ["alpha"] * is_alpha(words)
    location = (f"--project={self.settings.project}", f"--zone={self.zone}")
    return ["gcloud", *track, "compute", "tpus", *words, *location, "--quiet"]

  def _worker_call(self, program: str, *words: str) -> list[str]:
    routes = {"internal": ["--internal-ip"], "iap": ["--tunnel-through-iap"]}
    words += (*routes.get(self.settings.ssh, []),)
    for option in ("ConnectTimeout=20", "ServerAliveInterval=20"):
      words += (f"--{program}-flag=-o{option}",)
    return self._tpus_call("tpu-vm", program, *words)

  def check_worker(self, worker: int, returncode: int, stderr: str) -> None:
    """Checks that a call on a worker succeeded."""
    if returncode == 0:
      return
    name = f"Worker {worker} of {self.settings.name}"
    tail = error_tail(stderr)
    if returncode == 255 or "return code [255]" in stderr:
      message = f"{name} could not be reached by ssh: {tail}"
      raise Failure(Exit.WORKER_UNREACHABLE, message)
    if re.search(r"^ERROR: (\(gcloud|gcloud crashed)", stderr, re.MULTILINE):
      raise Failure(classify_error(stderr), tail)
    # Bash exits with 127 if the script is missing: nothing was sent yet.
    if returncode == 127 and WORKER_SCRIPT in stderr:
      raise Failure(Exit.NOT_SET_UP, f"{name} is not set up.")
    codes = {Exit.BUSY, Exit.NOT_SET_UP, Exit.BAD_REQUEST, Exit.TIMEOUT}
    code = Exit(returncode) if returncode in codes else Exit.WORKER_FAILED
    raise Failure(code, f"{name}: {tail}")
