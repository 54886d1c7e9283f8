"""Keys that belong to a row alone, and draws that follow the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu import sampling

KEY = jax.random.key(7)
T = jnp.asarray(3)


def key_data(prompt_index, num_completions):
  keys = sampling.row_keys(KEY, jnp.asarray(prompt_index), num_completions)
  return np.asarray(jax.random.key_data(keys))


@pytest.fixture
def given_uniforms(monkeypatch):
  """Whatever is passed for keys is taken for the uniform numbers."""
  monkeypatch.setattr(sampling, "_uniform", lambda key, t: key)


def test_a_rows_key_depends_on_its_prompt_and_place_alone():
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


def test_each_token_of_a_row_has_a_number_of_its_own():
  keys = sampling.row_keys(KEY, jnp.arange(8), 8)
  logits = jnp.zeros((8, 8, 1000))
  first, second = (
    sampling.sample(logits, keys, jnp.asarray(t))[0] for t in (0, 1)
  )
  assert (first != second).mean() > 0.9


def test_draws_follow_the_softmax():
  logits = jnp.array([1.0, -2.0, 0.5, -jnp.inf, 0.0, 2.0])
  side = 200
  keys = sampling.row_keys(KEY, jnp.arange(side), side)
  ids, _ = sampling.sample(jnp.broadcast_to(logits, (side, side, 6)), keys, T)
  counts = np.bincount(np.ravel(ids), minlength=6)
  expected = np.asarray(jax.nn.softmax(logits)) * side**2
  assert counts[3] == 0
  possible = expected > 0
  residual = (counts - expected)[possible] ** 2 / expected[possible]
  assert residual.sum() < 23.5  # Chi-square, 4 degrees: one in ten thousand.


@pytest.mark.parametrize(
  ("uniform", "expected"),
  [(0.0, 1), (0.49, 2), (1 - 2**-23, 4)],
  ids=["lowest", "middle", "highest"],
)
def test_the_extremes_draw_the_first_and_the_last_possible_token(
  given_uniforms, uniform, expected
):
  """Three equal tokens between impossible ones: thirds of the unit interval."""
  logits = jnp.array([[[-jnp.inf, 0.0, 0.0, -jnp.inf, 0.0, -jnp.inf]]])
  ids, _ = sampling.sample(logits, jnp.full((1, 1), uniform), T)
  assert ids == expected


def test_rounding_of_the_sum_never_draws_an_impossible_token(given_uniforms):
  """Thresholds right at the steps, where a parallel sum is not monotone."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (16, 1, 2048)).astype(np.float32)
  impossible = rng.random(logits.shape) < 0.5
  logits[impossible] = -np.inf
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  below = np.cumsum(weights, axis=-1, dtype=np.float64)
  uniforms = (below / below[..., -1:])[:, 0, :-1:8].clip(max=1 - 2**-23)
  shape = (*uniforms.shape, logits.shape[-1])
  ids, _ = sampling.sample(
    jnp.broadcast_to(logits, shape), jnp.asarray(uniforms, jnp.float32), T
  )
  drawn = np.take_along_axis(
    np.broadcast_to(impossible, shape), np.asarray(ids)[..., None], axis=-1
  )
  assert not drawn.any()


def test_greedy_takes_the_likeliest_and_of_equals_the_first():
  logits = jnp.array([[[0.0, 2.0, 1.0, 2.0], [-1.0, -3.0, -2.0, -0.5]]])
  ids, logps = sampling.greedy(logits)
  np.testing.assert_array_equal(ids, [[1, 3]])
  expected = jax.nn.log_softmax(logits).max(axis=-1)
  np.testing.assert_allclose(logps, expected, rtol=1e-6)


def test_a_draw_is_the_token_whose_share_of_the_interval_was_hit(
  given_uniforms,
):
  """Every token of a vocabulary of several blocks, by exact thresholds."""
  rng = np.random.default_rng(3)
  logits = rng.normal(0, 2, 300).astype(np.float32)
  share = np.exp(logits.astype(np.float64))
  share /= share.sum()
  middle = np.cumsum(share) - share / 2
  ids, logps = sampling.sample(
    jnp.broadcast_to(jnp.asarray(logits), (300, 1, 300)),
    jnp.asarray(middle, jnp.float32)[:, None],
    T,
  )
  np.testing.assert_array_equal(ids[:, 0], np.arange(300))
  np.testing.assert_allclose(logps[:, 0], np.log(share), rtol=1e-5, atol=1e-5)


def plainly_narrowed(row, top_k, top_p):
  """Which tokens are left, one by one from the likeliest."""
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
def test_narrowing_leaves_the_likeliest_and_their_odds(top_k, top_p):
  logits = np.random.default_rng(5).normal(0, 2, (4, 60)).astype(np.float32)
  narrowed = np.asarray(
    sampling.narrowed(jnp.asarray(logits), top_k=top_k, top_p=top_p)
  )
  for row, new in zip(logits, narrowed, strict=True):
    kept = plainly_narrowed(row, top_k, top_p)
    np.testing.assert_array_equal(np.flatnonzero(new > -1e29), kept)
    np.testing.assert_array_equal(new[kept], row[kept])


def test_without_limits_nothing_is_narrowed():
  logits = jnp.asarray(np.random.default_rng(5).normal(0, 2, (4, 60)))
  np.testing.assert_array_equal(
    sampling.narrowed(logits, top_k=0, top_p=1.0), logits
  )
