"""Which completions and tokens an update counts, and how much.

What stands between the rewards and the loss: filters of completions, groups and
tokens, and corrections of their weight. Pure functions of arrays in float32,
safe under jit; each is off at its neutral setting. They see whole batches: what
is a group, a share or a threshold here is the optimizer batch's.

References:
  Soft overlong punishment, dynamic sampling: DAPO, arXiv:2503.14476, section 3
  High-entropy tokens: Wang et al., arXiv:2506.01939
  Truncated importance sampling: Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training", 2025
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def length_penalty(
  length: Int[Array, "*rows"], *, max_length: int, soft_tokens: int
) -> Float[Array, "*rows"]:
  """What a completion's length adds to its reward: 0 down to -1.

  Nothing up to `max_length - soft_tokens`, then evenly less, -1 at
  `max_length` (DAPO, equation 13).

  Args:
    length: In tokens, the end of turn included.
    max_length: Tokens that a completion may have.
    soft_tokens: Of these, how many are punished.
  """
  over = jnp.asarray(length, jnp.float32) - (max_length - soft_tokens)
  return -jnp.clip(over / soft_tokens, 0.0, 1.0)


def has_reward_variance(
  rewards: Float[Array, "U C"], valid: Bool[Array, "U C"]
) -> Bool[Array, " U"]:
  """Which groups have two valid rewards that differ: those that teach."""
  counted = valid & jnp.isfinite(rewards)
  highest = jnp.where(counted, rewards, -jnp.inf).max(axis=1)
  lowest = jnp.where(counted, rewards, jnp.inf).min(axis=1)
  return highest > lowest


def top_entropy(
  entropy: Float[Array, "*batch"], mask: Bool[Array, "*batch"], *, share: float
) -> Bool[Array, "*batch"]:
  """The `share` of the unmasked tokens whose entropy is highest.

  Those at or above the (1 - share) quantile of the whole batch; equal entropies
  at the threshold all count.
  """
  entropy = jnp.where(mask, jnp.asarray(entropy, jnp.float32), jnp.nan)
  # Not interpolated: rounding could lift it above those that it lies between.
  threshold = jnp.nanquantile(entropy, 1.0 - share, method="higher")
  return jnp.where(mask, entropy >= threshold, False)


def sampler_weights(
  old: Float[Array, "*rows T"],
  sampler: Float[Array, "*rows T"],
  mask: Bool[Array, "*rows T"],
  *,
  correction: str,
) -> Float[Array, "*rows T"]:
  """Odds of the old policy over what sampled, before any cap; 1 on padding.

  Args:
    old: Log-probabilities as training computes them.
    sampler: Log-probabilities as the sampler computed them.
    mask: True on sampled tokens.
    correction: "token" or "sequence"; see `ShapingConfig`.
  """
  gap = jnp.where(mask, old - sampler, 0.0)
  if correction == "sequence":
    count = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    gap = jnp.broadcast_to(gap.sum(axis=-1, keepdims=True) / count, gap.shape)
  # As in the loss: a gap beyond it says that something else is broken.
  weights = jnp.where(mask, jnp.exp(jnp.minimum(gap, 60.0)), 1.0)
  return jax.lax.stop_gradient(weights)
