"""Laws of shaping: penalties, filters and weights against plain twins."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import shaping
from grpo_tpu.rl.settings import ShapingConfig

NEUTRAL = ShapingConfig(
  truncated="keep",
  soft_tokens=128,
  zero_variance="keep",
  max_batches=3,
  advantage_clip=None,
  top_entropy_share=1.0,
  entropy_bonus=0.0,
  sampler_correction="token",
  sampler_ratio_bounds=(),
  off_policy_bound=None,
)


# --- Completions and groups.


def test_length_penalty_is_that_of_dapo():
  """(L_max - L_cache - |y|) / L_cache between, 0 before and -1 after."""
  lengths = jnp.array([[0, 16, 17], [19, 20, 35]])
  penalty = shaping.length_penalty(lengths, max_length=20, soft_tokens=4)
  np.testing.assert_array_equal(penalty, [[0, 0, -0.25], [-0.75, -1, -1]])


def test_only_two_different_valid_rewards_have_variance():
  nan, inf = np.nan, np.inf
  groups = [
    ([0.0, 1.0, 0.0], [True, True, True], True),
    ([0.9, 0.9, 0.9], [True, True, True], False),
    ([0.9, 0.9, 5.0], [True, True, False], False),
    ([nan, 0.9, 0.9], [True, True, True], False),
    ([inf, 0.9, -inf], [True, True, True], False),
    ([nan, 0.9, 0.8], [True, True, True], True),
    ([0.1, 0.9, 0.5], [True, False, False], False),
    ([0.1, 0.9, 0.5], [False, False, False], False),
  ]
  rewards, valid, expected = map(np.array, zip(*groups, strict=True))
  spread = shaping.has_reward_variance(jnp.float32(rewards), valid)
  np.testing.assert_array_equal(spread, expected)


# --- Tokens.


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_top_entropy_tokens_are_those_at_or_above_numpys_quantile(share):
  """On entropies with ties, and junk under the mask."""
  rng = np.random.default_rng(0)
  top_entropy = jax.jit(shaping.top_entropy, static_argnames="share")
  for _ in range(20):
    entropy = rng.exponential(size=(5, 4, 6)).round(1).astype(np.float32)
    mask = rng.random(entropy.shape) < 0.6
    threshold = np.quantile(entropy[mask], 1 - share)
    soiled = np.where(mask, entropy, rng.choice([np.nan, 99.0], mask.shape))
    np.testing.assert_array_equal(
      top_entropy(jnp.float32(soiled), mask, share=share),
      mask & (entropy >= threshold),
    )


def test_a_share_of_one_chooses_every_unmasked_token():
  entropy = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32)
  mask = np.arange(9) < np.array([[9], [3], [0], [5]])
  chosen = shaping.top_entropy(entropy, mask, share=1.0)
  np.testing.assert_array_equal(chosen, mask)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_without_tokens_none_is_chosen(share):
  chosen = shaping.top_entropy(
    jnp.ones((2, 3)), jnp.zeros((2, 3), bool), share=share
  )
  assert not chosen.any()


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_sampler_weights_are_the_ratios_and_one_on_padding(correction):
  """For each token, or a row's geometric mean; padding may hold NaN."""
  rng = np.random.default_rng(2)
  shape = (3, 4, 6)
  old, sampler = -rng.exponential(size=(2, *shape)).astype(np.float32)
  mask = rng.random(shape) < 0.6
  mask[1, 2] = False
  expected = np.ones(shape)
  for row in np.ndindex(shape[:2]):
    tokens = mask[row]
    odds = np.exp(old[row] - sampler[row])[tokens]
    if correction == "token":
      expected[row][tokens] = odds
    elif tokens.any():
      expected[row][:] = np.prod(odds) ** (1 / odds.size)
  soiled = np.where(mask, sampler, np.nan)
  weights = shaping.sampler_weights(old, soiled, mask, correction=correction)
  np.testing.assert_allclose(
    np.where(mask, weights, 1), np.where(mask, expected, 1), rtol=1e-5
  )
  empty = ~mask.any(axis=-1)
  np.testing.assert_array_equal(weights[empty], 1)
  if correction == "token":
    np.testing.assert_array_equal(weights[~mask], 1)


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_sampler_weights_are_finite_and_carry_no_gradient(correction):
  mask = jnp.array([[True, True, False]])
  sampler = jnp.array([[-1.0, -900.0, jnp.nan]])

  def total(old):
    return shaping.sampler_weights(
      old, sampler, mask, correction=correction
    ).sum()

  value, gradient = jax.value_and_grad(total)(jnp.full((1, 3), -0.5))
  assert jnp.isfinite(value)
  np.testing.assert_array_equal(gradient, 0)


