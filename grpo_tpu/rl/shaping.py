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

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.validation import require_all, require_one_of


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
  """Filters and weights; docs/objective.md says when to use which.

  Attributes:
    truncated: What becomes of a completion that ran out of tokens. "keep":
      nothing. "mask": it stays in its group's statistics, its tokens do not
      count. "penalise": its reward falls with its length, see `soft_tokens`.
    soft_tokens: The last so many tokens of `rollout.max_new_tokens`, over which
      "penalise" takes the reward down, evenly, by 1 in all.
    zero_variance: What becomes of a group that is all paid the same. "keep":
      it counts as tokens and rows that teach nothing. "drop": it is no part of
      the batch. "resample": further prompts are sampled in its place.
    max_batches: Batches that "resample" may sample for one step; what is still
      of one reward then is dropped.
    advantage_clip: Advantages are held within plus and minus this; None for
      off.
    top_entropy_share: Share of the batch's tokens, those of highest entropy,
      that the surrogate is taken over; 1 for all. The divisor stays that of
      all tokens.
    entropy_bonus: Weight of the mean entropy of the tokens, which the loss is
      lowered by; 0 for none.
    sampler_correction: Truncated importance sampling, where
      `objective.tis_cap` is set: "token" weighs each by its own odds of policy
      over sampler, "sequence" a whole row by exp of its mean log-odds.
  """

  truncated: str
  soft_tokens: int
  zero_variance: str
  max_batches: int
  advantage_clip: float | None
  top_entropy_share: float
  entropy_bonus: float
  sampler_correction: str

  def __post_init__(self):
    for field, choices in _CHOICES.items():
      require_one_of(f"shaping.{field}", getattr(self, field), choices)
    clip = self.advantage_clip
    require_all(
      self,
      "shaping",
      ("soft_tokens", self.soft_tokens >= 1, "be at least 1 token", 128),
      (
        "max_batches",
        self.max_batches >= (2 if self.zero_variance == "resample" else 1),
        "be at least 2 to resample, and 1 otherwise",
        3,
      ),
      ("advantage_clip", clip is None or clip > 0, "be above 0 or None", None),
      (
        "top_entropy_share",
        0 < self.top_entropy_share <= 1,
        "be above 0, at most 1",
        1.0,
      ),
      (
        "entropy_bonus",
        0 <= self.entropy_bonus < math.inf,
        "be 0 or a positive weight",
        0.0,
      ),
    )


_CHOICES = {
  "truncated": ("keep", "mask", "penalise"),
  "zero_variance": ("keep", "drop", "resample"),
  "sampler_correction": ("token", "sequence"),
}


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
