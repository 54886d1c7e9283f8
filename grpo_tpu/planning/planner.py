"""What a run needs of a slice that is not booked, and what bounds its speed.

Every program of the run is compiled for the described slice in a process of its
own, as far as its memory is known. Times are never measured here: what is
divided by a peak or a bandwidth is a bound that no run can beat.
"""

import concurrent.futures
import dataclasses
import importlib.util
import itertools
import json
import math
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

type Changes = dict[str, Any]  # Settings by name, as in "mesh.fsdp".

# Each takes a core, and a gigabyte or two of this machine's memory.
_MOST_AT_A_TIME = 4


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
  topology: hardware.Topology
  programs: list[dict[str, Any]]
  resident: dict[str, int]

  @property
  def least_bytes(self) -> int:
    """Of a device, whatever runs: parameters, optimizer and reference."""
    return sum(self.resident.values())

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


def parsed(topology: str | None) -> hardware.Topology:
  """The slice, if there is one.

  Raises:
    ValueError: What is wrong, and the nearest that is not.
  """
  if topology is None:
    raise ValueError(
      "--topology must name a slice for --mode=plan; set --topology=v5e:4x4."
    )
  return hardware.parse_topology(topology)


def check(config: run_config.Config, described: hardware.Topology) -> None:
  """Whether the mesh covers the slice.

  Raises:
    ValueError: What is wrong, and the nearest that is not.
  """
  mesh, devices = config.mesh, described.num_devices
  if mesh.replica * mesh.fsdp * mesh.tensor != devices:
    raise ValueError(
      f"mesh.replica * mesh.fsdp * mesh.tensor ({mesh.replica} * {mesh.fsdp} * "
      f"{mesh.tensor}) must equal the {devices} devices of {described}; set "
      f"{_said_nearest(config, described)}."
    )
  if mesh.replica % described.num_slices:
    raise ValueError(
      f"mesh.replica ({mesh.replica}) must be a multiple of the "
      f"{described.num_slices} slices of {described}; set "
      f"{_said_nearest(config, described)}."
    )


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


def nearest_mesh(
  config: run_config.Config, topology: hardware.Topology
) -> Changes:
  """Changes to a mesh for a slice, as near as can be to the run's.

  Tensor shards stay as they are if they can, and replicas too; batches grow to
  what the mesh divides.
  """
  # There is one: a replica on each device suits every model.
  return next(
    changes
    for changes in _meshes(config, topology)
    if changed(config, changes) is not None
  )


def _said_nearest(
  config: run_config.Config, topology: hardware.Topology
) -> str:
  """The same as text."""
  changes = nearest_mesh(config, topology)
  values = {k: v for k, v in changes.items() if k.startswith("mesh.")}
  values |= differing(config, changes)
  return " ".join(f"{name}={value}" for name, value in values.items())


