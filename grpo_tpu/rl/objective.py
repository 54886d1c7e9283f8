"""The GRPO objective: rewards to advantages, log-probabilities to one loss.

Pure functions of arrays, in float32, safe under jit, vmap and scan. They know
nothing of models, texts, devices or microbatches: a caller that passes a part
of a batch passes the whole batch's `denominator` and `num_tokens`, and adds up
the results.

References:
  GRPO: Shao et al., DeepSeekMath, arXiv:2402.03300
  Dr. GRPO: Liu et al., arXiv:2503.20783
  DAPO: Yu et al., arXiv:2503.14476
  GSPO: Zheng et al., arXiv:2507.18071
  CISPO: MiniMax-M1, arXiv:2506.13585
  SAPO: Gao et al., arXiv:2511.20347
  GDPO: Liu et al., arXiv:2601.05242
  KL estimators: Schulman, http://joschu.net/blog/kl-approx.html
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from data_pipelines.validation import require_one_of
from grpo_tpu.rl import shaping
from grpo_tpu.rl.settings import (
  ADVANTAGE_BASELINES,
  ADVANTAGE_SCALES,
  ObjectiveConfig,
)

Metrics = dict[str, Float[Array, ""]]

# exp(60) and its products with a beta, an advantage and a token count fit in
# float32. A larger log-ratio means that something else is broken.
_MAX_EXPONENT = 60.0
# The sum of its squares over a batch fits in float32 too.
_MAX_RATIO = 1e15

# How steeply "sapo" fades tokens out, for positive and negative advantages
# (SAPO, section 5.1: worse tokens fade a little sooner).
_SAPO_TEMPERATURES = (1.0, 1.05)


def group_advantages(
  rewards: Num[ArrayLike, " N"],
  *,
  num_generations: int,
  scale: str = "group",
  baseline: str = "mean",
  epsilon: float = 1e-4,
  valid: Bool[ArrayLike, " N"] | None = None,
) -> Float[Array, " N"]:
  """How much better each completion is than the others of its prompt.

  Exactly 0 in a group without two different valid rewards.

  Args:
    rewards: One per completion; the completions of a prompt are adjacent.
    num_generations: Completions per prompt; divides N.
    scale: "group" divides by the group's standard deviation (unbiased),
      "batch" by that of all valid rewards of the batch, "none" by nothing.
    baseline: "mean" subtracts the group's mean, "leave_one_out" the mean of
      the group's other valid rows.
    epsilon: Added to the standard deviation.
    valid: False where there is no reward. Such rows, and those whose reward is
      not finite, stay out of the statistics and get 0.
  """
  for field, value, choices in (
    ("advantage_scale", scale, ADVANTAGE_SCALES),
    ("advantage_baseline", baseline, ADVANTAGE_BASELINES),
  ):
    require_one_of(f"objective.{field}", value, choices)
  rewards = jnp.asarray(rewards, jnp.float32)
  if num_generations < 1 or rewards.shape[0] % num_generations:
    raise ValueError(
      f"rollout.num_generations ({num_generations}) must divide the number of "
      f"rewards ({rewards.shape[0]}); pass whole groups."
    )
  groups = rewards.reshape(-1, num_generations)
  is_valid = jnp.isfinite(groups)
  if valid is not None:
    is_valid &= jnp.asarray(valid).reshape(-1, num_generations)
  groups = jnp.where(is_valid, groups, 0.0)

  count = is_valid.sum(axis=1, keepdims=True)
  mean = groups.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
  centered = jnp.where(is_valid, groups - mean, 0.0)
  # r - mean of the others = (r - mean of all) * n / (n - 1).
  advantages = centered
  if baseline == "leave_one_out":
    advantages = centered * count / jnp.maximum(count - 1, 1)
  if scale == "group":
    variance = jnp.square(centered).sum(axis=1, keepdims=True)
    variance /= jnp.maximum(count - 1, 1)
    advantages = advantages / (jnp.sqrt(variance) + epsilon)
  elif scale == "batch":
    total = is_valid.sum()
    spread = groups - groups.sum() / jnp.maximum(total, 1)
    variance = jnp.square(jnp.where(is_valid, spread, 0.0)).sum()
    variance /= jnp.maximum(total - 1, 1)
    advantages = advantages / (jnp.sqrt(variance) + epsilon)

  # The rounded mean of equal numbers may differ from them, and a small epsilon
  # would magnify the difference.
  varies = shaping.has_reward_variance(groups, is_valid)[:, None]
  return jnp.where(varies, advantages, 0.0).reshape(-1)


def normalized_sum(
  parts: Sequence[Float[ArrayLike, "*rows"]],
  *,
  valid: Bool[ArrayLike, "*rows"],
  epsilon: float = 1e-4,
) -> Float[Array, "*rows"]:
  """The sum of several advantages over its standard deviation in the batch.

  Of weighted `group_advantages` it is GDPO's (equations 4 to 7); the batch's
  mean is 0, because every group's advantages sum to 0.
  """
  total = jnp.stack([jnp.asarray(x, jnp.float32) for x in parts]).sum(axis=0)
  count = jnp.asarray(valid).sum()
  variance = jnp.square(total).sum() / jnp.maximum(count - 1, 1)
  return total / (jnp.sqrt(variance) + epsilon)


def denominator(
  completion_mask: Bool[ArrayLike, "N T"],
  config: ObjectiveConfig,
  *,
  row_mask: Bool[ArrayLike, " N"] | None = None,
) -> Float[Array, ""]:
  """The divisor of the loss over these rows; the divisors of parts add up.

  See `ObjectiveConfig.aggregation`; rows without a token count too. `row_mask`
  is False on rows that are not part of the batch, whose tokens are all masked.
  """
  completion_mask = jnp.asarray(completion_mask)
  if config.aggregation == "token_mean":
    return completion_mask.sum(dtype=jnp.float32)
  num_rows = jnp.float32(completion_mask.shape[0])
  if row_mask is not None:
    num_rows = jnp.asarray(row_mask).sum(dtype=jnp.float32)
  if config.aggregation == "sequence_mean":
    return num_rows
  if config.max_completion_length is None:
    raise ValueError(
      "objective.max_completion_length (None) must be set where "
      "objective.aggregation is constant; set it to rollout.max_new_tokens."
    )
  return num_rows * config.max_completion_length


def policy_loss(
  per_token_logps: Float[ArrayLike, "N T"],
  old_per_token_logps: Float[ArrayLike, "N T"] | None,
  ref_per_token_logps: Float[ArrayLike, "N T"] | None,
  advantages: Float[ArrayLike, " N"],
  completion_mask: Bool[ArrayLike, "N T"],
  *,
  config: ObjectiveConfig,
  denominator: Num[ArrayLike, ""] | None = None,
  num_tokens: Num[ArrayLike, ""] | None = None,
  sampler_weights: Float[ArrayLike, "N T"] | None = None,
  token_weights: Num[ArrayLike, "N T"] | None = None,
  kl: Float[ArrayLike, "N T"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
  """The clipped GRPO objective plus the KL term, negated: lower is better.

  Losses, gradients and metrics of microbatches ADD UP to those of the batch if
  each is given the whole batch's `denominator` and `num_tokens`.

  Args:
    per_token_logps: Log-probabilities under the policy being trained; they
      alone carry the gradient.
    old_per_token_logps: The same under the policy that sampled; None means the
      current ones, without gradient, so that the ratio is 1.
    ref_per_token_logps: The same under the frozen reference, or None.
    advantages: One per completion, from `group_advantages`.
    completion_mask: True on sampled tokens, the end of turn included; elsewhere
      the other arrays may hold anything.
    config: The terms of the loss.
    denominator: The whole batch's `objective.denominator`, by default this
      part's.
    num_tokens: The whole batch's number of unmasked tokens, the divisor of the
      metrics. By default `denominator` for "token_mean", else this part's own.
    sampler_weights: exp(old - sampler log-probability), capped at
      `config.tis_cap`; the KL is not weighted.
    token_weights: Other factors of each token's surrogate, uncapped.
    kl: The exact KL to a teacher at each position, with its gradient, in the
      place of the reference's.

  Returns:
    The loss, averaged as `config.aggregation` says, and metrics averaged over
    tokens: `kl` (the value of the KL term before beta), `kl_k1`, `kl_k2`,
    `kl_k3` (each estimator), `ratio`, `ratio_squared`, `old_kl` (k3 of old
    against current), `sampler_weight` (after the cap), and the shares of
    clipped tokens: `clip_fraction_low`, `clip_fraction_high`, their sum
    `clip_fraction`, and `clip_fraction_dual`.
  """
  mask = jnp.asarray(completion_mask)

  # Padding is zeroed before exp, not after: inf * 0 would poison the gradient.
  def zero_padding(values):
    return jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)

  def constant(values):
    return jax.lax.stop_gradient(
      logps if values is None else zero_padding(values)
    )

  logps = zero_padding(per_token_logps)
  log_ratio = logps - constant(old_per_token_logps)
  token_ratio = ratio = _ratio(log_ratio)
  if config.importance == "sequence":
    row_ratio = _ratio(shaping.row_means(log_ratio, mask))
    ratio = jnp.broadcast_to(row_ratio[:, None], logps.shape)
  weights = jnp.ones_like(logps)
  if sampler_weights is not None:
    weights = constant(sampler_weights)
    if config.tis_cap is not None:
      weights = jnp.minimum(weights, config.tis_cap)
  advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
  advantages = advantages[:, None]

  estimators = {}
  if kl is None:
    ref_log_ratio = jax.lax.stop_gradient(logps) - constant(ref_per_token_logps)
    estimators = _kl_estimators(ref_log_ratio)
    weight = token_ratio if config.kl_gradient == "reverse" else ratio
    kl = _with_gradient(
      _kl_value(ref_log_ratio, weight, config),
      _kl_gradient(ref_log_ratio, weight, mask, config),
      logps,
    )
  per_token_loss = -weights * _surrogate(ratio, logps, advantages, config)
  if token_weights is not None:
    per_token_loss *= constant(token_weights)
  if config.beta:
    per_token_loss += config.beta * zero_padding(kl)
  loss = _aggregate(zero_padding(per_token_loss), mask, config, denominator)

  if num_tokens is None:
    whole = config.aggregation == "token_mean" and denominator is not None
    num_tokens = denominator if whole else mask.sum()
  per_token_metrics = {
    "kl": kl,
    **{f"kl_{name}": value for name, value in estimators.items()},
    "ratio": jnp.minimum(ratio, _MAX_RATIO),
    "ratio_squared": jnp.square(jnp.minimum(ratio, _MAX_RATIO)),
    "old_kl": _k3(-log_ratio),
    "sampler_weight": weights,
    **_clip_fractions(ratio, advantages, config),
  }
  metrics = {
    name: zero_padding(jax.lax.stop_gradient(value)).sum()
    / _at_least_one(num_tokens)
    for name, value in per_token_metrics.items()
  }
  return loss, metrics


def _with_gradient(value, gradient, x):
  """`value` as a function of `x`, whose derivative is `gradient`.

  A limit on a value inside a differentiated function would cut its gradient
  off. So values and gradients are limited each on its own.
  """
  value, gradient = jax.lax.stop_gradient((value, gradient))
  return value + gradient * (x - jax.lax.stop_gradient(x))  # The term is 0.


def _ratio(log_ratio):
  ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_EXPONENT))
  return _with_gradient(ratio, ratio, log_ratio)


def _at_least_one(count):
  return jnp.maximum(count, 1.0)


def _aggregate(per_token_loss, mask, config, divisor):
  if divisor is None:
    divisor = denominator(mask, config)
  if config.aggregation == "sequence_mean":
    total = shaping.row_means(per_token_loss, mask).sum()
  else:
    total = per_token_loss.sum()
  return total / _at_least_one(divisor)


def _surrogate(ratio, logps, advantages, config):
  if config.surrogate == "cispo":
    capped = jnp.minimum(ratio, config.epsilon_high)
    return jax.lax.stop_gradient(capped) * advantages * logps
  if config.surrogate == "sapo":
    temperature = jnp.where(advantages > 0, *_SAPO_TEMPERATURES)
    gate = jax.nn.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return gate * advantages
  clipped = jnp.clip(ratio, 1 - config.epsilon_low, 1 + config.epsilon_high)
  if config.dual_clip is not None:
    ratio = jnp.minimum(ratio, config.dual_clip)
  return jnp.minimum(ratio * advantages, clipped * advantages)


def _clip_fractions(ratio, advantages, config):
  """Tokens whose gradient the clip stops, or shrinks for cispo, by cause."""
  if config.surrogate == "cispo":
    high = ratio > config.epsilon_high
    low = jnp.zeros_like(high)
  elif config.surrogate == "sapo":
    low = high = jnp.zeros(ratio.shape, bool)
  else:
    high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
    low = (ratio < 1 - config.epsilon_low) & (advantages < 0)
  dual = jnp.zeros_like(high)
  if config.dual_clip is not None:
    dual = (ratio > config.dual_clip) & (advantages < 0)
  return {
    "clip_fraction": low | high,
    "clip_fraction_low": low,
    "clip_fraction_high": high,
    "clip_fraction_dual": dual,
  }


def _k3(log_ratio):
  """exp(-x) - 1 + x, which is never below 0."""
  return jnp.expm1(jnp.minimum(-log_ratio, _MAX_EXPONENT)) + log_ratio


def _kl_estimators(log_ratio):
  """Three values whose mean under the policy estimates KL(policy || reference).

  The mean is exact for k1 and k3, approximate for k2.
  """
  return {
    "k1": log_ratio,
    "k2": 0.5 * jnp.square(log_ratio),
    "k3": _k3(log_ratio),
  }


def _kl_value(log_ratio, weight, config):
  value = _kl_estimators(log_ratio)[config.kl_estimator]
  if config.kl_gradient == "importance_weighted":
    # Two limited exponentials: their product would overflow.
    return jnp.minimum(weight * value, math.exp(_MAX_EXPONENT))
  return value


def _kl_gradient(log_ratio, weight, mask, config):
  """The derivative of the KL term by each token's log-probability.

  `weight` is the importance ratio, for "reverse" the token's own.
  """
  if config.kl_gradient == "reverse":
    # grad KL(policy || ref) = E_old[ratio * log(policy/ref) * grad log policy].
    return weight * log_ratio
  slope = {
    "k1": jnp.ones_like(log_ratio),
    "k2": log_ratio,
    "k3": -jnp.expm1(jnp.minimum(-log_ratio, _MAX_EXPONENT)),
  }[config.kl_estimator]
  if config.kl_gradient == "estimator":
    return slope
  # A token's own ratio r has the derivative r, so the one of r * k is r * (k +
  # dk). Summed beforehand: k3 and its slope are huge and nearly cancel out.
  both = {
    "k1": log_ratio + 1,
    "k2": 0.5 * jnp.square(log_ratio) + log_ratio,
    "k3": log_ratio,
  }[config.kl_estimator]
  slope, both = (_limited(weight * x) for x in (slope, both))
  if config.importance == "token":
    return both
  # Each token of a row moves the row's ratio by its share.
  slope, both = (jnp.where(mask, x, 0.0) for x in (slope, both))
  mean_slope, mean = (
    shaping.row_means(x, mask)[:, None] for x in (slope, both)
  )
  return mean + (slope - mean_slope)


def _limited(x):
  limit = math.exp(_MAX_EXPONENT)
  return jnp.clip(x, -limit, limit)
