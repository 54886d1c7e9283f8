"""Which settings make the largest step that fits on a slice.

A step is larger the more prompts are decoded together, the fewer times weights
travel for an update, and the less of it is recomputed. What is advised was
compiled; nothing is extrapolated.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

from grpo_tpu import chips, planning, programs, traffic
from grpo_tpu import config as run_config
from grpo_tpu.gemma3 import remat

# What advice leaves free: the runtime's own part, and fragments.
MARGIN = 0.1
_TENSORS = (1, 2, 4, 8, 16)
_LEAST_MEMORY = {"model.remat": remat.POLICIES[-1]}

type Changes = dict[str, Any]


class Advice(NamedTuple):
  """The largest step that fits.

  Attributes:
    changes: Settings by name, that the run has otherwise.
    made: The plan of the run with these.
    num_compiled: Programs that it took to find out.
  """

  changes: Changes
  made: planning.Plan
  num_compiled: int

  def __str__(self) -> str:
    said = (
      f"The largest step that leaves {MARGIN:.0%} free on {self.made.topology} "
      f"leaves {self.made.room:.1%}; {self.num_compiled} programs were "
      "compiled to find it."
    )
    if not self.changes:
      return f"{said} It is the one that the settings have."
    return f"{said} Set\n\n  {flags(self.changes)}"


def advise(
  config: run_config.Config,
  topology: chips.Topology,
  compiler: planning.Compiler,
) -> Advice:
  """The largest step that fits with `MARGIN` free.

  Prompts as long as the settings want are kept if any mesh has room for them.
  Meshes come in the order of their bounds; on the first on which anything fits,
  the most prompts are decoded at a time, and updates have the cheapest remat
  and, with it, the most bundles at a time.

  Args:
    config: The run's settings; its mesh need not be one for the slice.
    topology: The slice.
    compiler: What compiles.

  Raises:
    SettingError: Nothing fits.
  """
  for buckets in _shorter(config.data.prompt_buckets):
    for mesh in meshes(config, topology):
      base = mesh | {"data.prompt_buckets": buckets}
      largest = _largest(config, base, topology, compiler)
      if largest is None:
        continue
      changes = _changes(config, largest)
      made = compiler.plan(_with(config, changes), topology)
      if made.fits(MARGIN):
        return Advice(changes, made, compiler.num_compiled)
  raise run_config.SettingError(
    f"--topology ({topology}) must have room for {config.model.name} with "
    f"{MARGIN:.0%} free, and with none of the meshes, remat policies, "
    "microbatches and prompt buckets it has; set model.lora.rank=16, or choose "
    f"a larger slice than {topology}."
  )


def nearest_that_fits(
  made: planning.Plan, compiler: planning.Compiler
) -> tuple[Changes, chips.Topology] | None:
  """What to change for a run that does not fit, and the slice that it fits on.

  First what costs nothing but time on the same slice, then larger slices; each
  is compiled before it is named.
  """
  wanted = [(changes, made.topology) for changes in _smaller(made.config)]
  for topology in chips.larger(made.topology):
    on_larger = _on_larger(made.config, topology)
    wanted += [(on_larger, topology), (_LEAST_MEMORY | on_larger, topology)]
  for changes, topology in wanted:
    config = changed(made.config, changes)
    if config and fits(config, topology, compiler, margin=0.0):
      return _changes(made.config, changes), topology
  return None


def fits(
  config: run_config.Config,
  topology: chips.Topology,
  compiler: planning.Compiler,
  *,
  margin: float,
  wanted: Callable[[str], bool] = lambda name: True,
) -> bool:
  """Whether that much of the memory stays free; compiles what it must.

  Args:
    config: The run's settings.
    topology: The slice.
    compiler: What compiles.
    margin: A share.
    wanted: Which programs matter, by name.
  """
  limit = topology.chip.hbm_limit_bytes
  if sum(programs.resident_bytes(config).values()) > (1 - margin) * limit:
    return False  # Whatever the programs are.
  names = [name for name in programs.names(config) if wanted(name)]
  made = compiler.plan(config, topology, names)
  logging.info(
    "%s on %s: %.1f%% free.", _said(config), topology, 100 * made.room
  )
  return made.fits(margin)


def _said(config: run_config.Config) -> str:
  mesh = config.mesh
  return (
    f"mesh {mesh.replica} x {mesh.fsdp} x {mesh.tensor}, "
    f"{config.rollout.prompts_at_a_time or config.data.prompts_per_step} "
    f"prompts at a time, {config.train.microbatch_bundles} in a microbatch, "
    f"remat {config.model.remat}"
  )


def _largest(
  config: run_config.Config,
  base: Changes,
  topology: chips.Topology,
  compiler: planning.Compiler,
) -> Changes | None:
  """The largest step on a mesh with some buckets, or None if there is none."""
  # With an image where the model sees them: what is advised is planned whole.
  kind = "(image)" if config.model_config.vision else "(text)"

  def first(name: str, values: Iterable, rest: Changes, samples: bool):
    for value in values:
      new = changed(config, base | rest | {name: value})
      if new is not None and fits(
        new,
        topology,
        compiler,
        margin=MARGIN,
        wanted=lambda name: (
          programs.samples(name) == samples
          and (kind in name or "(" not in name)
        ),
      ):
        return value
    return None

  sizes = _sizes(config, base)
  least = {"train.microbatch_bundles": sizes[-1]}
  prompts, micro = "rollout.prompts_at_a_time", "train.microbatch_bundles"
  at_a_time = sizes[0]
  if config.data.kind == "online":
    at_a_time = first(prompts, sizes, least | _LEAST_MEMORY, True)
    if at_a_time is None:
      return None
  base = base | {prompts: at_a_time}
  policy = first("model.remat", remat.POLICIES, least, False)
  if policy is None:
    return None
  base = base | {"model.remat": policy}
  return base | {micro: first(micro, sizes, {}, False)}


def meshes(
  config: run_config.Config, topology: chips.Topology
) -> list[dict[str, int]]:
  """Meshes that the run's prompts divide over, the least bound first."""
  found = []
  replica, devices = topology.num_slices, topology.num_devices
  for tensor in _TENSORS:
    if devices % (tensor * replica):
      continue
    mesh = {
      "mesh.replica": replica,
      "mesh.fsdp": devices // tensor // replica,
      "mesh.tensor": tensor,
      "eval.batch_size": _up(config.eval.batch_size, devices // tensor),
    }
    shards = devices // tensor
    new = changed(
      config,
      mesh
      | {
        "train.microbatch_bundles": shards,
        "rollout.prompts_at_a_time": None,
      },
    )
    if new is not None:
      found.append((_bound(new, topology), tensor, mesh))
  return [mesh for _, _, mesh in sorted(found, key=lambda x: x[:2])]


def _bound(config: run_config.Config, topology: chips.Topology) -> float:
  """Seconds of moving between chips in a step, at least."""
  chip = topology.chip
  chunks = config.rollout.max_new_tokens / traffic.decode_trips(config)
  steps = {"train_step": 1.0}
  if config.data.kind == "online":
    steps |= {"prefill": 1.0, "decode_chunk": chunks}
  moved = [
    (times, traffic.volume(config, topology, step))
    for step, times in steps.items()
  ]
  return sum(
    times * (x["ici"] / chip.ici_bandwidth + x["dcn"] / chip.dcn_bandwidth)
    for times, x in moved
  )


def _shorter(buckets: Sequence[int]) -> Iterator[tuple[int, ...]]:
  """All of them, then fewer and fewer of the longest."""
  for count in range(len(buckets), 0, -1):
    yield tuple(buckets[:count])


def _sizes(config: run_config.Config, mesh: Changes) -> list[int]:
  """Prompts that divide the batch and that the mesh divides, most first."""
  shards = mesh["mesh.replica"] * mesh["mesh.fsdp"]
  prompts = config.data.prompts_per_step
  return [
    size
    for size in range(prompts, 0, -1)
    if prompts % size == 0 and size % shards == 0
  ]


def _smaller(config: run_config.Config) -> Iterator[Changes]:
  """Changes that take less memory and leave what is learnt as it is."""
  least = config.mesh.replica * config.mesh.fsdp
  yield (
    changes := {
      "train.microbatch_bundles": least,
      "rollout.prompts_at_a_time": least,
      "rollout.pictures_per_shard": 1,
      "model.remat": "full",
    }
  )
  yield (changes := changes | _LEAST_MEMORY)
  if config.has_reference and config.lora is None:
    yield changes | {"model.reference_memory": "pinned_host"}


def _on_larger(config: run_config.Config, topology: chips.Topology) -> Changes:
  """The mesh's data shards grow with the slice, and batches with these."""
  tensor = config.mesh.tensor
  shards = topology.num_devices // tensor
  prompts = _up(config.data.prompts_per_step, shards)
  return {
    "mesh.replica": topology.num_slices,
    "mesh.fsdp": shards // topology.num_slices,
    "data.prompts_per_step": prompts,
    "train.microbatch_bundles": shards,
    "rollout.prompts_at_a_time": prompts,
    "eval.batch_size": _up(config.eval.batch_size, shards),
  }


def _up(number: int, unit: int) -> int:
  """The next multiple of a unit."""
  return -(-number // unit) * unit


def changed(
  config: run_config.Config, changes: Changes
) -> run_config.Config | None:
  """The settings with some changed, or None where they break a rule."""
  try:
    return _with(config, changes)
  except ValueError:
    return None


def _with(config: run_config.Config, changes: Changes) -> run_config.Config:
  values = config.to_dict()
  for name, value in changes.items():
    *sections, last = name.split(".")
    place = values
    for section in sections:
      place = place[section]
    place[last] = value
  return run_config.Config.from_config_dict(values)


def _changes(config: run_config.Config, changes: Changes) -> Changes:
  """Those that change anything."""

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


def flags(changes: Changes) -> str:
  """Changes as they are pasted behind a command in a shell."""
  return " ".join(
    shlex.quote(f"--config.{name}={value}") for name, value in changes.items()
  )
