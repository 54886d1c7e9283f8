"""The workers of a slice: their setup, the run on all of them, its logs."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from data_pipelines.validation import printable
from launch.pod import gcloud
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure, ignore

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Names in the home folder of a worker.
_ARCHIVE = "grpo_tpu_code.tar.gz"
_ENVIRONMENT = "grpo_tpu_env"

# Each call of gcloud is a Python process of about 100 MB.
_MAX_PARALLEL_CALLS = 8
_SCRIPT = ("bash", gcloud.WORKER_SCRIPT)
# With a terminal, a command on the worker ends when its ssh ends.
_TERMINAL = ("-tt",)

# If workers fail in different ways, the first of these is the exit code.
_WORST_FIRST = (Exit.NETWORK, Exit.NOT_ALLOWED, Exit.WORKER_UNREACHABLE)


def _on_each[T](
  cloud: gcloud.Gcloud,
  workers: Sequence[int],
  action: Callable[[int], T],
  parallel: int | None = None,
) -> list[T]:
  """Calls an action with the number of each worker; returns the results."""
  # gcloud's first ssh creates the key; parallel calls would all create one.
  has_key = pathlib.Path("~/.ssh/google_compute_engine").expanduser().exists()
  parallel = parallel or (_MAX_PARALLEL_CALLS if has_key else 1)
  parallel = 1 if cloud.dry_run else parallel
  with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
    futures = [pool.submit(action, worker) for worker in workers]
  errors = [error for future in futures if (error := future.exception())]
  failures = [error for error in errors if isinstance(error, Failure)]
  if not failures:
    return [future.result() for future in futures]
  codes = [failure.exit for failure in failures]
  worst = next((code for code in _WORST_FIRST if code in codes), codes[0])
  raise Failure(worst, "\n".join(dict.fromkeys(map(str, failures))))


def _run_script(cloud: gcloud.Gcloud, num_workers: int, *words: str) -> None:
  """Runs `worker.sh` on each worker."""
  action = functools.partial(cloud.run_on_worker, command=[*_SCRIPT, *words])
  _on_each(cloud, range(num_workers), action)


@dataclasses.dataclass(frozen=True)
class Job:
  """The program to run."""

  config: str  # A config file of the last commit, with its part after a colon.
  flags: Sequence[str]  # More flags of the program.

  def __post_init__(self):
    pattern = r"(?![-/]|(?:.*/)?\.\./)[^:]*[^:/]\.py(?::.*)?"
    if not (self.config.isprintable() and re.fullmatch(pattern, self.config)):
      raise ValueError(
        f"CONFIG ({self.config!r}) must be a Python file inside the checkout;"
        " write, for example, configs/smoke.py."
      )
    for flag in self.flags:
      is_flag = flag.startswith("--") and flag.isprintable()
      if not is_flag or flag.partition("=")[0] in ("--workdir", "--config"):
        raise ValueError(
          f"FLAG ({flag!r}) must be a flag of the program, but neither"
          " --workdir nor --config, which are WORKDIR and the first argument;"
          " write --name=value as one word, or remove it."
        )

  @property
  def words(self) -> list[str]:
    """The config and the flags, as the program gets them."""
    return [f"--config={self.config}", *self.flags]

  def with_defaults(self, settings: pod_settings.Settings) -> "Job":
    """Adds the settings of a pod that neither the flags nor the config name."""
    named = " ".join(self.flags)
    if not settings.image or is_committed(self.config):
      named += require_committed(self.config)
    defaults = {"checkpoint.every_minutes": "10"}
    if settings.bucket:
      # A new slice starts with the programs that the last one compiled.
      defaults["compilation_cache_dir"] = f"{settings.workdir}/compiled"
    added = [
      f"--config.{name}={value}"
      for name, value in defaults.items()
      if name.rpartition(".")[2] not in named
    ]
    return dataclasses.replace(self, flags=(*self.flags, *added))


def _git(*words: str, rule: str = "git must succeed") -> str:
  """Runs git; `rule` says what must hold, if it fails."""
  call = ["git", "-C", str(ROOT), *words]
  result = subprocess.run(call, capture_output=True, text=True)
  if result.returncode:
    raise Failure(Exit.BAD_REQUEST, f"{rule}: {result.stderr.strip()}")
  return result.stdout.strip()


def commit() -> str:
  """The hash of the last commit."""
  rule = f"{ROOT} must be a git checkout with a commit, whose files are sent"
  return _git("rev-parse", "--verify", "HEAD^{commit}", rule=rule)


def require_committed(config: str) -> str:
  """The text of a config in the last commit."""
  rule = (
    f"CONFIG ({config!r}) must be a file of the last commit, because the"
    " committed files are sent (commit it, or correct the name)"
  )
  return _git("show", f"{commit()}:{config.partition(':')[0]}", rule=rule)


def is_committed(config: str) -> bool:
  """True if a config is in the last commit of this checkout, if it is one."""
  try:
    return require_committed(config) is not None
  except (Failure, FileNotFoundError):
    return False


def clone(path: pathlib.Path) -> None:
  """Makes a checkout of the last commit, without its history."""
  _git("clone", "--quiet", "--no-local", "--depth=1", str(ROOT), str(path))


def count_unsent(settings: pod_settings.Settings) -> int:
  """Counts the files with changes that will not be sent."""
  return 0 if settings.image else len(_git("status", "-s").splitlines())


def _copy(cloud: gcloud.Gcloud, num_workers: int, files: list[str]) -> None:
  _on_each(cloud, range(num_workers), lambda k: cloud.copy(k, files))


def setup(cloud: gcloud.Gcloud, num_workers: int) -> str:
  """Installs the committed files or the image, and returns its name."""
  settings = cloud.settings
  version = settings.image or commit()
  with tempfile.TemporaryDirectory() as folder:
    files = [f"{folder}/{gcloud.WORKER_SCRIPT}"]
    shutil.copy(ROOT / "launch/pod/worker.sh", files[0])
    words = ["setup-image", version]
    if not settings.image:
      path = pathlib.Path(folder, _ARCHIVE)
      _git("archive", f"--output={path}", version)
      files.append(str(path))
      sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
      words = ["setup", version, sha256]
    _copy(cloud, num_workers, files)
    _run_script(cloud, num_workers, *words)
  return version


def run(cloud: gcloud.Gcloud, num_workers: int, job: Job) -> None:
  """Starts the same command on every worker, and returns."""
  settings = cloud.settings
  if settings.environment:
    # A file, because command lines are shown and logged.
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, _ENVIRONMENT)
      path.touch(mode=0o600)
      lines = [f"{name}={x}\n" for name, x in settings.environment.items()]
      path.write_text("".join(lines), encoding="utf-8")
      _copy(cloud, num_workers, [str(path)])
  words = ["run", settings.workdir, settings.image, *job.words]
  _run_script(cloud, num_workers, *words)


_STATES = {
  "none": "no run yet",
  "running": "running",
  "ended": "ended with exit code {}",
  "lost": "lost: the machine restarted, or the run was killed",
}
_DETAILS = ("progress", "error", "end", "next")


@dataclasses.dataclass(frozen=True)
class Status:
  """The state of the run on one worker."""

  state: str  # "none", "running", "ended"; "lost" without an exit code.
  exit_code: int | None  # The exit code of a run that has ended.
  was_stopped: bool  # True if `stop` ended the run.
  commit: str  # The commit or the image that is set up; empty if nothing is.
  step: int  # The last step in the log of the run; -1 if it names none.
  checkpoint: int  # The newest checkpoint in the log; -1 if it names none.
  details: Sequence[str] = ()  # From its log: the last step, why the run ended.

  @classmethod
  def parse(cls, text: str) -> "Status":
    """Parses the output of `worker.sh status`; any other is a ValueError."""
    # Values may have characters at which `splitlines` splits.
    lines = [line.partition("=") for line in text.split("\n")]
    values = {name: value for name, _, value in lines}
    code, state = values.get("exit_code"), values.get("state", "none")
    if state not in _STATES:
      raise ValueError(f"state is {state!r}")
    return cls(
      state=state,
      exit_code=int(code) if code else None,
      was_stopped="stopped" in values,
      commit=values.get("commit", ""),
      step=int(values.get("step") or -1),
      checkpoint=int(values.get("checkpoint") or -1),
      details=[values[name] for name in _DETAILS if values.get(name)],
    )

  def __str__(self) -> str:
    state = _STATES[self.state].format(self.exit_code)
    parts = [state, self.commit or "not set up"]
    # Only the first process logs them.
    parts += [f"last step {self.step}"] * (self.step >= 0)
    parts += [f"newest checkpoint {self.checkpoint}"] * (self.checkpoint >= 0)
    return "; ".join(parts)


def worker_status(cloud: gcloud.Gcloud, worker: int) -> Status:
  """The status of one worker."""
  try:
    with ignore(Exit.NOT_SET_UP):
      return Status.parse(cloud.run_on_worker(worker, [*_SCRIPT, "status"]))
    return Status.parse("")
  except ValueError as error:
    name = f"Worker {worker} of {cloud.settings.name}"
    message = f"{name} gave no valid status: {error}"
    raise Failure(Exit.WORKER_FAILED, message) from error


def status(cloud: gcloud.Gcloud, num_workers: int) -> list[Status]:
  """The status of each worker."""
  action = functools.partial(worker_status, cloud)
  return _on_each(cloud, range(num_workers), action)


def stop(cloud: gcloud.Gcloud, num_workers: int, *, kill: bool) -> None:
  """Makes the run save and end, and waits; `kill` kills it after a while."""
  words = ["stop", cloud.settings.grace_seconds, *(["kill"] if kill else [])]
  _run_script(cloud, num_workers, *words)


def logs(
  cloud: gcloud.Gcloud, workers: Sequence[int], lines: int, *, follow: bool
) -> None:
  """Prints the last lines of each log; `follow` adds new lines until Ctrl-C."""
  command = [*_SCRIPT, "logs", str(lines), *["follow"] * follow]

  def relay(worker: int) -> None:
    prefix = f"[worker {worker}] " if len(workers) > 1 else ""
    call = cloud.ssh_call(worker, command, _TERMINAL if follow else ())
    with (
      tempfile.TemporaryFile("w+") as errors,
      cloud.start(
        call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
      ) as process,
    ):
      for line in process.stdout or ():
        text = printable(line.rstrip("\n"), keep="\t")
        sys.stdout.write(f"{prefix}{text}\n")
        sys.stdout.flush()
      code = process.wait()
      errors.seek(0)
      cloud.check_worker(worker, code, errors.read())

  _on_each(cloud, workers, relay, parallel=len(workers))


def tensorboard(cloud: gcloud.Gcloud, port: int) -> None:
  """Serves TensorBoard at a local port, until Ctrl-C, or prints its command."""
  settings = cloud.settings
  if not settings.bucket:  # A worker reads a shared path.
    forward = [*_TERMINAL, "-L", f"{port}:localhost:{port}"]
    command = [*_SCRIPT, "tensorboard", str(port)]
    call = cloud.ssh_call(0, command, forward)
    with cloud.start(call, stderr=subprocess.PIPE) as process:
      _, error = process.communicate()
    cloud.check_worker(0, process.returncode, error)
    return
  python = os.environ.get("GRPO_TPU_PYTHON") or f"{ROOT}/.venv/bin/python"
  # The fast loader reads only public buckets.
  words = [f"--logdir={settings.workdir}", "--host=localhost"]
  words += [f"--port={port}", "--load_fast=false"]
  probe = [python, "-c", "import tensorboard"]
  if not shutil.which(python) or subprocess.run(probe).returncode:
    logging.warning("TensorBoard is not installed in this checkout; run:")
    sys.stdout.write(shlex.join(["tensorboard", *words]) + "\n")
    return
  with cloud.start([python, "-m", "tensorboard.main", *words]) as process:
    if process.wait():
      raise Failure(Exit.BAD_REQUEST, "TensorBoard failed; see above.")
