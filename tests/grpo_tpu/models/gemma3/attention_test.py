"""The interpreted TPU kernel against the einsum of other platforms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import attention
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.settings import ATTENTION_KINDS

pytestmark = pytest.mark.usefixtures("quick_compile")
# Several of the kernel's blocks, none of them filled by a row.
NUM_PROMPT, NUM_OWN, WINDOW, SOFT_TOKENS = 300, 140, 60, 50
LENGTHS = np.array([290, 131])
# Of the prompts: one with images first, in its middle and last, across blocks,
# and one of text alone.
IMAGES = np.zeros((2, NUM_PROMPT), np.int32)
IMAGES[0, 4:54], IMAGES[0, 100:150], IMAGES[0, 240:290] = 1, 2, 3
COMPLETIONS = {"prompts": 1, "completions": 2}


def sight(is_global):
  return attention.AttentionSpec(
    prompt_length=jnp.asarray(LENGTHS),
    window=jnp.asarray(2**30 if is_global else WINDOW),
    is_global=jnp.asarray(is_global, jnp.int32),
    local_window=WINDOW,
    soft_tokens=SOFT_TOKENS,
    image_block=jnp.asarray(IMAGES),
  )


def arrays(rows, kv_heads, num_bundles=2):
  """Queries, keys and values, and the prompt's if rows are completions."""
  rng = np.random.default_rng(0)

  def drawn(*shape):
    return jnp.asarray(rng.normal(0, 1, shape), jnp.float32)

  u, c = num_bundles, COMPLETIONS[rows]
  t = NUM_PROMPT if rows == "prompts" else NUM_OWN
  of_row = (drawn(u, c, t, 4, 8), *drawn(2, u, c, t, kv_heads, 8))
  if rows == "prompts":
    return of_row, None
  return of_row, tuple(drawn(2, u, NUM_PROMPT, kv_heads, 8))


def real(rows):
  """1 on queries that are not padding."""
  if rows == "completions":
    return jnp.ones((1, 1, 1, 1, 1))
  mask = np.arange(NUM_PROMPT) < LENGTHS[:, None]
  return jnp.asarray(mask[:, None, :, None, None], jnp.float32)


@pytest.mark.parametrize(
  ("rows", "kv_heads"), [("prompts", 2), ("completions", 1)]
)
def test_splash_equals_einsum_with_its_gradients(rows, kv_heads):
  """In local and global layers, with several query heads per key head."""
  of_row, prompt = arrays(rows, kv_heads)
  weight = jax.random.normal(jax.random.key(1), of_row[0].shape) * real(rows)

  @functools.partial(jax.jit, static_argnames="implementation")
  def outputs(of_row, prompt, sight, implementation):
    def loss(of_row, prompt):
      out = attention.attend(
        *of_row,
        sight._replace(local_window=WINDOW, soft_tokens=SOFT_TOKENS),
        prompt=prompt,
        implementation=implementation,
      )
      return jnp.sum(weight * out), out

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(
      of_row, prompt
    )
    return out * real(rows), gradients

  for is_global in (False, True):
    expected = outputs(of_row, prompt, sight(is_global), "einsum")
    actual = outputs(of_row, prompt, sight(is_global), "interpreted_splash")
    for got, want in zip(
      jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
      assert jnp.abs(want).max() > 0.1
      np.testing.assert_allclose(got, want, atol=2e-5)


def test_auto_chooses_the_kernel_on_tpus():
  kinds = {
    (setting, platform): attention.choose_implementation(setting, platform)
    for setting in ATTENTION_KINDS
    for platform in ("tpu", "cpu")
  }
  assert kinds == {
    ("auto", "tpu"): "splash",
    ("auto", "cpu"): "einsum",
    ("einsum", "tpu"): "einsum",
    ("einsum", "cpu"): "einsum",
    ("splash", "tpu"): "splash",
    ("splash", "cpu"): "interpreted_splash",
  }


def test_on_a_mesh_each_device_computes_its_bundles_and_heads():
  """With four query heads and one key-value head, which every device holds."""
  of_row, prompt = arrays("prompts", kv_heads=1)

  @functools.partial(jax.jit, static_argnames="implementation")
  def out(of_row, prompt, implementation):
    return real("prompts") * attention.attend(
      *of_row, sight(False), prompt=prompt, implementation=implementation
    )

  expected = out(of_row, prompt, "einsum")
  mesh = sharding.make_mesh(1, 2, 4)
  with jax.set_mesh(mesh):
    of_row = jax.device_put(of_row, sharding.batch_sharding(mesh))
    actual = out(of_row, prompt, "interpreted_splash")
  assert actual.sharding.shard_shape(actual.shape)[0] == 1
  np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_an_image_longer_than_the_window_is_refused():
  """An image as long as the window is accepted: its ends are in reach."""
  tiny = gemma3_config.CONFIGS["tiny"]
  dataclasses.replace(tiny, sliding_window=9)
  with pytest.raises(
    ValueError, match=r"vision.soft_tokens \(9\).*sliding_window \(8\)"
  ):
    dataclasses.replace(tiny, sliding_window=8)
