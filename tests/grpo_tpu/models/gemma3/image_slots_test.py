"""Prompts that show different numbers of images share a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.models.gemma3 import text

SLOTS = 3
COUNTS = (2, 0, 3)


def batch_of(tiny):
  """Rows with 2, 0 and 3 images; unused slots hold noise."""
  rng = np.random.default_rng(0)
  soft = tiny.config.vision.soft_tokens
  block = [108, *[GEMMA3.image_placeholder] * soft, 109]
  ids = np.zeros((len(COUNTS), 28), np.int32)
  lengths = np.array([len(block) * n + 6 + n for n in COUNTS])
  for row, length, count in zip(ids, lengths, COUNTS, strict=True):
    words = rng.integers(110, tiny.config.vocab_size, length).tolist()
    told = [GEMMA3.bos, *block]
    for _ in range(count - 1):
      told += [words.pop(), *block]
    told = told if count else [GEMMA3.bos]
    row[:length] = (told + words)[:length]
    soft_ids = (row == GEMMA3.image_placeholder).sum()
    assert soft_ids == count * soft
  side = tiny.config.vision.image_size
  shape = (len(COUNTS), SLOTS, side, side, 3)
  images = rng.integers(0, 256, shape, dtype=np.uint8)
  return jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(images)


@pytest.mark.usefixtures("quick_compile")
def test_a_row_with_fewer_images_is_the_same_alone(tiny):
  rows = batch_of(tiny)

  @jax.jit
  def states(ids, lengths, images):
    return text.prompt_states(
      tiny.config, tiny.params, ids, lengths, images, dtype=jnp.float32
    )[0]

  together = states(*rows)
  for i, count in enumerate(COUNTS[:2]):  # The last row fills its slots.
    ids, lengths, images = (x[i : i + 1] for x in rows)
    alone = states(ids, lengths, images[:, :count])
    real = int(lengths[0])
    np.testing.assert_allclose(together[i, :real], alone[0, :real], atol=1e-5)


@pytest.mark.usefixtures("quick_compile")
def test_each_image_is_read_where_its_placeholders_are(tiny):
  """A used slot changes its row from its tokens on; an unused one nothing."""
  ids, lengths, images = batch_of(tiny)

  @jax.jit
  def states(images):
    return text.prompt_states(
      tiny.config, tiny.params, ids, lengths, images, dtype=jnp.float32
    )[0]

  before = np.asarray(states(images))
  for row, slot in np.ndindex(len(COUNTS), SLOTS):
    moved = np.abs(states(images.at[row, slot].add(128)) - before).max(axis=-1)
    others = np.delete(moved, row, axis=0)
    np.testing.assert_array_equal(others, 0)
    if slot >= COUNTS[row]:
      np.testing.assert_array_equal(moved[row], 0)
    else:
      is_soft = np.asarray(ids[row]) == GEMMA3.image_placeholder
      first = np.flatnonzero(is_soft)[slot * tiny.config.vision.soft_tokens]
      np.testing.assert_array_equal(moved[row, :first], 0)
      assert (moved[row, first : lengths[row]] > 0).any()
      assert moved[row, first] > 1e-6
