"""Searches for the settings of the largest step that fits on a slice.

A step is larger if it decodes more prompts together, cuts its batch into fewer
microbatches, and recomputes less. Every advice was compiled, none is
extrapolated.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from data_pipelines import validation
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware
from grpo_tpu.models.settings import REMAT_POLICIES
from grpo_tpu.planning import changes as changing
from grpo_tpu.planning import planner, programs, roofline
from grpo_tpu.planning.changes import Changes, data_shards

# Share of the memory left free, for the runtime and for fragmentation.
MARGIN = 0.1
_TENSOR_SHARDS = (1, 2, 4, 8, 16)


class Advice(NamedTuple):
  """The largest step that fits.

  Attributes:
    changes: Settings that must change, with their new values.
    plan: The plan of the run with these changes.
    num_compiled: Number of programs compiled in the search.
  """

  changes: Changes
  plan: planner.Plan
  num_compiled: int

  def __str__(self) -> str:
    text = (
      f"The largest step that leaves {MARGIN:.0%} free on {self.plan.topology} "
      f"leaves {self.plan.room:.1%}; {self.num_compiled} programs were "
      "compiled to find it."
    )
    if not self.changes:
      return f"{text} The settings have this step already."
    return f"{text} Set\n\n  {changing.format_flags(self.changes)}"


def advise(
  config: run_config.Config,
  topology: hardware.Topology,
  compiler: planner.Compiler,
) -> Advice:
  """Finds the largest step that fits with `MARGIN` free.

  Keeps the longest prompts that any mesh has room for. On each mesh it decodes
  as many prompts together as fit, and takes the cheapest remat policy with the
  largest microbatch. Of the meshes it takes the one whose step has the lowest
  bound; meshes that cannot win are not compiled.

  Args:
    config: The run's settings; the mesh need not cover the slice.
    topology: The slice.
    compiler: Compiles the programs.

  Raises:
    SettingError: Nothing fits.
  """
  search = _Search(config, topology, compiler, MARGIN)
  most = config.data.prompts_per_step
  buckets = tuple(config.data.prompt_buckets)
  for count in range(len(buckets), 0, -1):
    best: tuple[float, Changes, planner.Plan] | None = None
    for least, mesh in meshes(config, topology):
      if best is not None and least >= best[0]:
        break
      base = mesh | {"data.prompt_buckets": buckets[:count]}
      found = search.largest_step(base, most, most, REMAT_POLICIES)
      if found is None:
        continue
      bound = step_seconds(found[1])
      if best is None or bound < best[0]:
        best = bound, *found
    if best is not None:
      return Advice(*best[1:], compiler.num_compiled)
  raise validation.SettingError(
    f"--topology ({topology}) must have room for {config.model.name} with "
    f"{MARGIN:.0%} free, but has not with any mesh, remat policy, microbatch "
    "and prompt bucket; set model.lora.rank=16, or choose a larger slice than "
    f"{topology}."
  )


def nearest_that_fits(
  config: run_config.Config,
  topology: hardware.Topology,
  compiler: planner.Compiler,
) -> tuple[Changes, hardware.Topology] | None:
  """Finds the smallest change with which a run fits, and the slice.

  Tries the same slice first, with changes that do not alter what is learnt:
  sizes of what runs together, then remat, then the reference's memory, each
  changed as little as possible. Then tries the next larger slices.
  """
  for larger in (topology, *hardware.larger_slices(topology)):
    base: Changes = {}
    if larger != topology:
      base = changing.nearest_mesh(config, larger)
    options: list[Changes] = [{}]
    if config.has_reference and config.lora is None:
      options.append({"model.reference_memory": "pinned_host"})
    search = _Search(config, larger, compiler, 0.0)
    for option in options:
      new = changing.apply_changes(config, base | option)
      if new is None:
        continue
      found = search.largest_step(
        base | option,
        new.data.prompts_per_step // new.num_rollouts,
        new.train.microbatch_bundles,
        REMAT_POLICIES[REMAT_POLICIES.index(config.model.remat) :],
      )
      if found is not None:
        return found[0], larger
  return None


class _Search:
  """Searches for settings with which a run leaves some memory free."""

  def __init__(
    self,
    config: run_config.Config,
    topology: hardware.Topology,
    compiler: planner.Compiler,
    margin: float,
  ):
    self._config, self._topology = config, topology
    self._compiler, self._margin = compiler, margin
    # Programs that read images need most; the result is planned with all.
    self._kind = "(image)" if config.model_config.vision else "(text)"

  def largest_step(
    self, base: Changes, prompts: int, bundles: int, policies: Sequence[str]
  ) -> tuple[Changes, planner.Plan] | None:
    """The changes and their plan, or None if nothing fits.

    Args:
      base: Changes that are fixed.
      prompts: The most prompts to decode together.
      bundles: The most bundles in a microbatch.
      policies: Remat policies, the preferred one first.
    """
    new = changing.apply_changes(self._config, base)
    if new is None or not self._has_room(new):
      return None
    update = self._largest_update(base, policies, _divisors(new, bundles))
    if update is None:
      return None
    base = base | update
    shards = data_shards(new)
    for part, name, values in (
      ("rollout", "rollout.prompts_at_a_time", _divisors(new, prompts)),
      (
        "evaluation",
        "eval.batch_size",
        [shards * n for n in range(new.eval.batch_size // shards, 0, -1)],
      ),
      (
        "pictures",
        "rollout.pictures_per_shard",
        list(range(new.rollout.pictures_per_shard, 0, -1)),
      ),
    ):
      if all(programs.part_of(x) != part for x in programs.names(new)):
        continue
      value = self._largest(base, name, values, part)
      if value is None:
        return None
      base = base | {name: value}
    changes = changing.drop_unchanged(self._config, base)
    new = changing.apply_changes(self._config, changes)
    assert new is not None
    plan = self._compiler.plan(new, self._topology)
    return (changes, plan) if plan.fits(self._margin) else None

  def _largest_update(
    self, base: Changes, policies: Sequence[str], sizes: Sequence[int]
  ) -> Changes | None:
    """The first remat policy that fits, with the largest microbatch."""
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
    """The largest value of a setting that fits, by bisection.

    Args:
      base: Changes that are fixed.
      name: The setting.
      values: Its values in descending order.
      part: The part of the run that must fit.
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
    """Compiles one part of the run and says whether it fits."""
    config = changing.apply_changes(self._config, changes)
    if config is None:
      return False
    names = [
      name
      for name in programs.names(config)
      if programs.part_of(name) == part
      and (self._kind in name or "(" not in name)
    ]
    # Stops after the first programs that do not fit.
    for some in itertools.batched(names, self._compiler.num_processes):
      plan = self._compiler.plan(config, self._topology, some)
      logging.info(
        "%s on %s: %.1f%% free with %s.",
        _describe(config),
        self._topology,
        100 * plan.room,
        plan.peak["name"],
      )
      if not plan.fits(self._margin):
        return False
    return True

  def _has_room(self, config: run_config.Config) -> bool:
    """Says whether the arrays that stay between programs fit by themselves."""
    size = sum(programs.resident_bytes(config).values())
    limit = self._topology.chip.hbm_limit_bytes
    return size <= (1 - self._margin) * limit


