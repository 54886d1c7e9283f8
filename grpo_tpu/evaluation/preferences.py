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

  A pair is two completions of one problem with different labels.

  Args:
    collector: Rewards the completions and holds the forward pass.
    params: Parameters of the policy.
    reference: Parameters that training started from.
    batches: Prompts with labelled completions.

  Returns:
    The `eval/` metrics. The buckets in their names are of the reward margin.
  """
  totals: collections.Counter[str] = collections.Counter()
  for batch in batches:
    groups, preferred, _ = collector.preference_groups(params, batch)
    forward, mesh = collector.sampler.forward, collector.sampler.mesh
    bundles = pictures.with_num_encoded(groups.batch, mesh)
    logps, ref_logps = (
      score.score_batch(forward, x, bundles, num_microbatches=1)[0]
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
  for name in MARGIN_BUCKETS:
    if totals[f"pairs/{name}"]:
      scalars[f"eval/implicit_preference_accuracy/{name}"] = (
        totals[f"accuracy/{name}"] / totals[f"pairs/{name}"]
      )
  return scalars


@jax.jit
def _sums(gained, mask, rewards, preferred) -> dict[str, jax.Array]:
  """Sums over the pairs of a batch, replicated over hosts."""
  gained = jnp.where(mask, gained, 0.0).sum(axis=-1)
  per_token = gained / jnp.maximum(mask.sum(axis=-1), 1)
  chosen, rejected, valid = preference_metrics.all_pairs(gained, preferred)
  better, worse, _ = preference_metrics.all_pairs(rewards, preferred)
  accuracies = {
    "preference_accuracy": _wins(better, worse),
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
  margin = better - worse
  # A pair whose rewards contradict its labels falls into the lowest bucket.
  edges = np.array(list(MARGIN_BUCKETS.values())[1:])
  bucket = jnp.searchsorted(edges, margin, side="right")
  for index, name in enumerate(MARGIN_BUCKETS):
    inside = valid & (bucket == index)
    wins = accuracies["implicit_preference_accuracy"]
    sums[f"pairs/{name}"] = inside.sum()
    sums[f"accuracy/{name}"] = jnp.where(inside, wins, 0.0).sum()
  return sums


def _wins(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """1 where the chosen completion is ahead, 0.5 for a tie."""
  return 0.5 * (1.0 + jnp.sign(chosen - rejected))
