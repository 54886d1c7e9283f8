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
