"""The loss of a reward model on labelled completions, pair by pair.

Pure functions of scores and labels, which are NaN for a missing completion.

References:
  Bradley and Terry 1952, https://doi.org/10.2307/2334029.
  Centering: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244.
  Margins: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, section 3.2.2.
  Ties as half a win: Liu et al. 2024, https://arxiv.org/abs/2411.12843.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from grpo_tpu.rl import diagnostics, preference_metrics
from grpo_tpu.rl.settings import PairLossConfig


def find_pairs(
  labels: Float[ArrayLike, "U C"], *, ties: bool
) -> Bool[Array, "U C C"]:
  """True at [u, i, j] if completion i is labelled better than j.

  With `ties` also once for each two with equal labels.
  """
  labels = jnp.asarray(labels)
  first, second = labels[:, :, None], labels[:, None, :]
  if not ties:
    return first > second
  once = jnp.triu(jnp.ones(labels.shape[1:] * 2, bool), 1)
  return (first > second) | ((first == second) & once[None])


def pair_loss(
  scores: Float[ArrayLike, "U C"],
  labels: Float[ArrayLike, "U C"],
  *,
  config: PairLossConfig,
) -> Float[Array, ""]:
  """The Bradley-Terry loss, summed over pairs; `scores` carry the gradient.

  The sum is to be divided by the number of pairs of the whole batch.
  """
  labels = jnp.asarray(labels, jnp.float32)
  scores = jnp.where(jnp.isnan(labels), 0.0, jnp.asarray(scores, jnp.float32))
  first, second = scores[:, :, None], scores[:, None, :]
  is_pair = find_pairs(labels, ties=config.ties)
  gap = jnp.where(is_pair, labels[:, :, None] - labels[:, None, :], 0.0)
  lead = first - second - config.margin * gap
  # The chance that the first is the better one, says the label.
  target = jnp.where(gap > 0, 1.0 - config.label_smoothing, 0.5)
  loss = -target * jax.nn.log_sigmoid(lead)
  loss -= (1.0 - target) * jax.nn.log_sigmoid(-lead)
  loss += config.centering * jnp.square(first + second)
  return jnp.where(is_pair, loss, 0.0).sum()


def metrics(
  scores: Float[ArrayLike, "U C"],
  labels: Float[ArrayLike, "U C"],
  *,
  ties: bool,
) -> dict[str, Float[Array, ""]]:
  """Accuracy and margin over pairs with different labels, 0 without any.

  Also the scores' size, and the numbers of pairs and of unpaired completions.
  """
  scores, is_present = jnp.asarray(scores, jnp.float32), ~jnp.isnan(labels)
  is_pair = find_pairs(labels, ties=ties)
  is_unpaired = is_present & ~is_pair.any(axis=1) & ~is_pair.any(axis=2)
  chosen, rejected, valid = preference_metrics.all_pairs(
    scores, find_pairs(labels, ties=False)
  )
  mean = diagnostics.valid_mean(scores, is_present)
  squares = jnp.square(scores - mean)
  return {
    "pairs": is_pair.sum(dtype=jnp.float32),
    "unpaired_completions": is_unpaired.sum(dtype=jnp.float32),
    "pairwise_accuracy": preference_metrics.accuracy(
      chosen, rejected, valid=valid
    ),
    "pairwise_margin": diagnostics.valid_mean(chosen - rejected, valid),
    "score_mean": mean,
    "score_std": jnp.sqrt(diagnostics.valid_mean(squares, is_present)),
  }
