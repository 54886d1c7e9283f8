"""Compiles the programs of a run for a described slice and sums up their needs.

Each program is compiled in a process of its own until its memory is known.
Times are never measured here: seconds are quotients of work and the makers'
peaks, and bounds that no run can beat.
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import logging

from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware
from grpo_tpu.planning import compile_worker, programs, roofline

# Each process takes a core and one or two gigabytes of this machine's memory.
_MAX_PROCESSES = 4


@dataclasses.dataclass(frozen=True)
class Plan:
  """The needs of a run on a slice.

  Attributes:
    config: The run's settings.
    topology: The slice.
    programs: One dict per program, as in `plan.json`.
    resident: Bytes per device that stay between programs, by class.
  """

  config: run_config.Config
  topology: hardware.Topology
  programs: list[dict[str, Any]]
  resident: dict[str, int]

  @property
  def peak(self) -> dict[str, Any]:
    """The program that needs most memory, resident arrays included."""
    return max(self.programs, key=lambda x: x["resident_bytes"])

  @property
  def room(self) -> float:
    """Free share of a device's memory at the peak; negative if it overflows."""
    limit = self.topology.chip.hbm_limit_bytes
    return 1 - self.peak["resident_bytes"] / limit

  def fits(self, margin: float = 0.0) -> bool:
    """Returns True if at least this share of the memory stays free."""
    return self.room >= margin

  def step_bounds(self) -> dict[str, Any]:
    """Bounds of a whole step; see `roofline.step_bounds`."""
    return roofline.step_bounds(self.config, self.topology, self.programs)

  def to_dict(self) -> dict[str, Any]:
    """The contents of `plan.json`."""
    return {
      "topology": str(self.topology),
      "slice": self.topology.slice_name,
      "chips": self.topology.num_chips,
      "model": self.config.model.name,
      "fits": self.fits(),
      "room": self.room,
      "hbm_limit_bytes": self.topology.chip.hbm_limit_bytes,
      "resident_bytes_by_class": self.resident,
      "programs": self.programs,
      "bounds": self.step_bounds(),
      "config": self.config.to_dict(),
    }


def check_compiler() -> None:
  """Checks that this machine has the compiler for TPUs.

  Raises:
    ValueError: It has not; the message says how to get it.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "--mode=plan needs libtpu, the compiler for TPUs, which runs without a "
      "TPU on Linux x86_64; install it there with "
      "`pip install -e '.[tpu]' -c constraints.txt`. macOS and arm64 have no "
      "libtpu: plan in a Linux x86_64 container or VM."
    )


class Compiler:
  """Compiles programs in parallel, each one only once."""

  def __init__(self, num_processes: int | None = None):
    """Starts no process yet.

    Args:
      num_processes: Programs compiled in parallel; None for one per core, up to
        a limit.
    """
    cores = len(os.sched_getaffinity(0))
    self.num_processes = num_processes or min(cores, _MAX_PROCESSES)
    self._pool = concurrent.futures.ThreadPoolExecutor(self.num_processes)
    self._compiled: dict[str, concurrent.futures.Future[dict[str, Any]]] = {}

  @property
  def num_compiled(self) -> int:
    """Number of different programs compiled so far."""
    return len(self._compiled)

  def plan(
    self,
    config: run_config.Config,
    topology: hardware.Topology,
    names: Sequence[str] | None = None,
  ) -> Plan:
    """Compiles a run's programs for a slice.

    Args:
      config: The run's settings.
      topology: The slice.
      names: The programs to compile; None for all.
    """
    names = programs.names(config) if names is None else names
    futures = [self._submit(config, topology, name) for name in names]
    return _make_plan(config, topology, [x.result() for x in futures])

  def _submit(
    self, config: run_config.Config, topology: hardware.Topology, name: str
  ) -> concurrent.futures.Future[dict[str, Any]]:
    key = json.dumps([relevant_settings(config, name), str(topology), name])
    if key not in self._compiled:
      self._compiled[key] = self._pool.submit(
        compile_program, config, topology, name
      )
    return self._compiled[key]


def relevant_settings(config: run_config.Config, name: str) -> dict[str, Any]:
  """The settings, without those that cannot change the program `name`."""
  values, part = config.to_dict(), programs.part_of(name)
  model, rollout = values["model"], values["rollout"]
  if not programs.reads_pixels(config, name):
    model["image_size"] = None
  if part != "update":
    values["train"] = model["remat"] = None
  if part != "pictures":
    rollout["pictures_per_shard"] = None
  if part != "rollout":
    rollout["prompts_at_a_time"] = None
  if part == "evaluation":
    values["data"]["prompts_per_step"] = None
  else:
    values["eval"] = None
  return values


def compile_program(
  config: run_config.Config, topology: hardware.Topology, name: str
) -> dict[str, Any]:
  """Compiles one program in a process of its own.

  Raises:
    RuntimeError: The process failed; the message ends with its output.
  """
  context = multiprocessing.get_context("forkserver")
  # The server imports the module once for all of its processes.
  context.set_forkserver_preload([compile_worker.__name__])
  with tempfile.TemporaryDirectory(prefix="grpo_tpu_plan_") as temporary:
    folder = pathlib.Path(temporary)
    process = context.Process(
      target=compile_worker.run,
      args=(config.to_dict(), str(topology), name, folder),
      daemon=True,
    )
    process.start()
    process.join()
    answer = folder / compile_worker.ANSWER
    output = folder / compile_worker.OUTPUT
    if not answer.exists():
      reason = output.read_text()[-4000:] if output.exists() else ""
      raise RuntimeError(
        f"{name} could not be compiled for {topology} "
        f"(exit code {process.exitcode}):\n{reason}"
      )
    logging.info("Compiled %s for %s.", name, topology)
    return json.loads(answer.read_text())


def _make_plan(
  config: run_config.Config,
  topology: hardware.Topology,
  answers: list[dict[str, Any]],
) -> Plan:
  """Adds the resident arrays and the bounds to the compiled programs."""
  resident = programs.resident_bytes(config)
  rows = []
  for answer in answers:
    name, by_class = answer["name"], answer["bytes_by_class"]
    hbm_bytes = answer["hbm_bytes"]
    beside = answer["kept_bytes"] + sum(
      max(0, size - by_class.get(kind, 0)) for kind, size in resident.items()
    )
    temporaries = max(0, hbm_bytes - sum(by_class.values()))
    flops = answer["flops"] / topology.num_devices
    least_bytes = roofline.least_hbm_bytes(config, name) + answer["rest_bytes"]
    sent = roofline.sent_bytes(config, topology, name)
    rows.append(
      {
        "name": name,
        "hbm_bytes": hbm_bytes,
        "hbm_limit_bytes": topology.chip.hbm_limit_bytes,
        "resident_bytes": hbm_bytes + beside,
        "bytes_by_class": by_class | {"temporaries": temporaries},
        "beside_bytes": beside,
        "flops": answer["flops"],
        "flops_per_device": flops,
        "least_hbm_traffic_bytes": least_bytes,
        "collective_bytes": sent,
        "defects": roofline.find_defects(config, answer["collectives"]),
        "bounds_seconds": roofline.bounds_seconds(
          topology.chip, flops, least_bytes, sent
        ),
        "completion_tokens": answer["completion_tokens"],
        "cpu_seconds": answer["cpu_seconds"],
      }
    )
  return Plan(config, topology, rows, resident)
