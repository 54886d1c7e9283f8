"""Laws of preference metrics: a plain twin, ties, pairs without a label."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import preference_metrics


def test_preference_accuracy_counts_a_tie_as_half():
  chosen, rejected = jnp.array([1.0, 0.0, 0.5, 0.5]), jnp.full(4, 0.5)
  for count in (4, 2):
    valid = np.arange(4) >= 4 - count
    found = preference_metrics.accuracy(chosen, rejected, valid=valid)
    assert found == 0.5


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
def test_pairs_that_do_not_count_enter_no_accuracy(count):
  scores = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
  valid = np.arange(5) < count
  chosen, rejected = np.where(valid, scores, np.nan)
  got = preference_metrics.accuracy(chosen, rejected, valid=valid)
  wins = scores[0, :count] > scores[1, :count]
  assert got == pytest.approx(wins.mean() if count else 0.0)
