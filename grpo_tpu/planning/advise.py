"""Which settings make the largest step that fits on a slice.

A step is larger the more prompts are decoded together, the fewer times weights
travel for an update, and the less of it is recomputed. What is advised was
compiled; nothing is extrapolated.
"""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import logging

from data_pipelines import validation
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware
from grpo_tpu.models.gemma3 import remat
from grpo_tpu.planning import planner, programs
from grpo_tpu.planning.planner import Changes

# What advice leaves free: the runtime's own part, and fragments.
MARGIN = 0.1
_TENSORS = (1, 2, 4, 8, 16)


class Advice(NamedTuple):
  """The largest step that fits.

  Attributes:
    changes: Settings by name, that the run has otherwise.
    made: The plan of the run with these.
    num_compiled: Programs that it took to find out.
  """

  changes: Changes
  made: planner.Plan
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
  topology: hardware.Topology,
  compiler: planner.Compiler,
) -> Advice:
  """The largest step that fits with `MARGIN` free.

  Prompts as long as the settings want are kept if any mesh has room for them.
  On each mesh the most prompts are decoded at a time, and updates have the
  cheapest remat and, with it, the most bundles at a time; of meshes it is the
  one whose step has the least bound, and those that could not have it are left
  out.

  Args:
    config: The run's settings; its mesh need not be one for the slice.
    topology: The slice.
    compiler: What compiles.

  Raises:
    SettingError: Nothing fits.
  """
  search = _Search(config, topology, compiler, MARGIN)
  most = config.data.prompts_per_step
  for buckets in _shorter(config.data.prompt_buckets):
    best: tuple[float, Changes, planner.Plan] | None = None
    for least, mesh in meshes(config, topology):
      if best is not None and least >= best[0]:
        break
      base = mesh | {"data.prompt_buckets": buckets}
      settled = search.settled(base, most, most, remat.POLICIES)
      if settled is None:
        continue
      changes, made = settled
      bound = _bound(made)
      if best is None or bound < best[0]:
        best = bound, changes, made
    if best is not None:
      return Advice(*best[1:], compiler.num_compiled)
  raise validation.SettingError(
    f"--topology ({topology}) must have room for {config.model.name} with "
    f"{MARGIN:.0%} free, and with none of the meshes, remat policies, "
    "microbatches and prompt buckets it has; set model.lora.rank=16, or choose "
    f"a larger slice than {topology}."
  )


def nearest_that_fits(
  made: planner.Plan, compiler: planner.Compiler
) -> tuple[Changes, hardware.Topology] | None:
  """What to change for a run that does not fit, and the slice that it fits on.

  On the same slice what leaves alone what is learnt, and each setting changed
  no further than it must be: what runs at a time, then remat, then where the
  reference lies. Else the first larger slice on which the same would do.
  """
  config = made.config
  for topology in (made.topology, *hardware.larger_slices(made.topology)):
    base: Changes = {}
    if topology != made.topology:
      base = planner.nearest_mesh(config, topology)
    places: list[Changes] = [{}]
    if config.has_reference and config.lora is None:
      places.append({"model.reference_memory": "pinned_host"})
    search = _Search(config, topology, compiler, 0.0)
    for place in places:
      new = planner.changed(config, base | place)
      if new is None:
        continue
      settled = search.settled(
        base | place,
        new.data.prompts_per_step // new.num_rollouts,
        new.train.microbatch_bundles,
        remat.POLICIES[remat.POLICIES.index(config.model.remat) :],
      )
      if settled is not None:
        return settled[0], topology
  return None


