"""What a run needs of a slice that is not booked, and what bounds its speed.

Every program of the run is compiled for the described slice in a process of its
own, as far as its memory is known. Times are never measured here: what is
divided by a peak or a bandwidth is a bound that no run can beat.
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from grpo_tpu import aot, chips, programs, sharding, traffic
from grpo_tpu import config as run_config

_AT_A_TIME = 2


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a config on a slice.

  Attributes:
    config: The run's settings.
    topology: The slice.
    programs: As `plan.json` has them.
    resident: Bytes of a device by class, whatever runs.
  """

  config: run_config.Config
  topology: chips.Topology
  programs: list[dict[str, Any]]
  resident: dict[str, int]

  @property
  def peak(self) -> dict[str, Any]:
    """The program that needs most, with what lies beside it."""
    return max(self.programs, key=lambda x: x["resident_bytes"])

  @property
  def room(self) -> float:
    """Share of a device's memory that is free at the peak; below 0, lacking."""
    limit = self.topology.chip.hbm_limit_bytes
    return 1 - self.peak["resident_bytes"] / limit

  def fits(self, margin: float = 0.0) -> bool:
    """Whether that much of the memory stays free."""
    return self.room >= margin

  def to_dict(self) -> dict[str, Any]:
    """As `plan.json` holds it."""
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
      "bounds": step_bounds(self),
      "config": self.config.to_dict(),
    }


def check(config: run_config.Config, topology: str | None) -> chips.Topology:
  """The slice, if there is one, and the mesh covers it.

  Raises:
    ValueError: What is wrong, and the nearest that is not.
  """
  if topology is None:
    raise ValueError(
      "--topology must name a slice for --mode=plan; set --topology=v5e:4x4."
    )
  described = chips.parse(topology)
  mesh, devices = config.mesh, described.num_devices
  if mesh.replica * mesh.fsdp * mesh.tensor != devices:
    near = nearest_mesh(config, devices)
    raise ValueError(
      f"mesh.replica * mesh.fsdp * mesh.tensor ({mesh.replica} * {mesh.fsdp} * "
      f"{mesh.tensor}) must equal the {devices} devices of {described}; set "
      f"{near}."
    )
  if mesh.replica % described.num_slices:
    raise ValueError(
      f"mesh.replica ({mesh.replica}) must be a multiple of the "
      f"{described.num_slices} slices of {described}; set "
      f"mesh.replica={described.num_slices} and mesh.fsdp="
      f"{devices // described.num_slices // mesh.tensor}."
    )
  _check_divides(config)
  return described


