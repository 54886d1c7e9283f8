"""Laws of the diagnostics: which groups teach, how much, by which part."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import diagnostics


def test_group_correctness_counts_groups_with_a_known_answer():
  correct = jnp.array([[1, 1], [0, 0], [0, 1], [1, 0], [0, 1]], bool)
  valid = jnp.array([[1, 1], [1, 1], [1, 1], [1, 0], [0, 0]], bool)
  shares = diagnostics.group_correctness(correct, valid=valid)
  # The fourth group knows one answer, a right one; the fifth knows none.
  assert shares == {"all_right": 0.5, "all_wrong": 0.25, "mixed": 0.25}
  assert diagnostics.group_correctness(correct)["mixed"] == jnp.float32(0.6)


def test_groups_without_a_known_answer_have_no_share():
  shares = diagnostics.group_correctness(
    jnp.ones((2, 3), bool), valid=jnp.zeros((2, 3), bool)
  )
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


def test_the_share_of_a_part_weighs_groups_as_their_advantages_do():
  share = diagnostics.advantage_share(PART, PART + REST, ADVANTAGES)
  np.testing.assert_allclose(share, 1 / 3, rtol=1e-6)
  of_rest = diagnostics.advantage_share(REST, PART + REST, ADVANTAGES)
  np.testing.assert_allclose(of_rest, 2 / 3, rtol=1e-6)


@pytest.mark.parametrize(
  ("part", "share"), [([[5.0, 5.0], [-1.0, -1.0]], 0.0), (PART + REST + 9, 1.0)]
)
def test_a_part_constant_within_groups_has_no_share(part, share):
  actual = diagnostics.advantage_share(
    np.float32(part), PART + REST, ADVANTAGES
  )
  np.testing.assert_allclose(actual, share, atol=1e-6)


def test_where_nothing_differs_no_part_has_a_share():
  same = np.full((2, 3), 0.9, np.float32)
  assert diagnostics.advantage_share(same, same, np.zeros_like(same)) == 0


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
  share = diagnostics.advantage_share(part, part + rest, advantages)
  np.testing.assert_allclose(share, 1 / 3, rtol=1e-6)
