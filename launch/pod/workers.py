"""The workers of a slice: their setup, the run on all of them, its logs."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence

from data_pipelines.validation import printable
from launch.pod import gcloud
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Names in the home folder of a worker.
_ARCHIVE = "grpo_tpu_code.tar.gz"
_ENVIRONMENT = "grpo_tpu_env"

# Each call of gcloud is a Python process of about 100 MB.
_MAX_PARALLEL_CALLS = 8
# With a terminal, a command on the worker ends when its ssh ends.
_TERMINAL = ("-tt",)

# If workers fail in different ways, the first of these is the exit code.
_WORST_FIRST = (Exit.NETWORK, Exit.NOT_ALLOWED, Exit.WORKER_UNREACHABLE)


def on_each[T](
  cloud: gcloud.Gcloud, num_workers: int, action: Callable[[int], T]
) -> list[T]:
  """Calls an action with the number of each worker; returns the results."""
  # gcloud's first ssh creates the key; parallel calls would all create one.
  has_key = pathlib.Path("~/.ssh/google_compute_engine").expanduser().exists()
  parallel = _MAX_PARALLEL_CALLS if has_key and not cloud.dry_run else 1
  with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
    futures = [pool.submit(action, worker) for worker in range(num_workers)]
  failures: list[Failure] = []
  for error in [future.exception() for future in futures]:
    if isinstance(error, Failure):
      failures.append(error)
    elif error is not None:
      raise error
  if failures:
    codes = [failure.exit for failure in failures]
    worst = next((code for code in _WORST_FIRST if code in codes), codes[0])
    messages = dict.fromkeys(str(failure) for failure in failures)
    raise Failure(worst, "\n".join(messages))
  return [future.result() for future in futures]


def _run_script(cloud: gcloud.Gcloud, num_workers: int, *words: str) -> None:
  """Runs `worker.sh` on each worker."""
  command = _script(*words)
  on_each(cloud, num_workers, lambda k: cloud.run_on_worker(k, command))


def _script(*words: str) -> list[str]:
  return ["bash", gcloud.WORKER_SCRIPT, *words]


@dataclasses.dataclass(frozen=True)
class Job:
  """The program to run."""

  config: str  # A config file of the last commit, with its part after a colon.
  flags: Sequence[str]  # More flags of the program.

  def __post_init__(self):
    name = self.config.partition(":")[0]
    path = pathlib.PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts
    is_file = path.suffix == ".py" and not name.startswith("-")
    if not (self.config.isprintable() and is_inside and is_file):
      raise ValueError(
        f"CONFIG ({self.config!r}) must be a Python file inside the checkout;"
        " write, for example, configs/smoke.py."
      )
    for flag in self.flags:
      if not (flag.startswith("--") and flag.isprintable()):
        raise ValueError(
          f"{flag!r} must be a flag of the program; write --name=value as one"
          " word."
        )
      if flag.partition("=")[0] in ("--workdir", "--config"):
        raise ValueError(
          f"{flag!r} must not be among the flags: the workdir is WORKDIR in the"
          " settings, and the config is the first argument; remove the flag."
        )

  @property
  def words(self) -> list[str]:
    """The config and the flags, as the program gets them."""
    return [f"--config={self.config}", *self.flags]

  def with_defaults(self, settings: pod_settings.Settings) -> "Job":
    """Adds the settings of a pod that neither the flags nor the config name."""
    named = " ".join(self.flags)
    if is_committed(self.config):
      named += _config_text(self.config)
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
  try:
    result = subprocess.run(
      ["git", "-C", str(ROOT), *words], capture_output=True, text=True
    )
  except FileNotFoundError as error:
    raise Failure(
      Exit.BAD_REQUEST, "git must be on PATH, to send the committed files."
    ) from error
  if result.returncode:
    raise Failure(Exit.BAD_REQUEST, f"{rule}: {result.stderr.strip()}")
  return result.stdout.strip()


def commit() -> str:
  """The hash of the last commit."""
  rule = (
    f"{ROOT} must be a git checkout with a commit, because the committed files"
    " are sent"
  )
  return _git("rev-parse", "--verify", "HEAD^{commit}", rule=rule)


def require_committed(config: str) -> None:
  """Checks that a config is in the last commit."""
  _config_text(config)


def _config_text(config: str) -> str:
  path = config.partition(":")[0]
  rule = (
    f"CONFIG ({config!r}) must be a file of the last commit, because the"
    " committed files are sent (commit it, or correct the name)"
  )
  return _git("show", f"{commit()}:{path}", rule=rule)


def is_committed(config: str) -> bool:
  """True if a config is in the last commit of this checkout, if it is one."""
  try:
    require_committed(config)
  except Failure:
    return False
  return True


def archive(version: str, path: pathlib.Path) -> None:
  """Writes the files of a commit to a .tar or .tar.gz file."""
  _git("archive", f"--output={path}", version)


def clone(path: pathlib.Path) -> None:
  """Makes a checkout of the last commit, without its history."""
  _git("clone", "--quiet", "--no-local", "--depth=1", str(ROOT), str(path))


def count_uncommitted() -> int:
  """Counts the files with changes that will not be sent."""
  return len(_git("status", "--porcelain").splitlines())


def setup(cloud: gcloud.Gcloud, num_workers: int) -> str:
  """Installs the committed files or the image, and returns its name."""
  settings = cloud.settings
  version = settings.image or commit()
  with tempfile.TemporaryDirectory() as folder:
    script = pathlib.Path(folder, gcloud.WORKER_SCRIPT)
    script.write_bytes((ROOT / "launch/pod/worker.sh").read_bytes())
    files = [str(script)]
    words = ["setup-image", version]
    if not settings.image:
      path = pathlib.Path(folder, _ARCHIVE)
      archive(version, path)
      files.append(str(path))
      sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
      words = ["setup", version, sha256]
    on_each(cloud, num_workers, lambda worker: cloud.copy(worker, files))
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
      on_each(cloud, num_workers, lambda k: cloud.copy(k, [str(path)]))
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
  workdir: str  # The workdir of the run.
  step: int  # The last step in the log of the run; -1 if it names none.
  checkpoint: int  # The newest checkpoint in the log; -1 if it names none.
  details: Sequence[str] = ()  # From its log: the last step, why the run ended.

  @classmethod
  def parse(cls, text: str) -> "Status":
    """Parses the output of `worker.sh status`.

    Raises:
      ValueError: The text is something else.
    """
    # A value may hold what Python, unlike the worker, takes for the end of a
    # line.
    lines = [line.partition("=") for line in text.split("\n")]
    values = {name: value for name, _, value in lines}
    code = values.get("exit_code", "")
    state = values.get("state", "none")
    if state not in _STATES:
      raise ValueError(f"state is {state!r}")
    return cls(
      state=state,
      exit_code=int(code) if code else None,
      was_stopped="stopped" in values,
      commit=values.get("commit", ""),
      workdir=values.get("workdir", ""),
      step=int(values.get("step") or -1),
      checkpoint=int(values.get("checkpoint") or -1),
      details=[values[name] for name in _DETAILS if values.get(name)],
    )

  def __str__(self) -> str:
    state = _STATES[self.state].format(self.exit_code)
    version = self.commit or "not set up"
    parts = [state, version]
    # Only the first process logs them.
    parts += [f"last step {self.step}"] * (self.step >= 0)
    parts += [f"newest checkpoint {self.checkpoint}"] * (self.checkpoint >= 0)
    return "; ".join(parts)


def worker_status(cloud: gcloud.Gcloud, worker: int) -> Status:
  """The status of one worker."""
  try:
    text = cloud.run_on_worker(worker, _script("status"))
  except Failure as failure:
    if failure.exit == Exit.NOT_SET_UP:
      return Status.parse("")
    raise
  try:
    return Status.parse(text)
  except ValueError as error:
    name = f"Worker {worker} of {cloud.settings.name}"
    raise Failure(
      Exit.WORKER_FAILED, f"{name} gave no valid status: {error}"
    ) from error


def status(cloud: gcloud.Gcloud, num_workers: int) -> list[Status]:
  """The status of each worker."""
  return on_each(cloud, num_workers, lambda k: worker_status(cloud, k))


def stop(cloud: gcloud.Gcloud, num_workers: int, *, kill: bool) -> None:
  """Makes the run save and end, and waits; `kill` kills it after a while."""
  words = ["stop", cloud.settings.grace_seconds, *(["kill"] if kill else [])]
  _run_script(cloud, num_workers, *words)


def logs(
  cloud: gcloud.Gcloud, workers: Sequence[int], lines: int, *, follow: bool
) -> None:
  """Prints the last lines of each log; `follow` adds new lines until Ctrl-C."""
  command = _script("logs", str(lines), *(["follow"] if follow else []))
  lock = threading.Lock()

  def relay(worker: int, process: subprocess.Popen[str]) -> None:
    prefix = f"[worker {worker}] " if len(workers) > 1 else ""
    for line in process.stdout or ():
      with lock:
        text = printable(line.rstrip("\n"), keep="\t")
        sys.stdout.write(f"{prefix}{text}\n")
        sys.stdout.flush()

  with contextlib.ExitStack() as stack:
    relays = []
    for worker in workers:
      call = cloud.ssh_call(worker, command, _TERMINAL if follow else ())
      errors = stack.enter_context(tempfile.TemporaryFile("w+"))
      process = cloud.start(
        call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
      )
      stack.enter_context(process)
      stack.callback(process.terminate)
      arguments = (worker, process)
      thread = threading.Thread(target=relay, args=arguments, daemon=True)
      thread.start()
      relays.append((worker, process, errors, thread))
    for *_, thread in relays:
      thread.join()
    for worker, process, errors, _ in relays:
      returncode = process.wait()
      errors.seek(0)
      cloud.check_worker(worker, returncode, errors.read())


def tensorboard(cloud: gcloud.Gcloud, port: int) -> None:
  """Serves TensorBoard of the run at a local port, until Ctrl-C.

  This machine reads a bucket itself, if TensorBoard is installed here, and
  otherwise prints the command. A shared path is read by a worker.
  """
  settings = cloud.settings
  if settings.bucket:
    python = os.environ.get("GRPO_TPU_PYTHON") or f"{ROOT}/.venv/bin/python"
    call = ["tensorboard", f"--logdir={settings.workdir}", "--host=localhost"]
    # The fast loader reads only public buckets.
    call += [f"--port={port}", "--load_fast=false"]
    probe = [python, "-c", "import tensorboard"]
    if not shutil.which(python) or subprocess.run(probe).returncode:
      logging.warning("TensorBoard is not installed in this checkout; run:")
      sys.stdout.write(shlex.join(call) + "\n")
      return
    with cloud.start([python, "-m", "tensorboard.main", *call[1:]]) as process:
      if process.wait():
        raise Failure(Exit.BAD_REQUEST, "TensorBoard failed; see above.")
    return
  forward = [*_TERMINAL, "-L", f"{port}:localhost:{port}"]
  call = cloud.ssh_call(0, _script("tensorboard", str(port)), forward)
  with cloud.start(call, stderr=subprocess.PIPE) as process:
    _, error = process.communicate()
  cloud.check_worker(0, process.returncode, error)
