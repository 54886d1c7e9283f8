"""Rows with and without images: one gradient, and no work for empty slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_tpu.distributed import sharding
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl import objective, pictures, score, train_step
from grpo_tpu.rl.settings import PRESETS
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rl.train_state import TrainState
from tests.grpo_tpu import conftest

pytestmark = pytest.mark.usefixtures("quick_compile")

COUNTS = (0, 2, 1, 0)
NUM_TOKENS = 4
CONFIG = PRESETS["grpo"]


def forward_of(tiny, **changes):
  fields = dict(
    config=tiny.config,
    dtype=jnp.dtype(jnp.float32),
    remat="none",
    temperature=1.0,
    chunk_size=64,
    train_vision=True,
    vision_remat="none",
  )
  return ForwardConfig(**fields | changes)


@pytest.fixture(scope="module")
def bundles(tiny):
  rng = np.random.default_rng(0)
  shape = (len(COUNTS), 2, NUM_TOKENS)
  lengths = rng.integers(1, NUM_TOKENS + 1, shape[:2])
  return TrainBatch(
    *tiny.mixed_prompts(COUNTS),
    completion_ids=jnp.asarray(rng.integers(110, 130, shape), jnp.int32),
    completion_mask=jnp.asarray(np.arange(NUM_TOKENS) < lengths[..., None]),
    advantages=jnp.asarray(rng.normal(0, 1, shape[:2]), jnp.float32),
  )


@pytest.fixture(scope="module")
def by_rows(tiny, bundles):
  """Log-probabilities of rows by themselves, and the gradient of their loss."""
  rows = []
  for number, count in enumerate(COUNTS):
    row = jax.tree.map(lambda x, n=number: x[n : n + 1], bundles)
    ids = row.prompt_ids[:, : int(row.prompt_length[0])]
    rows.append(row.replace(prompt_ids=ids, images=row.images[:, :count]))

  def loss(params):
    logps = jnp.concatenate(
      [score.token_logps(forward_of(tiny), params, row)[0] for row in rows]
    )
    shape = (-1, NUM_TOKENS)
    mask = bundles.completion_mask.reshape(shape)
    value, _ = objective.policy_loss(
      logps.reshape(shape),
      None,
      None,
      bundles.advantages.ravel(),
      mask,
      config=CONFIG,
      denominator=objective.denominator(mask, CONFIG),
      num_tokens=mask.sum(),
    )
    return value, logps

  found = jax.jit(jax.grad(loss, has_aux=True))(tiny.params)
  return jax.device_get(found)


def gradient_of(tiny, bundles, mesh, num_microbatches):
  tx = optax.sgd(1.0, momentum=0.0)  # Keeps the gradient.
  update = train_step.make_train_step(
    forward_of(tiny), tx, config=CONFIG, num_microbatches=num_microbatches
  )
  with jax.set_mesh(mesh):
    params = jax.tree.map(
      lambda x, where: jax.device_put(np.array(x), where),
      tiny.params,
      sharding.param_shardings(mesh, tiny.params),
    )
    step, position = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    state = TrainState(step, position, params, tx.init(params))
    batch = sharding.device_put_batch(mesh, jax.device_get(bundles))
    batch = batch.replace(num_encoded=bundles.num_encoded)
    after, _ = update(state, batch)
    return jax.device_get(after.opt_state[0].trace)


@pytest.mark.parametrize(
  ("shape", "num_microbatches", "is_packed"),
  [
    ((1, 1, 1), 1, False),
    ((1, 1, 1), 4, True),
    ((1, 2, 2), 2, True),
  ],
)
def test_the_gradient_is_that_of_single_rows(
  tiny, bundles, by_rows, shape, num_microbatches, is_packed
):
  mesh = conftest.mesh_of(*shape)
  if is_packed:
    bundles = pictures.with_num_encoded(bundles, mesh)
    assert bundles.num_encoded == 4
  found = gradient_of(tiny, bundles, mesh, num_microbatches)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    found,
    by_rows[0],
  )
  tower, expected = (x["vision_encoder"] for x in (found, by_rows[0]))
  difference = optax.tree.norm(optax.tree.sub(tower, expected))
  assert difference < 1e-4 * optax.tree.norm(expected)


def test_scores_are_those_of_single_rows(tiny, bundles, by_rows):
  mesh = conftest.mesh_of(1, 2, 1)
  with jax.set_mesh(mesh):
    logps, _ = score.score_batch(
      forward_of(tiny),
      tiny.params,
      pictures.with_num_encoded(bundles, mesh),
      num_microbatches=2,
    )
  np.testing.assert_allclose(logps, by_rows[1], atol=1e-5)


def test_the_tower_encodes_no_more_than_a_quarter_of_the_slots_too_many(tiny):
  mesh = conftest.mesh_of(1, 2, 1)
  pixels = TrainBatch(
    prompt_ids=np.zeros((64, 9), np.int32),
    prompt_length=None,
    images=np.zeros((64, 2, 4, 4, 3), np.uint8),
    completion_ids=None,
    completion_mask=None,
  )
  for num_images in range(129):
    found = pictures.with_num_encoded(pixels, mesh, num_images).num_encoded
    assert found % 32 == 0
    assert found == 0 if num_images > 96 else found - 32 < max(num_images, 1)
    assert found == 0 or found >= num_images
  features = pixels.replace(images=np.zeros((64, 2, 4, 5), np.float32))
  text = pixels.replace(images=np.zeros((64, 0, 4, 4, 3), np.uint8))
  for other in (features, text):
    assert pictures.with_num_encoded(other, mesh, 1).num_encoded == 0
