"""Measures of what a reward goes with, to see whether the policy games it.

They are over the whole batch. A mean over nothing is NaN.

References:
  Rewards that go with length: Singhal et al., arXiv:2310.03716
  Distinct n-grams: Li et al., arXiv:1510.03055
"""

import base64
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.text import untrusted
from grpo_tpu.distributed import sharding
from grpo_tpu.rl import diagnostics, preference_metrics

NGRAM = 3  # Tokens.
FIRST_STEPS = 10  # What the policy writes in them is not new.


@jax.jit
def reward_health(
  rewards: Mapping[str, Float[Array, "U C"]],
  ids: Int[Array, "U C T"],
  mask: Bool[Array, "U C T"],
  correct: Bool[Array, "U C"],
  known: Bool[Array, "U C"],
  valid: Bool[Array, "U C"],
) -> diagnostics.Metrics:
  """The metrics of each reward, and the repetition in valid completions.

  Where it is `known`, the rules have checked whether a completion is `correct`.
  A reward that is not finite was not asked.
  """
  repeated = repetition(ids, mask)
  metrics = {"rollout/repetition": diagnostics.valid_mean(repeated, valid)}
  for name, values in rewards.items():
    asked = valid & jnp.isfinite(values)
    right, wrong = asked & known & correct, asked & known & ~correct
    cells = jnp.stack([right, wrong, asked & ~known])
    better = right[:, :, None] & wrong[:, None, :]
    chosen, rejected, is_pair = preference_metrics.all_pairs(values, better)
    wins = preference_metrics.wins(chosen, rejected)
    found = {
      "length_correlation": correlation(values, mask.sum(axis=-1), cells),
      "repetition_correlation": correlation(values, repeated, cells),
      "pair_accuracy": _mean(wins, is_pair),
      "mean_if_right": _mean(values, right),
      "mean_if_wrong": _mean(values, wrong),
    }
    metrics |= {f"reward/{name}_{key}": x for key, x in found.items()}
  return metrics


def correlation(
  first: Array, second: Array, cells: Bool[Array, "K U C"]
) -> Float[Array, ""]:
  """Pearson's correlation of the differences from the means of the cells.

  Each group has K cells, so what differs between groups or between cells adds
  nothing. 0 if one of the two never differs within a cell.
  """

  def center(values: Array) -> Array:
    values = jnp.where(cells, jnp.asarray(values, jnp.float32), -jnp.inf)
    # Equal values become exactly 0, which their mean would not make them.
    highest = values.max(axis=-1, keepdims=True)
    values = jnp.where(cells, values - highest, 0.0)
    count = jnp.maximum(cells.sum(axis=-1, keepdims=True), 1)
    mean = values.sum(axis=-1, keepdims=True) / count
    values = jnp.where(cells, values - mean, 0.0)
    # So that no square is too large or too small; then the norm is 0 or >= 1.
    tiny = jnp.finfo(jnp.float32).tiny
    values /= jnp.maximum(jnp.abs(values).max(), tiny)
    return values / jnp.maximum(jnp.linalg.norm(values), 1.0)

  return (center(first) * center(second)).sum()


def repetition(
  ids: Int[Array, "U C T"], mask: Bool[Array, "U C T"]
) -> Float[Array, "U C"]:
  """The share of a completion's n-grams that it has had before.

  0 for a completion without an n-gram.
  """
  count = max(ids.shape[-1] - NGRAM + 1, 0)
  shifts = [slice(i, i + count) for i in range(NGRAM)]
  is_ngram = jnp.stack([mask[..., x] for x in shifts]).all(axis=0)
  # What is no n-gram is sorted to the end.
  keys = (~is_ngram, *(ids[..., x] for x in shifts))
  keys = jnp.stack(jax.lax.sort(keys, num_keys=len(keys)))
  is_repeat = (keys[..., 1:] == keys[..., :-1]).all(0) & (keys[0, ..., 1:] == 0)
  return is_repeat.sum(axis=-1) / jnp.maximum(is_ngram.sum(axis=-1), 1)


class FirstTokens:
  """The set of tokens that the policy wrote in the first steps."""

  def __init__(self, vocab_size: int, mesh: Mesh):
    """Nothing was written yet."""
    self._steps, self._seen = 0, np.zeros(vocab_size, bool)
    self._look = jax.jit(
      lambda seen, ids, mask: (
        seen.at[ids].max(mask),
        diagnostics.valid_mean(~seen[ids], mask),
      ),
      out_shardings=sharding.replicated_sharding(mesh),
    )

  def novelty(
    self, ids: Int[Array, "U C T"], mask: Bool[Array, "U C T"]
  ) -> diagnostics.Metrics:
    """Adds the tokens of a first step; later, the share that is new."""
    # One program for both: no later step compiles.
    seen, new_share = self._look(self._seen, ids, mask)
    if self._steps >= FIRST_STEPS:
      return {"rollout/novel_token_share": new_share}
    self._seen = np.array(seen)
    self._steps += 1
    return {}

  def state(self) -> dict[str, Any]:
    """The steps and tokens so far, for the record of a checkpoint."""
    bits = base64.b64encode(np.packbits(self._seen)).decode()
    return {"steps": self._steps, "tokens": bits}

  def restore(self, saved: Any) -> None:
    """Takes over what `state` gave; a ValueError if it is something else."""
    source = "the first tokens in the checkpoint"
    untrusted.check_kind(saved, dict, source)
    self._steps = untrusted.get_field(saved, "steps", int, source)
    bits = base64.b64decode(untrusted.get_field(saved, "tokens", str, source))
    seen = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._seen.size)
    self._seen = seen.astype(bool)


def _mean(values: Array, counts: Array) -> Array:
  mean = diagnostics.valid_mean(values, counts)
  return jnp.where(counts.any(), mean, jnp.nan)
