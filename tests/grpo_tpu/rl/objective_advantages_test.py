"""Laws of advantages: a plain twin, ties, failed rewards."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import objective


def twin_advantages(rewards, valid, size, scale, baseline, epsilon):
  known = [r for r, v in zip(rewards, valid, strict=True) if v]
  spread_of_batch = np.std(known, ddof=1)
  result = np.zeros(len(rewards))
  for start in range(0, len(rewards), size):
    rows = [i for i in range(start, start + size) if valid[i]]
    values = [float(rewards[i]) for i in rows]
    if len(set(values)) < 2:
      continue
    for i in rows:
      others = [float(rewards[j]) for j in rows if j != i]
      level = np.mean(values if baseline == "mean" else others)
      spread = {
        "group": np.std(values, ddof=1) + epsilon,
        "batch": spread_of_batch + epsilon,
        "none": 1.0,
      }[scale]
      result[i] = (rewards[i] - level) / spread
  return result


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_those_of_the_slow_twin(scale, baseline, size):
  rng = np.random.default_rng(size)
  rewards = np.float32(rng.choice([0.0, 0.3, 1.0], size=48))
  valid = rng.random(48) < 0.8
  valid[:size] = False
  rewards[:3] = np.nan
  advantages = objective.group_advantages(
    rewards,
    num_generations=size,
    scale=scale,
    baseline=baseline,
    epsilon=1e-3,
    valid=valid,
  )
  expected = twin_advantages(rewards, valid, size, scale, baseline, 1e-3)
  np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unanimous_group_has_no_advantage(scale):
  """Three times 0.9 do not have the mean 0.9 in float32."""
  rewards = jnp.array([0.9, 0.9, 0.9, 0.0, 0.5, 1.0])
  advantages = objective.group_advantages(
    rewards, num_generations=3, scale=scale, epsilon=1e-9
  )
  np.testing.assert_array_equal(advantages[:3], 0.0)
  assert (advantages[jnp.array([3, 5])] != 0).all()


@pytest.mark.parametrize("failed", [jnp.nan, jnp.inf, 7.0])
def test_a_failed_reward_leaves_a_group_of_the_others(failed):
  """A reward that is not finite is left out even if it is marked valid."""
  valid = jnp.array([True, failed != 7.0, True, True])
  with_failed = objective.group_advantages(
    jnp.array([0.0, failed, 1.0, 0.2]), num_generations=4, valid=valid
  )
  of_three = objective.group_advantages(
    jnp.array([0.0, 1.0, 0.2]), num_generations=3
  )
  np.testing.assert_allclose(with_failed[jnp.array([0, 2, 3])], of_three)
  assert with_failed[1] == 0


def test_advantages_ignore_a_shift_and_a_scale_of_the_rewards():
  rewards = jnp.array([0.0, 1.0, 0.2, 0.7])
  plain, other = (
    objective.group_advantages(r, num_generations=4, epsilon=0.0)
    for r in (rewards, 3 * rewards + 2)
  )
  np.testing.assert_allclose(other, plain, rtol=1e-5)


@pytest.mark.parametrize(
  ("setting", "wrong"),
  [
    ("advantage_scale", {"scale": "std"}),
    ("advantage_baseline", {"baseline": "median"}),
    ("num_generations", {"num_generations": 5}),
  ],
)
def test_advantages_refuse_a_wrong_setting(setting, wrong):
  with pytest.raises(ValueError, match=setting):
    objective.group_advantages(jnp.zeros(8), **{"num_generations": 4} | wrong)


def test_rewards_normalised_apart_are_told_apart():
  """GDPO by hand, two groups of two and two rewards of weights 1 and 0.5.

  The first reward differs in both groups, the second in the second group alone:
  (1, 0) and (0, 0), then (1, 0) and (0, 1). A group of two different rewards
  has the advantages +-1/sqrt(2). Sums: +-1/sqrt(2), then +-0.5/sqrt(2), whose
  squares add up to 1.25, over N - 1 = 3 and under the root 0.6455.
  """
  first, second = np.float32([1, 0, 1, 0]), np.float32([0, 0, 0, 1])
  valid = np.ones(4, bool)
  parts = [
    weight * objective.group_advantages(x, num_generations=2, epsilon=0.0)
    for weight, x in ((1.0, first), (0.5, second))
  ]
  got = objective.normalized_sum(parts, valid=valid, epsilon=0.0)
  expected = np.array([1, -1, 0.5, -0.5]) / np.sqrt(2) / np.sqrt(1.25 / 3)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  # An invalid row has no advantage, and is no row of the batch.
  padded = [np.append(x, [0.0, 0.0]).astype(np.float32) for x in parts]
  more = np.append(valid, [False, False])
  got = objective.normalized_sum(padded, valid=more, epsilon=0.0)
  np.testing.assert_allclose(got, np.append(expected, [0, 0]), rtol=1e-6)
