"""Whether the policy has come to prefer what is preferred, on held-out groups.

Nothing is sampled: labelled completions are scored under the policy and under
the reference that training started from.
"""

import collections
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import pipeline
from grpo_tpu.observability import writer
from grpo_tpu.rl import preference_metrics, score
from grpo_tpu.rl.experience import Collector

# Edges between the margins, of the one reward above the other, by which pairs
# are told apart.
_EDGES = (0.0, 0.25, 0.5, 0.75)


def evaluate(
  collector: Collector,
  params: dict,
  reference: dict,
  batches: Iterable[pipeline.Batch],
) -> dict[str, writer.Scalar]:
  """Accuracies and margins, means over every pair of the held-out groups.

  Args:
    collector: Scores the completions.
    params: Parameters of the policy.
    reference: Parameters of the reference.
    batches: Prompts with labelled completions.

  Returns:
    By the names of `metrics`. A pair is two completions of one problem with
    different labels; its margin in the buckets' names is that of the rewards.
  """
  totals: collections.Counter[str] = collections.Counter()
  for batch in batches:
    groups, preferred, _ = collector.preference_groups(params, batch)
    forward = collector.sampler.forward
    logps, ref_logps = (
      score.score_batch(forward, x, groups.batch, num_microbatches=1)[0]
      for x in (params, reference)
    )
    sums = _sums(
      logps - ref_logps,
      groups.batch.completion_mask,
      groups.rewards["total"],
      preferred,
    )
    totals.update({k: float(v) for k, v in jax.device_get(sums).items()})
  pairs = max(totals["pairs"], 1)
  scalars: dict[str, writer.Scalar] = {
    f"eval/{name}": totals[name] / pairs
    for name in (
      "preference_accuracy",
      "implicit_preference_accuracy",
      "implicit_preference_accuracy_per_token",
      "implicit_preference_margin",
    )
  }
  for name in _bucket_names():
    if totals[f"pairs/{name}"]:
      scalars[f"eval/implicit_preference_accuracy/{name}"] = (
        totals[f"accuracy/{name}"] / totals[f"pairs/{name}"]
      )
  return scalars


def _bucket_names() -> list[str]:
  highs = [*(f"to_{edge}" for edge in _EDGES[1:]), "and_more"]
  return [
    f"margin_{low}_{high}" for low, high in zip(_EDGES, highs, strict=True)
  ]


@jax.jit
def _sums(gained, mask, rewards, preferred) -> dict[str, jax.Array]:
  """What adds up over batches; replicated, so the same on every host."""
  gained = jnp.where(mask, gained, 0.0).sum(axis=-1)
  per_token = gained / jnp.maximum(mask.sum(axis=-1), 1)
  chosen, rejected, valid = preference_metrics.all_pairs(gained, preferred)
  paid_more, paid_less, _ = preference_metrics.all_pairs(rewards, preferred)
  accuracies = {
    "preference_accuracy": _wins(paid_more, paid_less),
    "implicit_preference_accuracy": _wins(chosen, rejected),
    "implicit_preference_accuracy_per_token": _wins(
      *preference_metrics.all_pairs(per_token, preferred)[:2]
    ),
    "implicit_preference_margin": chosen - rejected,
  }
  sums = {
    name: jnp.where(valid, values, 0.0).sum()
    for name, values in accuracies.items()
  }
  sums["pairs"] = valid.sum()
  margin = paid_more - paid_less
  # A pair paid against its label is of the lowest margin there is.
  bucket = jnp.searchsorted(np.array(_EDGES[1:]), margin, side="right")
  for index, name in enumerate(_bucket_names()):
    inside = valid & (bucket == index)
    wins = accuracies["implicit_preference_accuracy"]
    sums[f"pairs/{name}"] = inside.sum()
    sums[f"accuracy/{name}"] = jnp.where(inside, wins, 0.0).sum()
  return sums


def _wins(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """1 where the chosen is ahead, a half for a tie."""
  return 0.5 * (1.0 + jnp.sign(chosen - rejected))
