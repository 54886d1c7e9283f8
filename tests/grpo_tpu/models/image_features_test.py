"""Each image is encoded once, with the same features for every reader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.models import image_features
from grpo_tpu.models.gemma3 import vision
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl import score
from grpo_tpu.rl.train_batch import TrainBatch
from tests.grpo_tpu import conftest

pytestmark = pytest.mark.usefixtures("quick_compile")


def made(tiny, mesh, *, cache_bytes=0, per_shard=1):
  return image_features.ImageEncoder(
    tiny.config.vision,
    mesh,
    dtype=jnp.dtype(jnp.float32),
    per_shard=per_shard,
    cache_bytes=cache_bytes,
  )


@pytest.fixture(scope="module")
def images(tiny):
  """Four prompts of two images each, three different ones in all."""
  _, _, images = jax.device_get(tiny.prompts(3))
  one, two, three = images[:, 0]
  return np.stack([[one, two], [two, two], [three, one], [one, one]])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2)])
def test_equal_images_are_encoded_once(tiny, images, shape):
  encoder = made(tiny, conftest.mesh_of(*shape))
  expected = vision.soft_tokens(
    tiny.config.vision,
    tiny.params["vision_encoder"],
    jnp.asarray(images),
    dtype=jnp.float32,
    remat="none",
  )
  features = encoder.features(tiny.params, images, np.full(4, 2))
  assert encoder.num_encoded == 3
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_images", [(0, 2, 1, 0), (0, 0, 0, 0)])
def test_what_no_prompt_shows_is_not_encoded(tiny, images, num_images):
  """Not even looked at: its features are zeros."""
  encoder = made(tiny, conftest.mesh_of(1, 2, 1), cache_bytes=2**20)
  whole = made(tiny, conftest.mesh_of()).features(
    tiny.params, images, np.full(4, 2)
  )
  features = encoder.features(tiny.params, images, np.array(num_images))
  assert encoder.num_encoded == (2 if sum(num_images) else 0)
  for got, expected, count in zip(features, whole, num_images, strict=True):
    np.testing.assert_allclose(
      got[:count], expected[:count], rtol=1e-4, atol=1e-5
    )
    assert not got[count:].any()


def test_a_batch_without_images_runs_no_tower(tiny, images):
  encoder = made(tiny, conftest.mesh_of())
  encoder.features(tiny.params, images, np.full(4, 2))
  encoder.encode = None
  features = encoder.features(tiny.params, images[:, :0], np.zeros(4, int))
  vision = tiny.config.vision
  assert features.shape == (4, 0, vision.soft_tokens, vision.width)
  assert encoder.num_encoded == 0


def test_a_full_cache_keeps_the_features_used_last(tiny, images):
  mesh = conftest.mesh_of()
  size = tiny.config.vision.soft_tokens * tiny.config.vision.width * 4
  encoder = made(tiny, mesh, cache_bytes=2 * size)
  first = encoder.features(tiny.params, images, np.full(4, 2))
  counts = []
  for rows in ([1], [3], [1], [2], [1]):
    again = encoder.features(tiny.params, images[rows], np.array([2]))
    counts.append(encoder.num_encoded)
    np.testing.assert_array_equal(again, np.asarray(first)[rows])
  # Kept at first: two and three. One takes the place of three, which then takes
  # that of two.
  assert counts == [0, 1, 0, 1, 1]


def test_training_reads_features_as_it_reads_pixels(tiny):
  prompts = tiny.prompts(4)
  ids = np.random.default_rng(0).integers(110, 130, (4, 2, 5))
  model = ForwardConfig(
    config=tiny.config,
    dtype=jnp.dtype(jnp.float32),
    remat="none",
    temperature=1.0,
    chunk_size=16,
    train_vision=False,
  )
  bundles = TrainBatch(
    *prompts, jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool)
  )
  features = made(tiny, conftest.mesh_of()).features(
    tiny.params, np.asarray(prompts[2]), np.ones(4, int)
  )
  one, other = (
    score.score_batch(model, tiny.params, x, num_microbatches=2)
    for x in (
      bundles,
      bundles.replace(images=jnp.asarray(np.asarray(features))),
    )
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    one,
    other,
  )