class _Search:
  """Looks for the settings with which a run leaves some memory free."""

  def __init__(
    self,
    config: run_config.Config,
    topology: hardware.Topology,
    compiler: planner.Compiler,
    margin: float,
  ):
    self._config, self._topology = config, topology
    self._compiler, self._margin = compiler, margin
    # With an image where the model sees them; what is found is planned whole.
    self._kind = "(image)" if config.model_config.vision else "(text)"

  def settled(
    self, base: Changes, prompts: int, bundles: int, policies: Sequence[str]
  ) -> tuple[Changes, planner.Plan] | None:
    """The changes and the plan with them, or None where nothing fits.

    Args:
      base: Changes that are not to be chosen.
      prompts: To decode at a time, at most.
      bundles: Of a microbatch, at most.
      policies: For remat, the one to have rather first.
    """
    new = planner.changed(self._config, base)
    if new is None or not self._has_room(new):
      return None
    update = self._update(base, policies, _sizes(new, bundles))
    if update is None:
      return None
    base = base | update
    for part, name, values in (
      ("rollout", "rollout.prompts_at_a_time", _sizes(new, prompts)),
      ("evaluation", "eval.batch_size", _batches(new)),
      ("pictures", "rollout.pictures_per_shard", _pictures(new)),
    ):
      if all(programs.part_of(x) != part for x in programs.names(new)):
        continue
      value = self._largest(base, name, values, part)
      if value is None:
        return None
      base = base | {name: value}
    changes = planner.differing(self._config, base)
    new = planner.changed(self._config, changes)
    assert new is not None
    made = self._compiler.plan(new, self._topology)
    return (changes, made) if made.fits(self._margin) else None

  def _update(
    self, base: Changes, policies: Sequence[str], sizes: Sequence[int]
  ) -> Changes | None:
    """The first remat with which anything fits, with the most that does."""
    name = "train.microbatch_bundles"
    for policy in policies:
      settings = {"model.remat": policy}
      if self._fits(base | settings | {name: sizes[-1]}, "update"):
        size = self._largest(base | settings, name, sizes, "update")
        return settings | {name: size}
    return None

  def _largest(
    self, base: Changes, name: str, values: Sequence[int], part: str
  ) -> int | None:
    """The largest of a setting's values, in descending order, that fits.

    It was seen to fit, and the next larger one not to.
    """

    def fits(index: int) -> bool:
      return self._fits(base | {name: values[index]}, part)

    if fits(0):
      return values[0]
    large, small = 0, len(values) - 1
    if not small or not fits(small):
      return None
    while small - large > 1:
      middle = (small + large) // 2
      large, small = (large, middle) if fits(middle) else (middle, small)
    return values[small]

  def _fits(self, changes: Changes, part: str) -> bool:
    """Whether a part of the run does with some changes."""
    config = planner.changed(self._config, changes)
    if config is None:
      return False
    names = [
      name
      for name in programs.names(config)
      if programs.part_of(name) == part
      and (self._kind in name or "(" not in name)
    ]
    # As many as are compiled side by side; the rest once these fit.
    for some in itertools.batched(names, self._compiler.at_a_time):
      made = self._compiler.plan(config, self._topology, some)
      logging.info(
        "%s on %s: %.1f%% free with %s.",
        _said(config),
        self._topology,
        100 * made.room,
        made.peak["name"],
      )
      if not made.fits(self._margin):
        return False
    return True

  def _has_room(self, config: run_config.Config) -> bool:
    """For what is there whatever the programs are."""
    least = sum(programs.resident_bytes(config).values())
    limit = self._topology.chip.hbm_limit_bytes
    return least <= (1 - self._margin) * limit


def _said(config: run_config.Config) -> str:
  mesh = config.mesh
  return (
    f"mesh {mesh.replica} x {mesh.fsdp} x {mesh.tensor}, "
    f"{config.rollout.prompts_at_a_time or config.data.prompts_per_step} "
    f"prompts at a time, {config.train.microbatch_bundles} in a microbatch, "
    f"remat {config.model.remat}"
  )


def meshes(
  config: run_config.Config, topology: hardware.Topology
) -> list[tuple[float, Changes]]:
  """Meshes that the run's prompts divide over, the least bound first.

  With each what no step on it can beat, whatever else is chosen.
  """
  found = []
  replica, devices = topology.num_slices, topology.num_devices
  for tensor in _TENSORS:
    if devices % (tensor * replica):
      continue
    mesh = planner.on_mesh(
      config, replica, devices // tensor // replica, tensor
    )
    best = {
      "train.microbatch_bundles": config.data.prompts_per_step,
      "rollout.prompts_at_a_time": None,
      "model.remat": remat.POLICIES[0],
    }
    new = planner.changed(config, mesh | best)
    if new is not None:
      least = planner.least_step_seconds(new, topology)
      found.append((least, tensor, mesh))
  found.sort(key=lambda x: x[:2])
  return [(least, mesh) for least, _, mesh in found]


def _bound(made: planner.Plan) -> float:
  """Seconds that no step can beat."""
  bounds = planner.step_bounds(made).values()
  return max(bound["step_seconds_at_least"] for bound in bounds)


def _shorter(buckets: Sequence[int]) -> Iterator[tuple[int, ...]]:
  """All of them, then fewer and fewer of the longest."""
  for count in range(len(buckets), 0, -1):
    yield tuple(buckets[:count])


def _sizes(config: run_config.Config, most: int) -> list[int]:
  """Prompts that divide the batch and that the mesh divides, most first."""
  shards = config.mesh.replica * config.mesh.fsdp
  prompts = config.data.prompts_per_step
  return [
    size
    for size in range(most, 0, -1)
    if prompts % size == 0 and size % shards == 0
  ]


def _batches(config: run_config.Config) -> list[int]:
  """Evaluation's batch, then smaller ones that the mesh divides."""
  size, shards = config.eval.batch_size, config.mesh.replica * config.mesh.fsdp
  return [shards * n for n in range(size // shards, 0, -1)]


def _pictures(config: run_config.Config) -> list[int]:
  """Pictures that a shard's tower reads at a time, then fewer."""
  return list(range(config.rollout.pictures_per_shard, 0, -1))


def flags(changes: Changes) -> str:
  """Changes as they are pasted behind a command in a shell."""
  return " ".join(
    shlex.quote(f"--config.{name}={value}") for name, value in changes.items()
  )
