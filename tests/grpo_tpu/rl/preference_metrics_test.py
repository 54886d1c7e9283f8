"""Laws of preference metrics: a plain twin, ties, pairs without a label."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import preference_metrics, train_step


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


def test_an_update_reports_the_mean_over_the_labelled_pairs():
  rng = np.random.default_rng(0)
  logps, ref = rng.normal(size=(2, 3, 2, 4)).astype(np.float32)
  mask, preferred = rng.random((3, 2, 4)) < 0.7, np.zeros((3, 2, 2), bool)
  preferred[0, 0, 1] = preferred[2, 1, 0] = True
  micro = types.SimpleNamespace(
    ref_per_token_logps=ref, completion_mask=mask, preferred=preferred
  )
  got = train_step._implicit_preference(micro, logps, jnp.float32(2))
  gain = np.where(mask, logps - ref, 0).sum(-1)
  margins = [gain[0, 0] - gain[0, 1], gain[2, 1] - gain[2, 0]]
  assert got["implicit_preference_accuracy"] == np.mean(np.array(margins) > 0)
  assert got["implicit_preference_margin"] == pytest.approx(np.mean(margins))