def check_compiler() -> None:
  """Whether this machine has the compiler for TPUs.

  Raises:
    ValueError: It has not, and how to get it.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "--mode=plan must have libtpu, the compiler for TPUs, which needs no TPU "
      "but Linux on x86_64; there, install it with "
      "`pip install -e '.[tpu]' -c constraints.txt`. For macOS and arm64 there "
      "is none: plan in a Linux x86_64 container or VM."
    )


def nearest_mesh(config: run_config.Config, devices: int) -> str:
  """Settings of a mesh for that many devices, as near as can be to the run's.

  Tensor shards stay as they are if they can, and replicas too.
  """
  tensor = config.mesh.tensor
  while devices % tensor:
    tensor -= 1
  replica = config.mesh.replica
  while devices // tensor % replica:
    replica -= 1
  fsdp = devices // tensor // replica
  said = f"mesh.replica={replica} mesh.fsdp={fsdp} mesh.tensor={tensor}"
  shards = replica * fsdp
  if config.data.prompts_per_step % shards:
    prompts = -(-config.data.prompts_per_step // shards) * shards
    said += f" data.prompts_per_step={prompts}"
  return said


def _check_divides(config: run_config.Config) -> None:
  """Whether every parameter's axes are divided by the mesh's."""
  shape = dataclasses.asdict(config.mesh)
  mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
  sharding.shardings(mesh, programs.trained_shapes(config))


def plan(
  config: run_config.Config,
  topology: chips.Topology,
  at_a_time: int = _AT_A_TIME,
) -> Plan:
  """Compiles every program of a run for a slice.

  Args:
    config: The run's settings.
    topology: The slice.
    at_a_time: Processes that compile side by side.
  """
  return plans([(config, topology)], at_a_time)[0]


def plans(
  wanted: Sequence[tuple[run_config.Config, chips.Topology]],
  at_a_time: int = _AT_A_TIME,
) -> list[Plan]:
  """Several plans at once; every program is a process of its own.

  Args:
    wanted: Settings and slices.
    at_a_time: Processes that compile side by side.
  """
  with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
    answers = [
      [
        pool.submit(compiled, config, topology, name)
        for name in programs.names(config)
      ]
      for config, topology in wanted
    ]
    return [
      _assembled(config, topology, [x.result() for x in futures])
      for (config, topology), futures in zip(wanted, answers, strict=True)
    ]


def compiled(
  config: run_config.Config, topology: chips.Topology, program: str
) -> dict[str, Any]:
  """What a process of its own finds out about one program.

  Raises:
    RuntimeError: It failed, with the end of what it said.
  """
  with tempfile.TemporaryDirectory(prefix="grpo_tpu_plan_") as folder:
    answer = pathlib.Path(folder) / "answer.json"
    request = {
      "config": config.to_dict(),
      "topology": str(topology),
      "program": program,
      "folder": f"{folder}/dump",
      "answer": str(answer),
    }
    done = subprocess.run(
      [sys.executable, "-m", "grpo_tpu.aot"],
      input=json.dumps(request),
      env=os.environ | aot.ENVIRONMENT | {"TMPDIR": folder},
      capture_output=True,
      text=True,
    )
    if done.returncode or not answer.exists():
      raise RuntimeError(
        f"{program} could not be compiled for {topology}:\n"
        + done.stderr[-4000:]
      )
    logging.info("Compiled %s for %s.", program, topology)
    return json.loads(answer.read_text())


def _assembled(config, topology, answers: list[dict[str, Any]]) -> Plan:
  """The answers, each with what lies beside it and what bounds it."""
  resident: dict[str, int] = dict(answers[0]["resident"])
  rows = []
  for answer in answers:
    by_class = answer["bytes_by_class"]
    beside = sum(
      size for name, size in resident.items() if name not in by_class
    )
    hbm_bytes = answer["hbm_bytes"]
    known = sum(by_class.values())
    moved = traffic.volume(config, topology, answer["name"])
    defects = traffic.defects(config, answer["collectives"])
    chip, per = topology.chip, topology.chip.devices_per_chip
    flops = answer["flops"] / topology.num_devices
    least_bytes = (
      traffic.least_hbm_bytes(config, answer["name"]) + answer["rest_bytes"]
    )
    rows.append(
      {
        "name": answer["name"],
        "hbm_bytes": hbm_bytes,
        "hbm_limit_bytes": chip.hbm_limit_bytes,
        "resident_bytes": hbm_bytes + beside,
        "bytes_by_class": by_class | {"temporaries": max(0, hbm_bytes - known)},
        "beside_bytes": beside,
        "flops": answer["flops"],
        "flops_per_device": flops,
        "least_hbm_traffic_bytes": least_bytes,
        "collective_bytes": moved,
        "defects": defects,
        "bounds_seconds": {
          "compute": flops * per / chip.peak_flops,
          "hbm": least_bytes * per / chip.hbm_bandwidth,
          "ici": moved["ici"] * per / chip.ici_bandwidth,
          "dcn": moved["dcn"] * per / chip.dcn_bandwidth,
        },
        "completion_tokens": answer["completion_tokens"],
        "cpu_seconds": answer["cpu_seconds"],
      }
    )
  return Plan(config, topology, rows, resident)


def step_bounds(made: Plan) -> dict[str, Any]:
  """Bounds of a whole step, each program as often as a step calls it."""
  config = made.config
  times = {
    "train_step": config.train.num_iterations,
    "decode_chunk": (config.rollout.max_new_tokens - 1)
    / traffic.decode_trips(config),
  }
  bounds = {}
  for kind in ("text", "image"):
    rows = [
      row
      for row in made.programs
      if kind in row["name"] or "(" not in row["name"]
    ]
    if not any(kind in row["name"] for row in rows):
      continue
    seconds = sum(
      times.get(row["name"].partition(" ")[0], 1)
      * max(row["bounds_seconds"].values())
      for row in rows
    )
    tokens = max(row["completion_tokens"] for row in rows)
    bounds[kind] = {
      "step_seconds_at_least": seconds,
      "completion_tokens_per_second_at_most": tokens / seconds,
      "chip_hours_per_1000_steps_at_least": seconds
      * made.topology.num_chips
      * 1000
      / 3600,
    }
  return bounds
