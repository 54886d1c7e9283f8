"""Which settings make the largest step that fits on a slice.

A step is larger the fewer times weights travel for it and the less of it is
recomputed: more bundles in a microbatch, then less remat. What is advised was
compiled; nothing is extrapolated.
"""

from collections.abc import Iterator
from typing import Any

from absl import logging

from grpo_tpu import chips, planning, traffic
from grpo_tpu import config as run_config
from grpo_tpu.gemma3 import remat

# What advice leaves free: the runtime's own part, and fragments.
MARGIN = 0.1
_TENSORS = (1, 2, 4, 8)


def nearest_that_fits(made: planning.Plan) -> str:
  """What to set for a run that does not fit, in words.

  First what costs nothing but time on the same slice, then larger slices; each
  is compiled before it is named.
  """
  for changes in _smaller(made.config):
    config = changed(made.config, changes)
    if config and planning.plan(config, made.topology).fits():
      return f"it fits with {_flags(changes)}"
  for topology in chips.larger(made.topology):
    changes = _on_larger(made.config, topology)
    config = changed(made.config, changes)
    if config and planning.plan(config, topology).fits():
      return f"it fits on --topology={topology} with {_flags(changes)}"
  return (
    f"no slice of {made.topology.chip.name} has room for it; choose a smaller "
    "model.name, or adapters with model.lora.rank=16"
  )


def advise(config: run_config.Config, topology: chips.Topology) -> str:
  """The settings to paste for the largest step that fits with `MARGIN` free.

  Meshes come in the order of their bounds; of the first on which anything fits,
  the cheapest remat and, with it, the most bundles at a time are taken.
  """
  tried: dict[tuple[tuple[str, Any], ...], planning.Plan] = {}

  def fits(changes: dict[str, Any]) -> bool:
    key = tuple(sorted(changes.items()))
    new = changed(config, changes)
    if new is None:
      return False
    if key not in tried:
      tried[key] = planning.plan(new, topology)
      logging.info("%s: %.1f%% free.", _flags(changes), 100 * tried[key].room)
    return tried[key].fits(MARGIN)

  for mesh in meshes(config, topology):
    sizes = list(_microbatches(config, mesh))
    least = {"train.microbatch_bundles": sizes[-1], "model.remat": "full"}
    if not fits(mesh | least):
      continue
    best = mesh | least
    for policy in remat.POLICIES:
      # Its least first: where that does not fit, no other does.
      if not fits(mesh | least | {"model.remat": policy}):
        continue
      size = next(
        n
        for n in sizes
        if fits(mesh | {"train.microbatch_bundles": n, "model.remat": policy})
      )
      best = mesh | {"train.microbatch_bundles": size, "model.remat": policy}
      break
    made = tried[tuple(sorted(best.items()))]
    return (
      f"The largest step of {len(tried)} compiled that leaves {MARGIN:.0%} "
      f"free on {topology} leaves {made.room:.1%} free with\n\n  "
      f"{_flags(best)}"
    )
  raise run_config.SettingError(
    f"--topology ({topology}) must have room for the run with {MARGIN:.0%} "
    "free, and none of the meshes, remat policies and microbatches has; choose "
    "a larger slice, fewer data.prompts_per_step or adapters."
  )


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
    }
    shards = replica * mesh["mesh.fsdp"]
    new = changed(config, mesh | {"train.microbatch_bundles": shards})
    if new is not None:
      found.append((_bound(new, topology), tensor, mesh))
  return [mesh for _, _, mesh in sorted(found, key=lambda x: x[:2])]


def _bound(config: run_config.Config, topology: chips.Topology) -> float:
  """Seconds of moving between chips in a step, at least."""
  chip = topology.chip
  moved = [
    traffic.volume(config, topology, step)
    for step in ("decode_chunk", "train_step")
  ]
  return sum(
    x["ici"] / chip.ici_bandwidth + x["dcn"] / chip.dcn_bandwidth for x in moved
  )


def _microbatches(
  config: run_config.Config, mesh: dict[str, int]
) -> Iterator[int]:
  """Sizes that divide the batch and that the mesh divides, largest first."""
  shards = mesh["mesh.replica"] * mesh["mesh.fsdp"]
  prompts = config.data.prompts_per_step
  for size in range(prompts, 0, -1):
    if prompts % size == 0 and size % shards == 0:
      yield size


def _smaller(config: run_config.Config) -> Iterator[dict[str, Any]]:
  """Changes that take less memory and leave what is learnt as it is."""
  least = config.mesh.replica * config.mesh.fsdp
  if config.train.microbatch_bundles > least or config.model.remat != "full":
    yield {"train.microbatch_bundles": least, "model.remat": "full"}
  if config.has_reference and config.lora is None:
    yield {
      "train.microbatch_bundles": least,
      "model.remat": "full",
      "model.reference_memory": "pinned_host",
    }


def _on_larger(
  config: run_config.Config, topology: chips.Topology
) -> dict[str, Any]:
  tensor = config.mesh.tensor
  shards = topology.num_devices // tensor
  prompts = -(-config.data.prompts_per_step // shards) * shards
  return {
    "mesh.replica": topology.num_slices,
    "mesh.fsdp": shards // topology.num_slices,
    "data.prompts_per_step": prompts,
    "train.microbatch_bundles": shards,
    "eval.batch_size": -(-config.eval.batch_size // shards) * shards,
  }


def changed(
  config: run_config.Config, changes: dict[str, Any]
) -> run_config.Config | None:
  """The settings with some changed, or None where they break a rule."""
  values = config.to_dict()
  for name, value in changes.items():
    *sections, last = name.split(".")
    place = values
    for section in sections:
      place = place[section]
    place[last] = value
  mesh = changes.get("mesh.fsdp")
  if mesh is not None and "eval.batch_size" not in changes:
    shards = values["mesh"]["replica"] * values["mesh"]["fsdp"]
    size = values["eval"]["batch_size"]
    values["eval"]["batch_size"] = -(-size // shards) * shards
  try:
    return run_config.Config.from_config_dict(values)
  except ValueError:
    return None


def _flags(changes: dict[str, Any]) -> str:
  return " ".join(f"--config.{name}={value}" for name, value in changes.items())
