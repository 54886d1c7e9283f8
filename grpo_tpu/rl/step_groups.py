"""The groups of a step: which are kept, and their advantages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from grpo_tpu.distributed import sharding
from grpo_tpu.rewards.settings import HEURISTICS
from grpo_tpu.rl import diagnostics, objective, shaping
from grpo_tpu.rl.settings import CollectorConfig
from grpo_tpu.rl.train_batch import ScoredGroups, TrainBatch


def best(mesh: Any, groups: ScoredGroups, more: ScoredGroups) -> ScoredGroups:
  """As many groups as before: first those with reward variance."""

  def widen(x: jax.Array, other: jax.Array) -> jax.Array:
    """Pads prompts and slots for images to those of the other batch."""
    if x.ndim < 2 or x.shape[1] >= other.shape[1]:
      return x
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, other.shape[1] - x.shape[1])
    return jnp.pad(x, padding)

  both = (groups, more), (more, groups)
  both = [jax.tree.map(widen, x, other) for x, other in both]
  return _merge(sharding.batch_sharding(mesh), *both)


@functools.partial(jax.jit, static_argnums=0)
def _merge(
  row_sharding: Any, groups: ScoredGroups, more: ScoredGroups
) -> ScoredGroups:
  count = groups.valid.shape[0]
  both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), groups, more)
  has_signal = shaping.has_signal(both.compared, both.valid)
  order = jnp.argsort(~has_signal, stable=True)[:count]
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(x[order], row_sharding), both
  )


def add_advantages(
  groups: ScoredGroups, config: CollectorConfig
) -> tuple[TrainBatch, diagnostics.Metrics]:
  """The batch of the groups with its advantages, and metrics of these."""
  changes, metrics = _advantages(
    groups.compared,
    groups.rewards["heuristics"],
    groups.valid,
    groups.batch.completion_mask,
    weights=config.separate_weights,
    scale=config.advantage_scale,
    baseline=config.advantage_baseline,
    clip=config.shaping.advantage_clip,
    drops=config.shaping.zero_variance != "keep",
  )
  return groups.batch.replace(**changes), metrics


@functools.partial(
  jax.jit, static_argnames=("weights", "scale", "baseline", "clip", "drops")
)
def _advantages(
  compared, heuristics, valid, mask, *, weights, scale, baseline, clip, drops
):
  """Changes of a batch that give it advantages, and metrics of these.

  Takes no whole batch, so that it compiles once for all prompt lengths.
  """
  in_groups = functools.partial(
    objective.group_advantages,
    num_generations=valid.shape[1],
    scale=scale,
    baseline=baseline,
    valid=valid.reshape(-1),
  )
  parts = {
    name: in_groups(x.reshape(-1)).reshape(valid.shape)
    for name, x in compared.items()
  }
  if "total" not in parts:
    parts = {name: dict(weights)[name] * x for name, x in parts.items()}
    total = sum(parts.values())
    heuristics = sum((parts[x] for x in HEURISTICS if x in parts), 0 * total)
    advantages = objective.normalized_sum(list(parts.values()), valid=valid)
  else:
    total, advantages = compared["total"], parts["total"]
  sample_size = diagnostics.effective_sample_size(advantages)
  share = diagnostics.advantage_share(
    heuristics, total, advantages, valid=valid
  )
  metrics = {
    "rollout/effective_sample_size": sample_size,
    "rollout/heuristic_advantage_share": share,
  }
  if clip is not None:
    advantages = jnp.clip(advantages, -clip, clip)
  changes = {"advantages": advantages}
  if drops:
    has_signal = shaping.has_signal(compared, valid)[:, None]
    changes["completion_mask"] = mask & has_signal[..., None]
    changes["counted"] = jnp.broadcast_to(has_signal, valid.shape)
  return changes, metrics
