"""Changes to a run's settings: applies them, and fits a run to another mesh."""

import itertools
import math
import operator
import shlex
from typing import Any

from grpo_tpu.config.schema import Config
from grpo_tpu.distributed.hardware import Topology

type Changes = dict[str, Any]  # New values by setting, as in {"mesh.fsdp": 8}.


def apply_changes(config: Config, changes: Changes) -> Config | None:
  """The changed settings, or None if they break a rule."""
  values = config.to_dict()
  for name, value in changes.items():
    section, setting = name.split(".")
    values[section][setting] = value
  try:
    return Config.from_config_dict(values)
  except ValueError:
    return None


def drop_unchanged(config: Config, changes: Changes) -> Changes:
  """Drops the changes that set what the settings already have."""

  def current(name: str) -> Any:
    value = operator.attrgetter(name)(config)
    if name == "rollout.prompts_at_a_time" and value is None:
      return changes.get("data.prompts_per_step", config.data.prompts_per_step)
    return value

  return {
    name: new
    for name, new in changes.items()
    if new is not None and new != current(name)
  }


def format_flags(changes: Changes) -> str:
  """The changes as flags, quoted for a shell."""
  return " ".join(
    shlex.quote(f"--config.{name}={value}") for name, value in changes.items()
  )


def data_shards(config: Config) -> int:
  """Number of parts that the mesh cuts a batch into."""
  return config.mesh.replica * config.mesh.fsdp


def check_mesh(config: Config, topology: Topology) -> None:
  """Checks that the mesh covers the slice.

  Raises:
    ValueError: It does not; the message names the nearest mesh that does.
  """
  mesh, devices = config.mesh, topology.num_devices
  if mesh.replica * mesh.fsdp * mesh.tensor != devices:
    rule = (
      f"mesh.replica * mesh.fsdp * mesh.tensor ({mesh.replica} * {mesh.fsdp} * "
      f"{mesh.tensor}) must equal the {devices} devices of {topology}"
    )
  elif mesh.replica % topology.num_slices:
    rule = (
      f"mesh.replica ({mesh.replica}) must be a multiple of the "
      f"{topology.num_slices} slices of {topology}"
    )
  else:
    return
  changes = nearest_mesh(config, topology)
  values = {k: v for k, v in changes.items() if k.startswith("mesh.")}
  values |= drop_unchanged(config, changes)
  settings = " ".join(f"{name}={value}" for name, value in values.items())
  raise ValueError(f"{rule}; set {settings}.")


def nearest_mesh(config: Config, topology: Topology) -> Changes:
  """Changes to the mesh for a slice that is nearest to the run's mesh.

  Keeps the number of tensor shards if possible, then the number of replicas.
  Batches grow to a multiple of the mesh's shards.
  """
  devices, mesh = topology.num_devices, config.mesh
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]

  def distance(shards: tuple[int, int]) -> tuple[float, ...]:
    replica, tensor = shards
    far = abs(math.log(tensor / mesh.tensor))
    return far, abs(math.log(replica / mesh.replica)), tensor, replica

  pairs = itertools.product(divisors, divisors)
  for replica, tensor in sorted(pairs, key=distance):
    if devices % (tensor * replica) or replica % topology.num_slices:
      continue
    fsdp = devices // tensor // replica
    changes = change_mesh(config, replica, fsdp, tensor)
    if apply_changes(config, changes):
      return changes
  raise AssertionError("every model suits a mesh of replicas alone")


def change_mesh(
  config: Config, replica: int, fsdp: int, tensor: int
) -> Changes:
  """Changes to a mesh, with batch sizes as near as the mesh divides them."""
  shards = replica * fsdp
  prompts = _round_up(config.data.prompts_per_step, shards)
  sizes = [n for n in range(shards, prompts + 1, shards) if prompts % n == 0]

  def at_most(size: int) -> int:
    return max((n for n in sizes if n <= size), default=shards)

  at_a_time = config.rollout.prompts_at_a_time
  return {
    "mesh.replica": replica,
    "mesh.fsdp": fsdp,
    "mesh.tensor": tensor,
    "data.prompts_per_step": prompts,
    "train.microbatch_bundles": at_most(config.train.microbatch_bundles),
    "rollout.prompts_at_a_time": at_most(at_a_time) if at_a_time else None,
    "eval.batch_size": _round_up(config.eval.batch_size, shards),
  }


def _round_up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple
