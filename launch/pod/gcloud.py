"""Every call of gcloud: how it is written, made, and what its failure means."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launch.pod import exits, settings

Exit = exits.Exit

# What gcloud prints, and what it means: the first that is found counts.
_MEANINGS = (
  (r'TPU has (terminal )?state "(PREEMPTED|TERMINATED)"', "PREEMPTED"),
  (r'TPU has (terminal )?state "', "SUSPENDED"),
  (r"RESOURCE_EXHAUSTED.*[Qq]uota|[Qq]uota .*exceeded|[Qq]uota limit", "QUOTA"),
  (r"no (more )?capacity|stockout|RESOURCE_EXHAUSTED", "NO_CAPACITY"),
  (r"NOT_FOUND|was not found|HttpError 404|HTTPError 404", "ABSENT"),
  (
    r"active account|PERMISSION_DENIED|UNAUTHENTICATED|invalid_grant"
    r"|[Rr]eauth|HTTPError 40[13]|invalid authentication cred"
    r"|default credentials",
    "NOT_ALLOWED",
  ),
  (
    r"Connection(Error| refused| reset| aborted)|NewConnectionError"
    r"|Unable to find the server|[Nn]ame resolution|not known|timed? ?out"
    r"|Network is unreachable|No route to host|ServerNotFoundError"
    r"|TransportError|RemoteDisconnected|HTTPError 50[0234]|UNAVAILABLE",
    "NETWORK",
  ),
)

# The name of `launch/pod/worker.sh` in the home folder on a worker.
WORKER_SCRIPT = "grpo_tpu_worker.sh"

# What gcloud says of its own work on ssh, which is not the worker's word.
_CHATTER = re.compile(
  r"^(Using (ssh|scp) batch size|S(SH|CP): Attempting|SSH key found"
  r"|WARNING: Cannot|Propagating SSH|Waiting for operation)"
)


def meaning(stderr: str) -> Exit:
  """The kind of failure that gcloud's words are about."""
  for pattern, name in _MEANINGS:
    if re.search(pattern, stderr):
      return Exit[name]
  return Exit.GCLOUD


def last_words(stderr: str) -> str:
  """What an error output comes to: its last lines, without gcloud's chatter."""
  lines = [line.rstrip() for line in stderr.splitlines() if line.strip()]
  lines = [line for line in lines if not _CHATTER.match(line)]
  return "\n".join(lines[-12:]) or "no reason given"


