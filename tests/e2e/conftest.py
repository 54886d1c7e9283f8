"""The program as users start it, in processes of its own, at a tiny size."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.e2e import hosts

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A start compiles for half a minute, on a machine that may be busy.
TIMEOUT_SECONDS = 400

TINY = (
  "--config.data.prompts_per_step=8",
  "--config.data.prompt_buckets=(64,)",
  "--config.train.num_steps=6",
  "--config.train.microbatch_bundles=4",
  "--config.rollout.num_generations=4",
  "--config.rollout.max_new_tokens=8",
  # Pays whatever is written, so that no step is without a gradient.
  "--config.rewards.length=0.5",
  "--config.rewards.gate_heuristics=False",
  "--config.optimizer.learning_rate=3e-4",
  "--config.optimizer.schedule=constant",
  "--config.eval.num_problems=32",
  "--config.eval.batch_size=16",
  "--config.eval.every_steps=3",
  "--config.samples.every_steps=2",
  "--config.checkpoint.every_steps=2",
)


# Of a run on two hosts.
ON_HOSTS = (
  "--config=configs/smoke.py",
  *TINY,
  "--config.train.num_steps=4",
  "--config.eval.every_steps=3",
  # None but the first and those that a notice asks for.
  "--config.checkpoint.every_steps=100",
  # Several polls to a rollout.
  "--config.rollout.chunk_tokens=2",
  "--config.mesh.fsdp=2",
)


class Program:
  """Starts `python -m MODULE` on one CPU device, from the checkout."""

  def __init__(self, folder: pathlib.Path, compiled: str):
    self._logs = folder / "logs"
    self._logs.mkdir()
    self.environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      # Not the tests' own eight devices, which a user does not have. Most of
      # the time goes into compiling, of which this leaves half.
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
      "JAX_COMPILATION_CACHE_DIR": compiled,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

  def run(self, module: str, *arguments: str) -> None:
    """Runs it to its end, which must be a good one."""
    process, log = self._start(module, arguments)
    try:
      code = process.wait(timeout=TIMEOUT_SECONDS)
    finally:
      process.kill()
    assert code == 0, log.read_text()[-4000:]

  def kill_when(
    self, reached: Callable[[], bool], module: str, *arguments: str
  ) -> None:
    """Sends it SIGKILL, which it cannot notice, as soon as `reached`."""
    process, log = self._start(module, arguments)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
      while not reached():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.002)
    finally:
      process.kill()
    assert process.wait() < 0, "it was done before it could be killed"

  def _start(
    self, module: str, arguments: tuple[str, ...]
  ) -> tuple[subprocess.Popen, pathlib.Path]:
    log = self._logs / f"{len(list(self._logs.iterdir()))}.txt"
    with log.open("wb") as file:
      process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=self.environment,
        stdout=file,
        stderr=subprocess.STDOUT,
      )
    return process, log


def summary(workdir: pathlib.Path) -> dict:
  """What the last process of a run says of its end."""
  return json.loads((workdir / "run.json").read_text())["end"]


class Run:
  """A workdir, the settings of what trains there, and what it has written."""

  def __init__(
    self, program: Program, workdir: pathlib.Path, *settings: str
  ) -> None:
    self.workdir = workdir
    self._program = program
    self._arguments = ("grpo_tpu.main", f"--workdir={workdir}", *settings)

  def start(self, *more: str) -> "Run":
    """Trains to the end, from wherever the workdir stands."""
    self._program.run(*self._arguments, *more)
    return self

  def kill_at(self, step: int) -> None:
    """Starts it, and kills it once this start has written down `step`."""
    metrics = self.workdir / "metrics.jsonl"
    # A start puts a new file in the place of the one it finds.
    before = metrics.stat().st_ino if metrics.exists() else None

    def reached() -> bool:
      if not metrics.exists() or metrics.stat().st_ino == before:
        return False
      return b'{"step": %d,' % step in metrics.read_bytes()

    self._program.kill_when(reached, *self._arguments)

  def kill_once_saved(self, step: int) -> None:
    """Starts it, and kills it once the checkpoint of `step` is there."""
    folder = self.workdir / "checkpoints" / f"{step:08}"
    assert not folder.exists()
    self._program.kill_when(folder.exists, *self._arguments)

  def without_checkpoints_after(self, step: int) -> "Run":
    """A copy, as a kill before the next save would have left it."""
    copy = Run(self._program, self.workdir.with_name("copy"))
    copy._arguments = tuple(
      word.replace(str(self.workdir), str(copy.workdir))
      for word in self._arguments
    )
    shutil.copytree(self.workdir, copy.workdir)
    for path in (copy.workdir / "checkpoints").glob("0*"):
      if int(path.name[:8]) > step:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy

  def rows(self) -> list[dict]:
    """The lines of `metrics.jsonl`."""
    text = (self.workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

  def column(self, name: str) -> list[float]:
    """One metric, over the steps that have it."""
    return [row[name] for row in self.rows() if name in row]


@pytest.fixture(scope="session")
def program(compiled, tmp_path_factory) -> Program:
  """One for the session: what was compiled once is kept for later starts."""
  return Program(tmp_path_factory.mktemp("program"), compiled)


@pytest.fixture(scope="session")
def drawn(program, tmp_path_factory) -> pathlib.Path:
  """A data dir of a few hundred drawn problems."""
  folder = tmp_path_factory.mktemp("drawn") / "data"
  program.run(
    "data_pipelines.prepare",
    "--source=synthetic",
    f"--data_dir={folder}",
    "--num_problems=300",
    "--difficulty=1",
    "--eval_fraction=0.2",
    "--kinds=color,count",
    "--image_size=48",
    "--multi_choice_share=0",
  )
  return folder


@pytest.fixture(scope="session")
def start(program, drawn):
  """Starts two hosts on a workdir."""

  def new(workdir, *settings, fault="", others=None):
    given = (
      *ON_HOSTS,
      f"--config.data.dir={drawn}",
      f"--workdir={workdir}",
      *settings,
    )
    return hosts.Hosts(
      [given, (*given, *(others or ()))],
      program.environment,
      workdir.with_name(f"{workdir.name}-logs"),
      fault=fault,
    )

  return new


@pytest.fixture(scope="session")
def new_run(program, drawn, tmp_path_factory) -> Callable[..., Run]:
  """Makes a tiny run on drawn problems, in a workdir of its own."""

  def new(*settings: str, config: str = "configs/smoke.py") -> Run:
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    data = f"--config.data.dir={drawn}"
    return Run(program, workdir, f"--config={config}", *TINY, data, *settings)

  return new


@pytest.fixture(scope="session")
def unbroken(new_run) -> Run:
  """GRPO from its first step to its last in one go."""
  return new_run().start()


@pytest.fixture(scope="session")
def resumed(new_run) -> Run:
  """The same as `unbroken`, killed twice."""
  run = new_run()
  run.kill_once_saved(2)
  # Evaluated, and newer than the newest checkpoint, whose save has just begun.
  run.kill_at(4)
  assert run.rows()[-1]["step"] >= 4
  return run.start()


@pytest.fixture(scope="session")
def evaluation(program, drawn, unbroken) -> Run:
  """The end of `unbroken` on the held-out problems, by --mode=evaluate."""
  workdir = unbroken.workdir.with_name("evaluation")
  return Run(
    program,
    workdir,
    "--mode=evaluate",
    "--config=configs/smoke.py",
    *TINY,
    f"--config.data.dir={drawn}",
    f"--config.model.weights=run:{unbroken.workdir}",
    "--config.eval.num_samples=2",
    "--config.eval.ks=(1, 2)",
  ).start()
