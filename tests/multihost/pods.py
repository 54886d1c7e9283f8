"""Pods on loopback for tests: `launch/local_pod.sh`, at a tiny size.

What is compiled once is kept for later starts, and only the first process of a
topology writes it down; so tests share one `Machine` and few topologies.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

from pyarrow import parquet

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Several processes compile at a time, on a machine that may be busy.
TIMEOUT_SECONDS = 600
TINY = (
  "--config=configs/smoke.py",
  "--config.data.prompts_per_step=8",
  "--config.data.prompt_buckets=(64,)",
  "--config.train.num_steps=5",
  "--config.train.microbatch_bundles=4",
  "--config.rollout.num_generations=4",
  "--config.rollout.max_new_tokens=6",
  # Pays whatever is written, so that no step is without a gradient.
  "--config.rewards.length=0.5",
  "--config.rewards.gate_heuristics=False",
  # At ratio 1 the loss is 0 but for rounding; its KL is not.
  "--config.objective.beta=0.1",
  "--config.optimizer.learning_rate=3e-4",
  "--config.optimizer.schedule=constant",
  "--config.model.remat=none",
  "--config.eval.every_steps=0",
  "--config.samples.every_steps=1",
  "--config.samples.count=8",
  "--config.checkpoint.every_steps=2",
)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Hosts, devices of each, and how the mesh lies over them."""

  hosts: int
  devices: int
  fsdp: int
  tensor: int
  replica: int = 1

  def __str__(self) -> str:
    mesh = f"{self.replica}x{self.fsdp}x{self.tensor}"
    return f"{self.hosts} hosts of {self.devices} on {mesh}"


class Machine:
  """Where pods run: one data dir, one cache of compiled programs."""

  def __init__(self, folder: pathlib.Path, compiled: str):
    self.data = folder / "data"
    self.environment = os.environ | {
      "PYTHON": sys.executable,
      "GRPO_TPU_PYTHON": str(ROOT / "tests" / "faults.sh"),
      # Not the tests' own eight devices; half of the time to compile.
      "XLA_FLAGS": "--xla_backend_optimization_level=0"
      " --xla_llvm_disable_expensive_passes=true",
      "JAX_COMPILATION_CACHE_DIR": compiled,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    _prepare(
      *("--source=synthetic", f"--data_dir={self.data}"),
      *("--num_problems=300", "--kinds=color,count", "--image_size=48"),
      "--multi_choice_share=0",
    )

  def mixture(self) -> str:
    """The setting for seven prompts with a picture to three of text."""
    text = self.data.with_name("sums")
    lines = [
      json.dumps({"question": f"{n} + {n % 7}?", "answer": n + n % 7})
      for n in range(100)
    ]
    source = self.data.with_name("sums.jsonl")
    source.write_text("\n".join(lines))
    if not text.exists():
      _prepare(f"--source={source}", f"--data_dir={text}")
    dirs = ((str(self.data), 0.7), (str(text), 0.3))
    return f"--config.data.dirs={dirs}"


def _prepare(*arguments: str) -> None:
  subprocess.run(
    [sys.executable, "-m", "data_pipelines.prepare", *arguments],
    cwd=ROOT,
    check=True,
    capture_output=True,
  )


class Pod:
  """A workdir, started on one topology after another."""

  def __init__(
    self, machine: Machine, workdir: pathlib.Path, *settings: str
  ) -> None:
    self.workdir = workdir
    self._machine, self._settings = machine, settings
    if not any(each.startswith("--config.data.dir") for each in settings):
      self._settings = (*settings, f"--config.data.dir={machine.data}")

  def start(self, topology: Topology, fault: str = "") -> int:
    """Trains until the end or the fault; the exit code of the pod."""
    return subprocess.run(
      [
        *("bash", str(ROOT / "launch" / "local_pod.sh")),
        *("-n", str(topology.hosts), "-m", str(topology.devices), "--"),
        *TINY,
        f"--workdir={self.workdir}",
        f"--config.mesh.fsdp={topology.fsdp}",
        f"--config.mesh.tensor={topology.tensor}",
        f"--config.mesh.replica={topology.replica}",
        *self._settings,
      ],
      env=self._machine.environment | {"FAULT": fault},
      cwd=ROOT,
      timeout=TIMEOUT_SECONDS,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    ).returncode

  def finish(self, topology: Topology) -> "Pod":
    """Trains to the end, which must be a good one."""
    code = self.start(topology)
    assert code == 0, f"exit code {code}\n{self.log(0)}"
    return self

  def copy(self, workdir: pathlib.Path) -> "Pod":
    """The same run as it stands, to be continued in another workdir."""
    shutil.copytree(self.workdir, workdir)
    return Pod(self._machine, workdir, *self._settings)

  def log(self, host: int) -> str:
    """The end of what a host has said."""
    path = self.workdir / "logs" / f"host-{host}.log"
    return path.read_text()[-4000:]

  def rows(self) -> list[dict]:
    """What a restart must not change: `metrics.jsonl` but for the clock."""
    text = (self.workdir / "metrics.jsonl").read_text()
    return [
      {
        name: value
        for name, value in json.loads(line).items()
        if not name.startswith(("perf/", "checkpoint/", "goodput/"))
      }
      for line in text.splitlines()
    ]

  def samples(self) -> list[dict]:
    """All completions of every step, in the order of the batch."""
    files = sorted((self.workdir / "samples").glob("*.parquet"))
    return [row for x in files for row in parquet.read_table(x).to_pylist()]