def _describe(config: run_config.Config) -> str:
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
  """Meshes that divide the run's prompts, with the least seconds of a step.

  Sorted by these seconds, which no other settings can lower.
  """
  found = []
  replica, devices = topology.num_slices, topology.num_devices
  for tensor in _TENSOR_SHARDS:
    if devices % (tensor * replica):
      continue
    fsdp = devices // tensor // replica
    mesh = changing.change_mesh(config, replica, fsdp, tensor)
    fastest = {
      "train.microbatch_bundles": config.data.prompts_per_step,
      "rollout.prompts_at_a_time": None,
      "model.remat": REMAT_POLICIES[0],
    }
    new = changing.apply_changes(config, mesh | fastest)
    if new is not None:
      found.append((roofline.least_step_seconds(new, topology), tensor, mesh))
  found.sort(key=lambda x: x[:2])
  return [(least, mesh) for least, _, mesh in found]


def step_seconds(plan: planner.Plan) -> float:
  """The least seconds of a step of text or of images, whichever is slower."""
  bounds = plan.step_bounds().values()
  return max(bound["step_seconds_at_least"] for bound in bounds)


def _divisors(config: run_config.Config, most: int) -> list[int]:
  """Divisors of the batch that the mesh divides, in descending order."""
  shards, prompts = data_shards(config), config.data.prompts_per_step
  return [
    size
    for size in range(most, 0, -1)
    if prompts % size == 0 and size % shards == 0
  ]
