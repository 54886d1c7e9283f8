"""Laws of an update: schedule, clipping, weight decay, frozen leaves."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_tpu.rl import optimizer
from grpo_tpu.rl.settings import OptimizerConfig

CONFIG = OptimizerConfig(
  learning_rate=0.1,
  schedule="constant",
  warmup_steps=0,
  num_steps=10,
  end_fraction=0.1,
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  weight_decay=0.0,
  max_grad_norm=1.0,
)


def config_of(**changes):
  return dataclasses.replace(CONFIG, **changes)


def nothing(path):
  return False


def vision(path):
  return path.startswith("vision/")


def params_of(dtype=jnp.float32):
  """Two stacked layers, a vector, and an image tower."""
  return {
    "layers": {
      "mlp": {"kernel": jnp.ones((2, 3, 3), dtype)},
      "norm": {"scale": jnp.ones((2, 3), dtype)},
      "out": {
        "kernel": jnp.ones((2, 3, 3), dtype),
        "bias": jnp.ones((2, 3), dtype),
      },
    },
    "temperature": jnp.ones(3, dtype),
    "vision": {"mlp": {"kernel": jnp.ones((2, 3, 3), dtype)}},
  }


def updates_of(config, grads, params, is_frozen=nothing):
  tx = optimizer.make_optimizer(config, is_frozen=is_frozen)
  updates, _ = tx.update(grads, tx.init(params), params)
  return updates


@pytest.mark.parametrize(
  ("schedule", "middle", "end"),
  [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)],
)
def test_learning_rate_warms_up_peaks_and_ends_where_it_should(
  schedule, middle, end
):
  rate = optimizer.make_schedule(
    config_of(schedule=schedule, warmup_steps=4, num_steps=24, end_fraction=0.2)
  )
  # Fifths of the peak: the first update is not wasted.
  warmup = [rate(step) for step in range(5)]
  np.testing.assert_allclose(warmup, 0.1 * np.arange(1, 6) / 5, rtol=1e-6)
  np.testing.assert_allclose(rate(14), 0.1 * middle, rtol=1e-6)
  np.testing.assert_allclose([rate(24), rate(99)], 0.1 * end, rtol=1e-6)


def test_cosine_stays_above_linear_before_the_middle():
  linear, cosine = (
    optimizer.make_schedule(config_of(schedule=name))
    for name in ("linear", "cosine")
  )
  assert cosine(2) > linear(2)
  assert cosine(8) < linear(8)


def test_updates_equal_adam_written_out_by_hand():
  """Two updates of one matrix in float64, with the clip and the decay."""
  config = config_of(
    weight_decay=0.3, max_grad_norm=0.5, schedule="linear", num_steps=4
  )
  rng = np.random.default_rng(0)
  weight = rng.normal(size=(3, 4))
  params = {"kernel": jnp.float32(weight)}
  tx = optimizer.make_optimizer(config, is_frozen=nothing)
  state = tx.init(params)
  m = v = np.zeros_like(weight)
  for t in (1, 2):
    grad = rng.normal(size=weight.shape)
    updates, state = tx.update({"kernel": jnp.float32(grad)}, state, params)
    params = optax.apply_updates(params, updates)
    grad = grad * min(1.0, 0.5 / np.linalg.norm(grad))
    m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
    step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    rate = 0.1 * (1 - 0.9 * (t - 1) / 4)
    weight = weight - rate * (step + 0.3 * weight)
    np.testing.assert_allclose(params["kernel"], weight, rtol=1e-5)
    assert optax.tree.get_all_with_path(state, "count")[0][1] == t


def test_only_matrices_decay():
  params = params_of()
  grads = jax.tree.map(jnp.zeros_like, params)
  updates = updates_of(config_of(weight_decay=0.5), grads, params)
  moved = jax.tree.map(lambda x: bool((x != 0).all()), updates)
  assert moved == {
    "layers": {
      "mlp": {"kernel": True},
      "norm": {"scale": False},
      "out": {"kernel": True, "bias": False},
    },
    "temperature": False,
    "vision": {"mlp": {"kernel": True}},
  }


def test_a_frozen_subtree_has_no_state_no_update_and_no_norm():
  """Even a large gradient of it does not shrink the others."""
  params = params_of()
  tx = optimizer.make_optimizer(CONFIG, is_frozen=vision)
  state = tx.init(params)
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert sum(leaf.size for leaf in moments) == 2 * (18 + 6 + 18 + 6 + 3)

  grads = jax.tree.map(lambda x: 0.01 * x, params)
  loud = grads | {"vision": {"mlp": {"kernel": jnp.full((2, 3, 3), 1e6)}}}
  config = config_of(eps=1.0)  # So that a clip shows in the update.
  for is_frozen, is_same in ((vision, True), (nothing, False)):
    quiet_updates = updates_of(config, grads, params, is_frozen)
    loud_updates = updates_of(config, loud, params, is_frozen)
    same = jax.tree.map(np.array_equal, quiet_updates, loud_updates)
    assert all(jax.tree.leaves(same["layers"])) == is_same
  np.testing.assert_array_equal(
    updates_of(config, loud, params, vision)["vision"]["mlp"]["kernel"], 0.0
  )


@pytest.mark.parametrize(
  ("rate", "least", "most"),
  [(1e-6, 0.0, 0.01), (3e-9, 0.2, 0.7), (1e-11, 0.99, 1.0)],
  ids=["healthy", "small", "far too small"],
)
def test_lost_updates_are_those_that_leave_their_weights_alone(
  rate, least, most
):
  """As many as stay what they were, although their update is not 0."""
  config = config_of(
    learning_rate=rate, schedule="linear", warmup_steps=2, weight_decay=0.1
  )
  rng = np.random.default_rng(0)

  def draw(scale):
    matrix, frozen = rng.normal(0, scale, (2, 64, 32)).astype(np.float32)
    scale = matrix[0] * (np.arange(32) % 2)  # Half the gradients are 0.
    return {"kernel": matrix, "scale": scale, "vision": {"kernel": frozen}}

  params = draw(0.02)
  tx = optimizer.make_optimizer(config, is_frozen=vision)
  state = tx.init(params)
  for _ in range(4):
    updates, state = tx.update(draw(1e-3), state, params)
    before, params = params, optax.apply_updates(params, updates)
  lost = moved = 0
  for old, new, update in zip(
    *map(jax.tree.leaves, (before, params, updates)), strict=True
  ):
    moved += np.sum(update != 0)
    lost += np.sum((update != 0) & (old == new))
  found = jax.jit(functools.partial(optimizer.lost_fraction, config))(
    params, state
  )
  np.testing.assert_allclose(found, lost / moved, atol=2e-3)
  assert least <= found <= most
  assert optimizer.num_updates(state) == 4


def test_nothing_is_lost_where_nothing_should_move():
  """Before the first update, and with no gradient at all."""
  params = params_of()
  tx = optimizer.make_optimizer(CONFIG, is_frozen=nothing)
  state = tx.init(params)
  assert optimizer.lost_fraction(CONFIG, params, state) == 0
  _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
  assert optimizer.lost_fraction(CONFIG, params, state) == 0


def test_moments_are_float32_for_bfloat16_params():
  params = params_of(jnp.bfloat16)
  tx = optimizer.make_optimizer(CONFIG, is_frozen=nothing)
  state = tx.init(params)
  _, later = tx.update(params, state, params)
  for tree in (state, later):
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.ndim}
    assert dtypes == {jnp.dtype(jnp.float32)}
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, later)


def test_infinite_norm_means_no_clipping():
  params = params_of()
  grads = jax.tree.map(lambda x: 1e3 * x, params)
  config = config_of(eps=1.0, max_grad_norm=math.inf)
  updates = updates_of(config, grads, params)
  expected = -0.1 * 1e3 / (1e3 + 1)
  np.testing.assert_allclose(
    updates["layers"]["mlp"]["kernel"], expected, rtol=1e-5
  )


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("learning_rate", -1e-6),
    ("learning_rate", math.nan),
    ("schedule", "step"),
    ("num_steps", 0),
    ("warmup_steps", 10),
    ("warmup_steps", -1),
    ("end_fraction", 1.1),
    ("b1", 1.0),
    ("b2", -0.1),
    ("eps", 0.0),
    ("weight_decay", -0.1),
    ("max_grad_norm", 0.0),
  ],
)
def test_a_wrong_setting_is_refused_by_name_value_and_remedy(field, value):
  remedy = rf"; set optimizer\.{field}="
  if field == "schedule":
    remedy = "one of constant, cosine, linear"
  rule = rf"optimizer\.{field} \(.*must .*{remedy}"
  with pytest.raises(ValueError, match=rule) as error:
    config_of(**{field: value})
  assert repr(value) in str(error.value)