class Gcloud:
  """The command line tool, for the slice of some settings.

  Attributes:
    settings: Of the slice.
    dry_run: Whether calls are printed and not made.
  """

  def __init__(self, of: settings.Settings, *, dry_run: bool):
    self.settings = of
    self.dry_run = dry_run

  def describe(self, kind: str) -> dict[str, Any] | None:
    """What the API says of the slice; None if there is none.

    Args:
      kind: "tpu-vm" or "queued-resources".

    Raises:
      Failure: The API could not be asked, or does not answer.
    """
    words = [kind, "describe", self.settings.name, "--format=json"]
    try:
      answer = self.change(words)
    except exits.Failure as failure:
      if failure.exit == Exit.ABSENT:
        return None
      raise
    return json.loads(answer) if answer else None

  def change(self, words: Sequence[str]) -> str:
    """What a command of `gcloud compute tpus` prints.

    Raises:
      Failure: It did not work, for the reason that it gives.
    """
    ran = self._run(self._where(words))
    if ran.returncode:
      raise exits.Failure(meaning(ran.stderr), last_words(ran.stderr))
    return ran.stdout

  def copy(self, worker: int, files: Sequence[str]) -> None:
    """Copies files to the home folder on a worker.

    Raises:
      Failure: They did not get there.
    """
    words = ["tpu-vm", "scp", *files, f"{self.settings.name}:."]
    words += [f"--worker={worker}", *self._reach("scp")]
    ran = self._run(self._where(words))
    self.judge(worker, ran.returncode, ran.stderr)

  def on_worker(self, worker: int, command: Sequence[str]) -> str:
    """What a command prints on a worker.

    Args:
      worker: Its number.
      command: Words, each of which arrives as it is.

    Raises:
      Failure: The worker could not be reached, or the command failed.
    """
    ran = self._run(self.ssh_call(worker, command))
    self.judge(worker, ran.returncode, ran.stderr)
    return ran.stdout

  def ssh_call(
    self, worker: int, command: Sequence[str], ssh: Sequence[str] = ()
  ) -> list[str]:
    """The call that runs a command on a worker.

    gcloud cuts the command at blanks and ssh joins it with blanks, so what is
    quoted for the worker's shell gets there whole.

    Args:
      worker: Its number.
      command: Words for the worker's shell.
      ssh: More words for ssh itself.
    """
    words = ["tpu-vm", "ssh", self.settings.name, f"--worker={worker}"]
    words += [f"--command={shlex.join(command)}", *self._reach("ssh")]
    call = self._where(words)
    return [*call, "--", *ssh] if ssh else call

  def start(self, call: Sequence[str], **streams: Any) -> subprocess.Popen[str]:
    """Starts a call; one that is only printed is `true`."""
    if self.dry_run:
      sys.stdout.write(shlex.join(call) + "\n")
      call = ["true"]
    try:
      return subprocess.Popen(call, text=True, errors="replace", **streams)
    except FileNotFoundError as error:
      raise exits.Failure(
        Exit.NO_GCLOUD, f"There is no {call[0]} on PATH."
      ) from error

  def _run(self, call: Sequence[str]) -> subprocess.CompletedProcess[str]:
    process = self.start(
      call,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    with process:
      out, err = process.communicate()
    return subprocess.CompletedProcess(call, process.returncode, out, err)

  def _where(self, words: Sequence[str]) -> list[str]:
    # Only alpha goes through the tunnel.
    tunnels = "--tunnel-through-iap" in words
    return [
      "gcloud",
      *(["alpha"] if tunnels else []),
      *("compute", "tpus"),
      *words,
      f"--project={self.settings.project}",
      f"--zone={self.settings.zone}",
      "--quiet",
    ]

  def _reach(self, program: str) -> list[str]:
    """How ssh or scp gets to a worker, and when it gives up."""
    way = {
      "external": [],
      "internal": ["--internal-ip"],
      "iap": ["--tunnel-through-iap"],
    }[self.settings.ssh]
    options = ("ConnectTimeout=20", "ServerAliveInterval=20")
    return [*way, *(f"--{program}-flag=-o{option}" for option in options)]

  def judge(self, worker: int, returncode: int, stderr: str) -> None:
    """Passes what went well on a worker.

    Args:
      worker: Its number.
      returncode: Of the call.
      stderr: Of the call.

    Raises:
      Failure: It did not, for the reason that ssh or the worker gives.
    """
    if returncode == 0:
      return
    who = f"Worker {worker} of {self.settings.name}"
    words = last_words(stderr)
    if returncode == 255 or "return code [255]" in stderr:
      raise exits.Failure(
        Exit.WORKER_UNREACHABLE, f"{who} could not be reached by ssh: {words}"
      )
    if re.search(r"^ERROR: (\(gcloud|gcloud crashed)", stderr, re.MULTILINE):
      raise exits.Failure(meaning(stderr), words)
    # Bash's code where it finds no script: nothing was ever sent.
    if returncode == 127 and WORKER_SCRIPT in stderr:
      raise exits.Failure(Exit.NOT_SET_UP, f"{who} is not set up.")
    kinds = {Exit.BUSY, Exit.NOT_SET_UP, Exit.BAD_REQUEST, Exit.TIMEOUT}
    kind = returncode if returncode in kinds else Exit.WORKER_FAILED
    raise exits.Failure(Exit(kind), f"{who}: {words}")
