"""Laws of the diagnostics: which groups teach, how much, by which part."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import diagnostics


def group_shares(correct, known):
  rewards = dict.fromkeys(("total", "accuracy"), jnp.float32(correct))
  found = diagnostics.reward_statistics(rewards, known, known)
  return {
    name: found[f"rollout/{name}_fraction"]
    for name in ("all_right", "all_wrong", "mixed")
  }


def test_group_correctness_counts_groups_with_a_known_answer():
  correct = jnp.array([[1, 1], [0, 0], [0, 1], [1, 0], [0, 1]], bool)
  known = jnp.array([[1, 1], [1, 1], [1, 1], [1, 0], [0, 0]], bool)
  # The fourth group knows one answer, a right one; the fifth knows none.
  assert group_shares(correct, known) == {
    "all_right": 0.5,
    "all_wrong": 0.25,
    "mixed": 0.25,
  }


def test_groups_without_a_known_answer_have_no_share():
  shares = group_shares(jnp.ones((2, 3), bool), jnp.zeros((2, 3), bool))
  assert shares == {"all_right": 0, "all_wrong": 0, "mixed": 0}


# --- How many samples weights are worth.


@pytest.mark.parametrize(
  ("weights", "size"),
  [
    (np.full(7, 0.3), 7),
    (np.eye(1, 9)[0], 1),
    (np.zeros(5), 0),
    (np.array([[3.0, -3.0], [0.0, 0.0]]), 2),  # A sign is no weight.
    (np.array([3.0, 1.0]), 1.6),  # 4^2 / 10.
  ],
  ids=["equal", "one_hot", "zeros", "signs", "uneven"],
)
def test_effective_sample_size_counts_equal_weights(weights, size):
  actual = diagnostics.effective_sample_size(np.float32(weights))
  np.testing.assert_allclose(actual, size, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, -4.0, 1e6])
def test_effective_sample_size_ignores_a_scale(scale):
  weights = np.random.default_rng(0).normal(size=30).astype(np.float32)
  np.testing.assert_allclose(
    diagnostics.effective_sample_size(scale * weights),
    diagnostics.effective_sample_size(weights),
    rtol=1e-5,
  )


# --- Which part of the reward makes the advantages.

# Centred parts are +-0.5 and +-1, rests -+1.5 and +-1, totals -+1 and +-2. The
# advantages halve the second group: 2 (0.5 + 0.5) of 2 (0.5 + 1.5 + 0.5 + 0.5).
PART = np.float32([[1, 0], [2, 0]])
REST = np.float32([[0, 3], [2, 0]])
ADVANTAGES = np.float32([[-1, 1], [1, -1]])


def share_of(part, total, advantages):
  valid = np.ones(total.shape, bool)
  return diagnostics.advantage_share(part, total, advantages, valid=valid)


def test_the_share_of_a_part_weighs_groups_as_their_advantages_do():
  share = share_of(PART, PART + REST, ADVANTAGES)
  np.testing.assert_allclose(share, 1 / 3, rtol=1e-6)
  of_rest = share_of(REST, PART + REST, ADVANTAGES)
  np.testing.assert_allclose(of_rest, 2 / 3, rtol=1e-6)


@pytest.mark.parametrize(
  ("part", "share"), [([[5.0, 5.0], [-1.0, -1.0]], 0.0), (PART + REST + 9, 1.0)]
)
def test_a_part_constant_within_groups_has_no_share(part, share):
  actual = share_of(np.float32(part), PART + REST, ADVANTAGES)
  np.testing.assert_allclose(actual, share, atol=1e-6)


def test_where_nothing_differs_no_part_has_a_share():
  same = np.full((2, 3), 0.9, np.float32)
  assert share_of(same, same, np.zeros_like(same)) == 0


@pytest.mark.parametrize("junk", [100.0, np.nan])
def test_invalid_rows_do_not_enter_a_share(junk):
  def widened(values, last):
    return np.insert(values, 1, last, axis=1).astype(np.float32)

  share = diagnostics.advantage_share(
    widened(PART, junk),
    widened(PART + REST, -junk),
    widened(ADVANTAGES, 0),
    valid=widened(np.ones((2, 2)), 0).astype(bool),
  )
  np.testing.assert_allclose(share, 1 / 3, rtol=1e-6)


def test_unanimous_groups_do_not_enter_a_share():
  """Where part and rest cancel, neither is learned."""
  part = np.append(PART, [[4.0, 0.0]], axis=0).astype(np.float32)
  rest = np.append(REST, [[0.0, 4.0]], axis=0).astype(np.float32)
  advantages = np.append(ADVANTAGES, [[0.0, 0.0]], axis=0).astype(np.float32)
  share = share_of(part, part + rest, advantages)
  np.testing.assert_allclose(share, 1 / 3, rtol=1e-6)