# --- Settings.


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("truncated", "drop"),
    ("soft_tokens", 0),
    ("zero_variance", "mask"),
    ("max_batches", 0),
    ("advantage_clip", 0.0),
    ("advantage_clip", math.nan),
    ("top_entropy_share", 0.0),
    ("top_entropy_share", 1.1),
    ("top_entropy_share", math.nan),
    ("entropy_bonus", -0.01),
    ("entropy_bonus", math.inf),
    ("entropy_bonus", math.nan),
    ("sampler_correction", "row"),
  ],
)
def test_a_wrong_setting_is_refused_by_name_value_and_remedy(field, value):
  with pytest.raises(ValueError) as error:
    dataclasses.replace(NEUTRAL, **{field: value})
  message = str(error.value)
  assert message.startswith(f"shaping.{field} ({value!r}) must ")
  if "must be one of " in message:
    choices = message.rstrip(".").split("must be one of ")[1].partition(";")[0]
    for choice in choices.split(", "):
      dataclasses.replace(NEUTRAL, **{field: choice})
    return
  name, remedy = message.rstrip(".").split("; set shaping.")[1].split("=")
  assert name == field
  kind = type(getattr(NEUTRAL, field))
  fixed = None if remedy == "None" else kind(remedy)
  dataclasses.replace(NEUTRAL, **{field: fixed})


def test_resampling_needs_a_second_batch_and_keeping_does_not():
  dataclasses.replace(NEUTRAL, max_batches=1)
  dataclasses.replace(NEUTRAL, zero_variance="resample", max_batches=2)
  with pytest.raises(ValueError, match=r"shaping\.max_batches \(1\).*=3\."):
    dataclasses.replace(NEUTRAL, zero_variance="resample", max_batches=1)


# --- Rows that are too far from the sampler.


def twin_outliers(logps, old, sampler, mask, advantages, bounds, bound):
  """Row by row, in NumPy."""
  found = []
  for row in range(len(mask)):
    kept = mask[row]
    gap = (old[row] - sampler[row])[kept]
    drift = (sampler[row] - logps[row])[kept]
    gap, drift = (x.mean() if x.size else 0.0 for x in (gap, drift))
    is_out = bool(bounds) and not bounds[0] <= np.exp(gap) <= bounds[1]
    is_stale = bound is not None and advantages[row] < 0 and drift > bound
    found.append(is_out or is_stale)
  return found


@pytest.mark.parametrize(
  ("bounds", "bound"),
  [((0.8, 1.25), None), ((), 0.1), ((0.9, np.inf), 0.0), ((), None)],
)
def test_outliers_are_those_of_a_plain_twin(bounds, bound):
  """Padding may hold anything; an empty row is nobody's outlier."""
  rng = np.random.default_rng(3)
  logps, old, sampler = rng.normal(-1, 0.6, (3, 64, 5)).astype(np.float32)
  mask = rng.random((64, 5)) < 0.7
  mask[:3] = False
  advantages = rng.normal(0, 1, 64).astype(np.float32)
  wanted = twin_outliers(logps, old, sampler, mask, advantages, bounds, bound)
  assert any(wanted) == bool(bounds or bound is not None) and not all(wanted)
  dirty = np.where(mask, sampler, np.nan)
  found = shaping.is_outlier(
    *(jnp.asarray(x) for x in (logps, old, dirty, mask, advantages)),
    ratio_bounds=bounds,
    off_policy_bound=bound,
  )
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bounds", [(0.5,), (1.1, 2.0), (0.5, 0.9), (2, 0.5)])
def test_bounds_that_would_mask_every_row_are_refused(bounds):
  with pytest.raises(ValueError, match="sampler_ratio_bounds"):
    dataclasses.replace(NEUTRAL, sampler_ratio_bounds=bounds)
