"""The workers of a slice: setting them up, a run on all of them, its logs."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from launch.pod import exits, gcloud

Exit = exits.Exit
T = TypeVar("T")

ROOT = pathlib.Path(__file__).resolve().parents[2]

_ARCHIVE = "grpo_tpu_code.tar.gz"

# Calls of gcloud at a time: each is a Python of a hundred megabytes.
_AT_A_TIME = 8
# For ssh: with a terminal there, what runs on the worker ends when ssh does.
_TERMINAL = ("-tt",)

# Which of several failures to say, when workers fail in different ways.
_WORST_FIRST = (Exit.NETWORK, Exit.NOT_ALLOWED, Exit.WORKER_UNREACHABLE)


def on_each(
  cloud: gcloud.Gcloud, num_workers: int, do: Callable[[int], T]
) -> list[T]:
  """What an action gives on each worker, in the order of the workers.

  Args:
    cloud: Where they are.
    num_workers: How many there are.
    do: The action, given a worker's number.

  Raises:
    Failure: It failed somewhere; the message has each worker that it failed on.
      All others were done.
  """
  # The first call of ssh ever makes the key, which calls side by side would all
  # do at once.
  has_key = pathlib.Path("~/.ssh/google_compute_engine").expanduser().exists()
  at_a_time = _AT_A_TIME if has_key and not cloud.dry_run else 1
  with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
    waiting = [pool.submit(do, worker) for worker in range(num_workers)]
  failures: list[exits.Failure] = []
  for error in [future.exception() for future in waiting]:
    if isinstance(error, exits.Failure):
      failures.append(error)
    elif error is not None:
      raise error
  if failures:
    kinds = {failure.exit: failure for failure in reversed(failures)}
    worst = next((k for k in _WORST_FIRST if k in kinds), failures[0].exit)
    words = dict.fromkeys(str(failure) for failure in failures)
    raise exits.Failure(worst, "\n".join(words))
  return [w.result() for w in waiting]


def _script(*words: str) -> list[str]:
  return ["bash", gcloud.WORKER_SCRIPT, *words]


@dataclasses.dataclass(frozen=True)
class Job:
  """What is run.

  Attributes:
    config: A file of the committed tree, with the part after a colon if any.
    flags: More flags of the program.
  """

  config: str
  flags: Sequence[str]

  def __post_init__(self):
    path = pathlib.PurePosixPath(self.config.partition(":")[0])
    if (
      not self.config.isprintable() or path.is_absolute() or ".." in path.parts
    ):
      raise ValueError(
        f"CONFIG ({self.config!r}) must be a path inside the checkout; write,"
        " say, configs/smoke.py."
      )
    for flag in self.flags:
      name = flag.partition("=")[0]
      if not (flag.startswith("--") and flag.isprintable()):
        raise ValueError(
          f"{flag!r} must be a flag of the program, --name=value in one word;"
          " write it so."
        )
      if name in ("--workdir", "--config"):
        raise ValueError(
          f"{flag!r} must not be among the flags: the workdir is WORKDIR of the"
          " settings, the config comes first; take it out."
        )


def _git(*words: str) -> subprocess.CompletedProcess[str]:
  try:
    return subprocess.run(
      ["git", "-C", str(ROOT), *words], capture_output=True, text=True
    )
  except FileNotFoundError as error:
    raise exits.Failure(
      Exit.BAD_REQUEST, "git must be on PATH, for what is committed is sent."
    ) from error


def commit() -> str:
  """The hash of what is committed.

  Raises:
    Failure: This is no git checkout.
  """
  asked = _git("rev-parse", "--verify", "HEAD^{commit}")
  if asked.returncode:
    raise exits.Failure(
      Exit.BAD_REQUEST,
      f"{ROOT} must be a git checkout with a commit, for what is committed is"
      f" sent: {asked.stderr.strip()}",
    )
  return asked.stdout.strip()


def require_committed(config: str) -> None:
  """Passes a config that the workers will have.

  Raises:
    Failure: It is not in the last commit.
  """
  path = config.partition(":")[0]
  if _git("cat-file", "-e", f"{commit()}:{path}").returncode:
    raise exits.Failure(
      Exit.BAD_REQUEST,
      f"CONFIG ({config!r}) must be a file of the last commit, which is what"
      " the workers have; commit it, or mend the name.",
    )


def uncommitted() -> int:
  """How many files have changes that are not sent."""
  return len(_git("status", "--porcelain").stdout.splitlines())


def setup(cloud: gcloud.Gcloud, num_workers: int) -> str:
  """Gives every worker the committed files and the pinned set, or the image.

  Returns:
    What they have now, for the user.

  Raises:
    Failure: Somewhere it did not work.
  """
  of = cloud.settings
  bucket = of.bucket or ""
  with tempfile.TemporaryDirectory() as folder:
    script = pathlib.Path(folder, gcloud.WORKER_SCRIPT)
    script.write_bytes((ROOT / "launch/pod/worker.sh").read_bytes())
    sent = [str(script)]
    if of.image:
      command = _script("setup-image", of.image, bucket)
      words = of.image
    else:
      words = commit()
      archive = pathlib.Path(folder, _ARCHIVE)
      packed = _git(
        *("archive", "--format=tar.gz", f"--output={archive}", words)
      )
      if packed.returncode:
        raise exits.Failure(Exit.BAD_REQUEST, packed.stderr.strip())
      sent.append(str(archive))
      sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
      command = _script("setup", words, sha256, bucket)
    on_each(cloud, num_workers, lambda worker: cloud.copy(worker, sent))
    on_each(cloud, num_workers, lambda w: cloud.on_worker(w, command))
  return words


def run(cloud: gcloud.Gcloud, num_workers: int, job: Job) -> None:
  """Starts the same command on every worker, and leaves it.

  Raises:
    Failure: Somewhere it did not start.
  """
  of = cloud.settings
  command = _script(
    *("run", of.workdir, of.image, f"--config={job.config}", *job.flags)
  )
  on_each(cloud, num_workers, lambda worker: cloud.on_worker(worker, command))


@dataclasses.dataclass(frozen=True)
class Status:
  """What a worker says of the run on it.

  Attributes:
    state: none, running, ended or lost; lost is gone without an exit code.
    exit_code: Of one that has ended.
    stopped: Whether it was told to end by `stop`.
    commit: What is set up: a commit or an image; empty if nothing is.
    workdir: Its path there.
    step: The last in the workdir's metrics; -1 for none.
    checkpoint: The step of the newest in the workdir; -1 for none.
  """

  state: str
  exit_code: int | None
  stopped: bool
  commit: str
  workdir: str
  step: int
  checkpoint: int

  @classmethod
  def parse(cls, text: str) -> "Status":
    """From the lines of `worker.sh status`."""
    lines = text.splitlines()
    said = dict(line.split("=", 1) for line in lines if "=" in line)
    code = said.get("exit_code", "")
    return cls(
      state=said.get("state", "none"),
      exit_code=int(code) if code else None,
      stopped="stopped" in said,
      commit=said.get("commit", ""),
      workdir=said.get("workdir", ""),
      step=int(said.get("step") or -1),
      checkpoint=int(said.get("checkpoint") or -1),
    )

  def __str__(self) -> str:
    state = {
      "none": "nothing was run",
      "running": "running",
      "ended": f"ended with exit code {self.exit_code}",
      "lost": "lost: the machine restarted, or the run was killed",
    }[self.state]
    what = self.commit or "not set up"
    step = "none" if self.step < 0 else self.step
    checkpoint = "none" if self.checkpoint < 0 else self.checkpoint
    return f"{state}; {what}; last step {step}, newest checkpoint {checkpoint}"


def status_of(cloud: gcloud.Gcloud, worker: int) -> Status:
  """What one worker says.

  Raises:
    Failure: It could not be asked.
  """
  try:
    return Status.parse(cloud.on_worker(worker, _script("status")))
  except exits.Failure as failure:
    if failure.exit == Exit.NOT_SET_UP:
      return Status.parse("")
    raise


def status(cloud: gcloud.Gcloud, num_workers: int) -> list[Status]:
  """What each worker says.

  Raises:
    Failure: Some could not be asked.
  """
  return on_each(cloud, num_workers, lambda worker: status_of(cloud, worker))


def stop(cloud: gcloud.Gcloud, num_workers: int, *, kill: bool) -> None:
  """Has the run save and end, and waits for that.

  Args:
    cloud: Where it runs.
    num_workers: Of the slice.
    kill: Whether to end it all the same if it has not ended in time.

  Raises:
    Failure: Somewhere it goes on, or could not be told.
  """
  command = _script("stop", cloud.settings.grace_seconds)
  command += ["kill"] if kill else []
  on_each(cloud, num_workers, lambda worker: cloud.on_worker(worker, command))


def logs(
  cloud: gcloud.Gcloud, workers: Sequence[int], lines: int, *, follow: bool
) -> None:
  """Prints the end of the logs, with the worker's number if there are several.

  Args:
    cloud: Where they are.
    workers: Whose.
    lines: How many of each.
    follow: Whether to go on with what is written from now on.

  Raises:
    Failure: One could not be read.
  """
  command = _script("logs", str(lines), *(["follow"] if follow else []))
  lock = threading.Lock()
  errors = {}

  def relay(worker: int, process: subprocess.Popen[str]) -> None:
    prefix = f"[worker {worker}] " if len(workers) > 1 else ""
    for line in process.stdout or ():
      with lock:
        sys.stdout.write(prefix + line)
        sys.stdout.flush()

  def keep(worker: int, process: subprocess.Popen[str]) -> None:
    errors[worker] = process.stderr.read() if process.stderr else ""

  processes = {}
  with contextlib.ExitStack() as stack:
    threads = []
    for worker in workers:
      call = cloud.ssh_call(worker, command, _TERMINAL if follow else ())
      pipe = subprocess.PIPE
      process = cloud.start(
        call, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
      )
      processes[worker] = stack.enter_context(process)
      stack.callback(process.terminate)
      for target in (relay, keep):
        threads.append(threading.Thread(target=target, args=(worker, process)))
        threads[-1].daemon = True
        threads[-1].start()
    for thread in threads:
      thread.join()
    for process in processes.values():
      process.wait()
  for worker, process in processes.items():
    cloud.judge(worker, process.returncode, errors[worker])


def tensorboard(cloud: gcloud.Gcloud, port: int) -> None:
  """Shows the curves of the run at a port of this machine, until Ctrl-C.

  Raises:
    Failure: It could not be started.
  """
  forward = [*_TERMINAL, "-L", f"{port}:localhost:{port}"]
  call = cloud.ssh_call(0, _script("tensorboard", str(port)), forward)
  with cloud.start(call, stderr=subprocess.PIPE) as process:
    _, error = process.communicate()
  cloud.judge(0, process.returncode, error)
