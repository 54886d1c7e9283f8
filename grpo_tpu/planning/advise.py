"""Searches for the settings of the largest step that fits on a slice.

A step is larger if it decodes more prompts together, cuts its batch into fewer
microbatches, and recomputes less. Every advice was compiled, none is
extrapolated.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from data_pipelines import validation
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import hardware
from grpo_tpu.distributed.hardware import Topology
from grpo_tpu.models.settings import REMAT_POLICIES
from grpo_tpu.planning import changes as changing
from grpo_tpu.planning import planner, programs, roofline
from grpo_tpu.planning.changes import Changes, data_shards

# Share of the memory left free, for the runtime and for fragmentation.
MARGIN = 0.1
_TENSOR_SHARDS = (1, 2, 4, 8, 16)


class Advice(NamedTuple):
  """The largest step that fits: settings to change, and the plan with them."""

  changes: Changes
  plan: planner.Plan
  num_compiled: int  # Programs compiled in the search.

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
  config: Config, topology: Topology, compiler: planner.Compiler
) -> Advice:
  """Finds the largest step that fits with `MARGIN` free.

  Keeps the longest prompts that any mesh has room for. On each mesh it decodes
  as many prompts together as fit, and takes the cheapest remat policy with the
  largest microbatch. Of the meshes it takes the one whose step has the lowest
  bound; meshes that cannot win are not compiled. The mesh of `config` need not
  cover the slice.

  Raises:
    SettingError: Nothing fits.
  """
  search = _Search(config, topology, compiler, MARGIN)
  most = config.data.prompts_per_step
  buckets = tuple(config.data.prompt_buckets)
  for count in range(len(buckets), 0, -1):
    best, best_bound = None, math.inf
    for least, mesh in meshes(config, topology):
      if least >= best_bound:
        break
      base = mesh | {"data.prompt_buckets": buckets[:count]}
      found = search.largest_step(base, most, most, REMAT_POLICIES)
      if found and (bound := step_seconds(found[1])) < best_bound:
        best, best_bound = found, bound
    if best:
      return Advice(*best, compiler.num_compiled)
  raise validation.SettingError(
    f"--topology ({topology}) must have room for {config.model.name} with "
    f"{MARGIN:.0%} free, but has not with any mesh, remat policy, microbatch "
    "and prompt bucket; set model.lora.rank=16, or choose a larger slice than "
    f"{topology}."
  )


def nearest_that_fits(
  config: Config, topology: Topology, compiler: planner.Compiler
) -> tuple[Changes, Topology] | None:
  """Finds the smallest change with which a run fits, and the slice.

  Tries the same slice first, with changes that do not alter what is learnt:
  sizes of what runs together, then remat, then the reference's memory, each
  changed as little as possible. Then tries the next larger slices.
  """
  options: list[Changes] = [{}]
  if config.has_reference and config.lora is None:
    options.append({"model.reference_memory": "pinned_host"})
  policies = REMAT_POLICIES[REMAT_POLICIES.index(config.model.remat) :]
  for larger in (topology, *hardware.larger_slices(topology)):
    same = larger == topology
    mesh = {} if same else changing.nearest_mesh(config, larger)
    search = _Search(config, larger, compiler, 0.0)
    for option in options:
      if new := changing.apply_changes(config, mesh | option):
        prompts = new.data.prompts_per_step // new.num_rollouts
        bundles = new.train.microbatch_bundles
        found = search.largest_step(mesh | option, prompts, bundles, policies)
        if found is not None:
          return found[0], larger
  return None


@dataclasses.dataclass(frozen=True)
class _Search:
  """Searches for settings with which a run leaves a share `margin` free."""

  config: Config
  topology: Topology
  compiler: planner.Compiler
  margin: float

  def largest_step(
    self, base: Changes, prompts: int, bundles: int, policies: Sequence[str]
  ) -> tuple[Changes, planner.Plan] | None:
    """The changes and their plan, with those of `base`; None if nothing fits.

    Decodes at most so many prompts together, with at most so many bundles in a
    microbatch. The preferred remat policy comes first.
    """
    new = changing.apply_changes(self.config, base)
    if new is None:
      return None
    # The arrays that stay between programs must fit by themselves.
    resident = sum(programs.resident_bytes(new).values())
    if resident > (1 - self.margin) * self.topology.chip.hbm_limit_bytes:
      return None
    microbatches = _divisors(new, bundles)
    for policy in policies:
      fixed = base | {"model.remat": policy}
      smallest = {"train.microbatch_bundles": microbatches[-1]}
      if self._fits(fixed | smallest, "update"):
        break
    else:
      return None
    images, rows = new.rollout.pictures_per_shard, new.eval.batch_size
    for part, name, values in (
      ("update", "train.microbatch_bundles", microbatches),
      ("rollout", "rollout.prompts_at_a_time", _divisors(new, prompts)),
      ("evaluation", "eval.batch_size", range(rows, 0, -data_shards(new))),
      ("pictures", "rollout.pictures_per_shard", range(images, 0, -1)),
    ):
      if any(programs.part_of(x) == part for x in programs.names(new)):
        value = self._largest(fixed, name, values, part)
        if value is None:
          return None
        fixed |= {name: value}
    changes = changing.drop_unchanged(self.config, fixed)
    new = changing.apply_changes(self.config, changes)
    assert new is not None
    plan = self.compiler.plan(new, self.topology)
    return (changes, plan) if plan.fits(self.margin) else None

  def _largest(
    self, base: Changes, name: str, values: Sequence[int], part: str
  ) -> int | None:
    """The largest of the descending `values` with which a part fits."""

    def fits(index: int) -> bool:
      return self._fits(base | {name: values[index]}, part)

    if fits(0):
      return values[0]
    last = len(values) - 1
    if not fits(last):
      return None
    return values[bisect.bisect_left(range(last), True, lo=1, key=fits)]

  def _fits(self, changes: Changes, part: str) -> bool:
    """Compiles one part of the run, and returns True if it fits."""
    config = changing.apply_changes(self.config, changes)
    if config is None:
      return False
    # Programs that read images need most; the result is planned with all.
    kind = "(image)" if config.model_config.vision else "(text)"
    names = [
      name
      for name in programs.names(config)
      if programs.part_of(name) == part and (kind in name or "(" not in name)
    ]
    # Stops after the first programs that do not fit.
    for some in itertools.batched(names, self.compiler.num_processes):
      plan = self.compiler.plan(config, self.topology, some)
      new = changing.drop_unchanged(self.config, changes)
      text = f"{plan.peak['name']} leaves {plan.room:.1%} of {self.topology}"
      logging.info("%s free with: %s", text, changing.format_flags(new))
      if not plan.fits(self.margin):
        return False
    return True


def meshes(config: Config, topology: Topology) -> list[tuple[float, Changes]]:
  """Meshes that divide the run's prompts, with the least seconds of a step.

  Sorted by these seconds, which no other settings can lower.
  """
  fastest = {
    "train.microbatch_bundles": config.data.prompts_per_step,
    "rollout.prompts_at_a_time": None,
    "model.remat": REMAT_POLICIES[0],
  }
  found = []
  replica, devices = topology.num_slices, topology.num_devices
  for tensor in _TENSOR_SHARDS:
    if devices % (tensor * replica):
      continue
    fsdp = devices // tensor // replica
    mesh = changing.change_mesh(config, replica, fsdp, tensor)
    if new := changing.apply_changes(config, mesh | fastest):
      found.append((roofline.least_step_seconds(new, topology), mesh))
  # Of meshes with equal seconds the one with fewer tensor shards comes first.
  return sorted(found, key=lambda x: x[0])


def step_seconds(plan: planner.Plan) -> float:
  """The least seconds of a step of text or of images, whichever is slower."""
  bounds = plan.step_bounds().values()
  return max(bound["step_seconds_at_least"] for bound in bounds)


def _divisors(config: Config, most: int) -> list[int]:
  """Divisors of the batch that the mesh divides, in descending order."""
  shards, prompts = data_shards(config), config.data.prompts_per_step
  sizes = range(most, 0, -1)
  return [n for n in sizes if prompts % n == 0 and n % shards == 0]
