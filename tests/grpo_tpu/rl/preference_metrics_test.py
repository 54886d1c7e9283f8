"""Laws of preference metrics: a plain twin, ties, pairs without a label."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import preference_metrics


def test_preference_accuracy_counts_a_tie_as_half():
  chosen, rejected = jnp.array([1.0, 0.0, 0.5, 0.5]), jnp.full(4, 0.5)
  assert preference_metrics.accuracy(chosen, rejected) == 0.5
  assert preference_metrics.accuracy(chosen[2:], rejected[2:]) == 0.5


def test_pairs_are_those_of_a_loop_over_every_two_of_a_group():
  rng = np.random.default_rng(0)
  scores, preferred = rng.normal(size=(4, 3)), rng.random((4, 3, 3)) < 0.4
  chosen, rejected, valid = preference_metrics.all_pairs(
    np.float32(scores), preferred
  )
  assert valid.shape == (4 * 3 * 3,)
  expected = [
    (scores[u, i], scores[u, j])
    for u, i, j in np.ndindex(4, 3, 3)
    if preferred[u, i, j]
  ]
  actual = np.stack([chosen, rejected], axis=1)[np.asarray(valid)]
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [3, 0])
def test_pairs_that_do_not_count_enter_no_preference_metric(count):
  logps = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
  valid = np.arange(5) < count
  got = preference_metrics.implicit_preference(
    *np.where(valid, logps, np.nan), beta=0.5, valid=valid
  )
  expected = dict.fromkeys(got, 0.0)
  if count:
    expected = preference_metrics.implicit_preference(
      *logps[:, :count], beta=0.5
    )
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5)


def test_equal_completions_have_no_margin():
  logps = jnp.array([-3.0, -9.0])
  got = preference_metrics.implicit_preference(
    logps, logps, 2 * logps, 2 * logps, beta=0.1
  )
  assert got["implicit_preference_margin"] == 0
  assert got["implicit_preference_accuracy"] == 0.5


def test_implicit_reward_is_the_log_ratio_to_the_reference():
  got = preference_metrics.implicit_preference(
    jnp.array([-3.0, -5.0]),
    jnp.array([-1.0, -2.0]),
    jnp.array([-4.0, -5.0]),
    jnp.array([-1.0, -4.0]),
    beta=0.5,
  )
  # Log-ratios: chosen 1 and 0, rejected 0 and 2.
  assert got == {
    "implicit_preference_accuracy": 0.5,
    "chosen_reward": 0.25,
    "rejected_reward": 0.5,
    "implicit_preference_margin": -0.25,
  }