def _meshes(
  config: run_config.Config, topology: hardware.Topology
) -> list[Any]:
  """Changes to each mesh of a slice, those nearest to the run's first."""
  devices, mesh = topology.num_devices, config.mesh
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]

  def distance(shards: tuple[int, int]) -> tuple[float, ...]:
    replica, tensor = shards
    far = abs(math.log(tensor / mesh.tensor))
    return far, abs(math.log(replica / mesh.replica)), tensor, replica

  return [
    on_mesh(config, replica, devices // tensor // replica, tensor)
    for replica, tensor in sorted(
      itertools.product(divisors, divisors), key=distance
    )
    if devices % (tensor * replica) == 0 and replica % topology.num_slices == 0
  ]


def on_mesh(
  config: run_config.Config, replica: int, fsdp: int, tensor: int
) -> Changes:
  """What the run is with on another mesh: batches as near as it divides."""
  shards = replica * fsdp
  prompts = _up(config.data.prompts_per_step, shards)
  sizes = [n for n in range(shards, prompts + 1, shards) if prompts % n == 0]

  def near(size: int) -> int:
    return max((n for n in sizes if n <= size), default=shards)

  at_a_time = config.rollout.prompts_at_a_time
  return {
    "mesh.replica": replica,
    "mesh.fsdp": fsdp,
    "mesh.tensor": tensor,
    "data.prompts_per_step": prompts,
    "train.microbatch_bundles": near(config.train.microbatch_bundles),
    "rollout.prompts_at_a_time": near(at_a_time) if at_a_time else None,
    "eval.batch_size": _up(config.eval.batch_size, shards),
  }


def _up(number: int, unit: int) -> int:
  """The next multiple of a unit."""
  return -(-number // unit) * unit


def changed(
  config: run_config.Config, changes: Changes
) -> run_config.Config | None:
  """The settings with some changed, or None where they break a rule."""
  values = config.to_dict()
  for name, value in changes.items():
    *sections, last = name.split(".")
    place = values
    for section in sections:
      place = place[section]
    place[last] = value
  try:
    return run_config.Config.from_config_dict(values)
  except ValueError:
    return None


def differing(config: run_config.Config, changes: Changes) -> Changes:
  """Those of some changes that change anything."""

  def value(name: str) -> Any:
    place: Any = config
    for part in name.split("."):
      place = getattr(place, part)
    if name == "rollout.prompts_at_a_time" and place is None:
      return changes.get("data.prompts_per_step", config.data.prompts_per_step)
    return place

  return {
    name: new
    for name, new in changes.items()
    if new is not None and new != value(name)
  }


def nothing_compiled(
  config: run_config.Config, topology: hardware.Topology
) -> Plan:
  """What is known of a config on a slice before any program is."""
  return Plan(config, topology, [], programs.resident_bytes(config))


class Compiler:
  """Compiles programs side by side, and remembers what it found of each."""

  def __init__(self, at_a_time: int | None = None):
    """Starts nothing yet.

    Args:
      at_a_time: Processes that compile side by side; None is one for each core
        that there is, up to a few.
    """
    cores = len(os.sched_getaffinity(0))
    self.at_a_time = at_a_time or min(cores, _MOST_AT_A_TIME)
    self._pool = concurrent.futures.ThreadPoolExecutor(self.at_a_time)
    self._known: dict[str, concurrent.futures.Future[dict[str, Any]]] = {}

  @property
  def num_compiled(self) -> int:
    """Programs asked for so far, those asked for again counted once."""
    return len(self._known)

  def plan(
    self,
    config: run_config.Config,
    topology: hardware.Topology,
    names: Sequence[str] | None = None,
  ) -> Plan:
    """What a slice makes of a run.

    Args:
      config: The run's settings.
      topology: The slice.
      names: Of the programs to look at; None is all of them.
    """
    return self.plans([(config, topology)], names)[0]

  def plans(
    self,
    wanted: Sequence[tuple[run_config.Config, hardware.Topology]],
    names: Sequence[str] | None = None,
  ) -> list[Plan]:
    """Several at once, as `plan` has them."""
    found = [
      [
        self._begun(config, topology, name)
        for name in (programs.names(config) if names is None else names)
      ]
      for config, topology in wanted
    ]
    return [
      _assembled(config, topology, [x.result() for x in answers])
      for (config, topology), answers in zip(wanted, found, strict=True)
    ]

  def _begun(self, config, topology, name) -> concurrent.futures.Future:
    key = json.dumps([relevant(config, name), str(topology), name])
    if key not in self._known:
      self._known[key] = self._pool.submit(compiled, config, topology, name)
    return self._known[key]


def relevant(config: run_config.Config, name: str) -> dict[str, Any]:
  """The settings, but for those that are of no matter to a program."""
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


def compiled(
  config: run_config.Config, topology: hardware.Topology, program: str
) -> dict[str, Any]:
  """What a process of its own finds out about one program.

  Raises:
    RuntimeError: It failed, with the end of what it said.
  """
  context = multiprocessing.get_context("forkserver")
  # Imported once, for all of them.
  context.set_forkserver_preload(["grpo_tpu.planning.compile_worker"])
  with tempfile.TemporaryDirectory(prefix="grpo_tpu_plan_") as name:
    folder = pathlib.Path(name)
    process = context.Process(
      target=compile_worker.answer,
      args=(config.to_dict(), str(topology), program, folder),
      daemon=True,
    )
    process.start()
    process.join()
    answer, said = folder / "answer.json", folder / "said.txt"
    if not answer.exists():
      reason = said.read_text()[-4000:] if said.exists() else ""
      raise RuntimeError(
        f"{program} could not be compiled for {topology} "
        f"(exit code {process.exitcode}):\n{reason}"
      )
    logging.info("Compiled %s for %s.", program, topology)
    return json.loads(answer.read_text())


def _assembled(config, topology, answers: list[dict[str, Any]]) -> Plan:
  """The answers, each with what lies beside it and what bounds it."""
  resident = programs.resident_bytes(config)
  rows = []
  for answer in answers:
    by_class = answer["bytes_by_class"]
    beside = answer["kept_bytes"] + sum(
      max(0, size - by_class.get(name, 0)) for name, size in resident.items()
    )
    hbm_bytes = answer["hbm_bytes"]
    known = sum(by_class.values())
    moved = roofline.volume(config, topology, answer["name"])
    defects = roofline.defects(config, answer["collectives"])
    flops = answer["flops"] / topology.num_devices
    least_bytes = (
      roofline.least_hbm_bytes(config, answer["name"]) + answer["rest_bytes"]
    )
    rows.append(
      {
        "name": answer["name"],
        "hbm_bytes": hbm_bytes,
        "hbm_limit_bytes": topology.chip.hbm_limit_bytes,
        "resident_bytes": hbm_bytes + beside,
        "bytes_by_class": by_class | {"temporaries": max(0, hbm_bytes - known)},
        "beside_bytes": beside,
        "flops": answer["flops"],
        "flops_per_device": flops,
        "least_hbm_traffic_bytes": least_bytes,
        "collective_bytes": moved,
        "defects": defects,
        "bounds_seconds": bounds(topology.chip, flops, least_bytes, moved),
        "completion_tokens": answer["completion_tokens"],
        "cpu_seconds": answer["cpu_seconds"],
      }
    )
  return Plan(config, topology, rows, resident)


def bounds(
  chip: hardware.Chip, flops: float, hbm_bytes: float, moved: dict[str, float]
) -> dict[str, float]:
  """Seconds of a call of a program, at least, by what bounds them."""
  per = chip.devices_per_chip
  return {
    "compute": flops * per / chip.peak_flops,
    "hbm": hbm_bytes * per / chip.hbm_bandwidth,
    "ici": moved["ici"] * per / chip.ici_bandwidth,
    "dcn": moved["dcn"] * per / chip.dcn_bandwidth,
  }


def least_step_seconds(
  config: run_config.Config, topology: hardware.Topology
) -> float:
  """A bound of a whole step by the sharding plan alone; nothing is compiled."""
  rows = []
  for name in programs.names(config):
    least_bytes = roofline.least_hbm_bytes(config, name)
    moved = roofline.volume(config, topology, name)
    least = bounds(topology.chip, 0.0, least_bytes, moved)
    rows.append({"name": name, "bounds_seconds": least})
  return max(_step_seconds(config, rows).values())


def step_bounds(made: Plan) -> dict[str, Any]:
  """Bounds of a whole step, each program as often as a step calls it."""
  tokens = max(row["completion_tokens"] for row in made.programs)
  return {
    kind: {
      "step_seconds_at_least": seconds,
      "completion_tokens_per_second_at_most": tokens / seconds,
      "chip_hours_per_1000_steps_at_least": seconds
      * made.topology.num_chips
      * 1000
      / 3600,
    }
    for kind, seconds in _step_seconds(made.config, made.programs).items()
  }


def _step_seconds(
  config: run_config.Config, rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
  """Of steps of text and of images, if the model sees these."""
  rollouts, shards = config.num_rollouts, config.mesh.replica * config.mesh.fsdp
  chunks = (config.rollout.max_new_tokens - 1) / roofline.decode_trips(config)
  pictures = config.data.prompts_per_step / config.rollout.pictures_per_shard
  times = {
    "pictures": math.ceil(pictures / shards),
    "prefill": rollouts,
    "decode_chunk": chunks * rollouts,
    "results": rollouts,
    "train_step": config.train.num_iterations,
    # Rows that never end never move, and an evaluation is no part of a step.
    "move": 0,
  }
  return {
    kind: sum(
      times.get(programs.step_of(row["name"]), 1)
      * max(row["bounds_seconds"].values())
      for row in rows
      if programs.part_of(row["name"]) != "evaluation"
      and (kind in row["name"] or "(" not in row["name"])
    )
    for kind in ("text", "image")
    if any(kind in row["name"] for row in rows)
  }
