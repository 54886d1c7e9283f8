"""Preference accuracy on the labelled completions of the eval split.

Nothing is sampled: the completions are scored under the policy and under the
reference that training started from.
"""

import collections
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import pipeline
from grpo_tpu.config.eval_metrics import MARGIN_BUCKETS
from grpo_tpu.observability import writer
from grpo_tpu.rl import pictures, preference_metrics, score
from grpo_tpu.rl.experience import Collector


def evaluate_preferences(
  collector: Collector,
  params: dict,
  reference: dict,
  batches: Iterable[pipeline.Batch],
) -> dict[str, writer.Scalar]:
  """Computes mean accuracies and margins over all pairs of the eval split.

  A pair is two completions of one problem with different labels. The buckets in
  the names of `eval/` metrics are of the reward margin.
  """
  totals = collections.defaultdict[str, list[float]](lambda: [0.0, 0.0])
  for batch in batches:
    groups, preferred, _ = collector.preference_groups(
      params, batch, split="eval/"
    )
    forward, mesh = collector.sampler.forward, collector.sampler.mesh
    bundles = pictures.with_num_encoded(groups.batch, mesh)
    logps, ref_logps = (
      score.score_batch(forward, x, bundles, num_microbatches=1)[0]
      for x in (params, reference)
    )
    found = _sums(
      logps - ref_logps,
      groups.batch.completion_mask,
      groups.rewards["total"],
      preferred,
    )
    for name, (total, count) in jax.device_get(found).items():
      totals[name][0] += float(total)
      totals[name][1] += float(count)
  # A bucket without pairs has no accuracy.
  return {
    f"eval/{name}": total / max(count, 1)
    for name, (total, count) in totals.items()
    if count or "/" not in name
  }


@jax.jit
def _sums(
  gained, mask, rewards, preferred
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Each metric's sum over its pairs, of all hosts, and their number."""
  gained = jnp.where(mask, gained, 0.0).sum(axis=-1)
  per_token = gained / jnp.maximum(mask.sum(axis=-1), 1)
  chosen, rejected, valid = preference_metrics.all_pairs(gained, preferred)
  better, worse, _ = preference_metrics.all_pairs(rewards, preferred)
  wins = _wins(chosen, rejected)
  pairs = {
    "preference_accuracy": (_wins(better, worse), valid),
    "implicit_preference_accuracy": (wins, valid),
    "implicit_preference_accuracy_per_token": (
      _wins(*preference_metrics.all_pairs(per_token, preferred)[:2]),
      valid,
    ),
    "implicit_preference_margin": (chosen - rejected, valid),
  }
  # A pair whose rewards contradict its labels falls into the lowest bucket.
  edges = np.array(list(MARGIN_BUCKETS.values())[1:])
  bucket = jnp.searchsorted(edges, better - worse, side="right")
  for index, name in enumerate(MARGIN_BUCKETS):
    inside = valid & (bucket == index)
    pairs[f"implicit_preference_accuracy/{name}"] = (wins, inside)
  return {
    name: (jnp.where(inside, values, 0.0).sum(), inside.sum())
    for name, (values, inside) in pairs.items()
  }


def _wins(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """1 where the chosen completion is ahead, 0.5 for a tie."""
  return 0.5 * (1.0 + jnp.sign(chosen - rejected))
