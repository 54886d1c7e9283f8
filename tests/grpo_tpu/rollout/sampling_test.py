"""Each row has a key of its own, and draws follow the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rollout import sampling

KEY = jax.random.key(7)
T = jnp.asarray(3)


def key_data(prompt_index, num_completions):
  keys = sampling.row_keys(KEY, jnp.asarray(prompt_index), num_completions)
  return np.asarray(jax.random.key_data(keys))


def test_a_rows_key_depends_only_on_its_prompt_and_index():
  alone = key_data([5], 2)
  crowd = key_data([9, 3, 5], 4)
  np.testing.assert_array_equal(crowd[2, :2], alone[0])


def test_no_two_rows_of_a_step_share_a_key():
  keys = key_data(np.arange(12), 12).reshape(144, -1)
  assert len(np.unique(keys, axis=0)) == 144


def test_a_rows_draw_depends_on_its_own_key_and_logits_alone():
  logits = jax.random.normal(jax.random.key(1), (4, 3, 50))
  keys = sampling.row_keys(KEY, jnp.arange(4), 3)
  expected, _ = sampling.sample(logits, keys, T)
  order = jnp.array([2, 0])
  actual, _ = sampling.sample(logits[order, 1:], keys[order, 1:], T)
  np.testing.assert_array_equal(actual, expected[order, 1:])


def test_each_token_of_a_row_has_its_own_noise():
  keys = sampling.row_keys(KEY, jnp.arange(8), 8)
  logits = jnp.zeros((8, 8, 1000))
  first, second = (
    sampling.sample(logits, keys, jnp.asarray(t))[0] for t in (0, 1)
  )
  assert (first != second).mean() > 0.9


@pytest.mark.parametrize(
  ("size", "limit"),
  # Chi-square, 4 and 199 degrees: one in ten thousand.
  [(6, 23.5), (300, 280.9)],
)
def test_draws_and_their_logps_follow_the_softmax(size, limit):
  """Over several blocks, one of them impossible, the last one padded."""
  logits = np.random.default_rng(3).normal(0, 1, size).astype(np.float32)
  impossible = np.arange(size) % 3 == 0
  impossible[size // 2 : size // 2 + 40] |= size > 40
  logits[impossible] = -np.inf
  side = 200
  keys = sampling.row_keys(KEY, jnp.arange(side), side)
  ids, logps = sampling.sample(
    jnp.broadcast_to(jnp.asarray(logits), (side, side, size)), keys, T
  )
  counts = np.bincount(np.ravel(ids), minlength=size)
  share = np.exp(logits.astype(np.float64))
  share /= share.sum()
  assert len(counts) == size and not counts[impossible].any()
  expected = share[~impossible] * side**2
  residual = (counts[~impossible] - expected) ** 2 / expected
  assert residual.sum() < limit
  np.testing.assert_allclose(
    logps, np.log(share[np.asarray(ids)]), rtol=1e-5, atol=1e-5
  )


def test_rounding_changes_a_draw_only_at_a_near_tie():
  """For a vocabulary of any size."""
  side, size, off = 100, 4096, 1e-4
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 1, (side, side, size)).astype(np.float32)
  rounded = logits + off * rng.choice([-1, 1], logits.shape).astype(np.float32)
  keys = sampling.row_keys(KEY, jnp.arange(side), side)
  ids, other = (
    np.asarray(sampling.sample(jnp.asarray(x), keys, T)[0])
    for x in (logits, rounded)
  )
  # Two draws, each of which changes where the largest is less than `2 off`
  # above the next: that is expected in 4 off of them at most.
  assert (ids != other).sum() <= 4 * off * side**2 + 8


def test_greedy_takes_the_likeliest_token_and_the_first_of_a_tie():
  logits = jnp.array([[[0.0, 2.0, 1.0, 2.0], [-1.0, -3.0, -2.0, -0.5]]])
  ids, logps = sampling.greedy(logits)
  np.testing.assert_array_equal(ids, [[1, 3]])
  expected = jax.nn.log_softmax(logits).max(axis=-1)
  np.testing.assert_allclose(logps, expected, rtol=1e-6)


def plain_top_k_top_p(row, top_k, top_p):
  """The tokens to keep, one by one from the likeliest."""
  order = np.argsort(-row, kind="stable")
  kept = order[:top_k] if top_k else order
  odds = np.exp(row[kept].astype(np.float64))
  odds /= odds.sum()
  count = 1
  while odds[:count].sum() < top_p and count < len(kept):
    count += 1
  return sorted(kept[:count])


@pytest.mark.parametrize(
  ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (0, 0.5), (0, 0.93), (9, 0.8)]
)
def test_top_k_top_p_keeps_the_likeliest_and_their_odds(top_k, top_p):
  logits = np.random.default_rng(5).normal(0, 2, (4, 60)).astype(np.float32)
  narrowed = np.asarray(
    sampling.top_k_top_p(jnp.asarray(logits), top_k=top_k, top_p=top_p)
  )
  for row, new in zip(logits, narrowed, strict=True):
    kept = plain_top_k_top_p(row, top_k, top_p)
    np.testing.assert_array_equal(np.flatnonzero(new > -1e29), kept)
    np.testing.assert_array_equal(new[kept], row[kept])


def test_without_limits_no_logit_changes():
  logits = jnp.asarray(np.random.default_rng(5).normal(0, 2, (4, 60)))
  np.testing.assert_array_equal(
    sampling.top_k_top_p(logits, top_k=0, top_p=1.0), logits
  )
