"""Filters and weights of completions, groups and tokens, ahead of the loss.

Pure functions of arrays in float32, safe under jit; each is off at its neutral
setting. They take whole optimizer batches, because groups, shares and
thresholds are those of the batch.

References:
  Soft overlong punishment, dynamic sampling: DAPO, arXiv:2503.14476, section 3
  High-entropy tokens: Wang et al., arXiv:2506.01939
  Truncated importance sampling: Yao et al., 2025
  Off-policy sequence mask: DeepSeek-V3.2, arXiv:2512.02556, section 3.1
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def length_penalty(
  length: Int[Array, "*rows"], *, max_length: int, soft_tokens: int
) -> Float[Array, "*rows"]:
  """The penalty of a completion's length, to add to its reward: 0 down to -1.

  0 up to `max_length - soft_tokens`, then evenly down to -1 at `max_length`
  (DAPO, equation 13). The end of turn is a token too.
  """
  over = jnp.asarray(length, jnp.float32) - (max_length - soft_tokens)
  return -jnp.clip(over / soft_tokens, 0.0, 1.0)


def has_reward_variance(
  rewards: Float[Array, "U C"], valid: Bool[Array, "U C"]
) -> Bool[Array, " U"]:
  """True for groups with two different valid rewards; only they teach."""
  is_valid = valid & jnp.isfinite(rewards)
  highest = jnp.where(is_valid, rewards, -jnp.inf).max(axis=1)
  lowest = jnp.where(is_valid, rewards, jnp.inf).min(axis=1)
  return highest > lowest


def has_signal(
  compared: Mapping[str, Float[Array, "U C"]], valid: Bool[Array, "U C"]
) -> Bool[Array, " U"]:
  """True for groups in which any of these rewards has variance."""
  varies = [has_reward_variance(x, valid) for x in compared.values()]
  return jnp.stack(varies).any(axis=0)


def top_entropy(
  entropy: Float[Array, "*batch"], mask: Bool[Array, "*batch"], *, share: float
) -> Bool[Array, "*batch"]:
  """True for the `share` of the unmasked tokens with the highest entropy.

  The threshold is the (1 - share) quantile of the whole batch; all tokens at
  the threshold count.
  """
  entropy = jnp.where(mask, jnp.asarray(entropy, jnp.float32), jnp.nan)
  # Not interpolated: rounding could lift it above both its neighbours.
  threshold = jnp.nanquantile(entropy, 1.0 - share, method="higher")
  return jnp.where(mask, entropy >= threshold, False)


def sampler_weights(
  old: Float[Array, "*rows T"],
  sampler: Float[Array, "*rows T"],
  mask: Bool[Array, "*rows T"],
  *,
  correction: str,
) -> Float[Array, "*rows T"]:
  """Ratios of the old policy to the sampler, before any cap; 1 on padding.

  `old` and `sampler` are log-probabilities of training and of the sampler.
  """
  gap = jnp.where(mask, old - sampler, 0.0)
  if correction == "sequence":
    gap = jnp.broadcast_to(row_means(gap, mask)[..., None], gap.shape)
  # As in the loss, a larger gap means that something else is broken.
  weights = jnp.where(mask, jnp.exp(jnp.minimum(gap, 60.0)), 1.0)
  return jax.lax.stop_gradient(weights)


def is_outlier(
  logps: Float[Array, "*rows T"],
  old: Float[Array, "*rows T"],
  sampler: Float[Array, "*rows T"],
  mask: Bool[Array, "*rows T"],
  advantages: Float[Array, "*rows"],
  *,
  ratio_bounds: tuple[float, ...] = (),
  off_policy_bound: float | None = None,
) -> Bool[Array, "*rows"]:
  """True for rows that are too far from the policy that sampled them.

  Log-probabilities are under the current policy, the old one, and the sampler.
  For the bounds see `settings.ShapingConfig`.
  """
  found = jnp.zeros(advantages.shape, bool)
  if ratio_bounds:
    low, high = ratio_bounds
    ratio = jnp.exp(row_means(jnp.where(mask, old - sampler, 0.0), mask))
    found = (ratio < low) | (ratio > high)
  if off_policy_bound is not None:
    drift = row_means(jnp.where(mask, sampler - logps, 0.0), mask)
    found |= (advantages < 0) & (drift > off_policy_bound)
  return found


def row_means(per_token: Array, mask: Array) -> Array:
  """Each row's mean over unmasked tokens; `per_token` is 0 on the others."""
  return per_token.sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)
