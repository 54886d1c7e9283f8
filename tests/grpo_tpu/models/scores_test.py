"""Scores in bundles against those of separate sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.models import network, scores
from grpo_tpu.models.gemma3 import text, weights
from grpo_tpu.models.gemma3.config import CONFIGS

CONFIG = dataclasses.replace(CONFIGS["tiny"], has_score=True)
FORWARD = network.ForwardConfig(
  config=CONFIG,
  dtype=jnp.float32,
  remat="none",
  temperature=1.0,
  chunk_size=8,
  train_vision=False,
)
LENGTHS = np.array([[3, 0], [5, 1]])


@pytest.fixture(scope="module")
def params():
  tree = weights.random_params(CONFIG, 0, jnp.float32)
  shape = tree["score"]["w"].shape
  head = np.random.default_rng(1).normal(0, 0.1, shape).astype(np.float32)
  return jax.tree.map(jnp.asarray, tree | {"score": {"w": head}})


@pytest.fixture(scope="module")
def batch():
  """Two prompts of other lengths, and completions of 3, 0, 5 and 1 tokens."""
  rng = np.random.default_rng(0)
  prompts = jnp.asarray(rng.integers(300, 900, (2, 6)), jnp.int32)
  completions = jnp.asarray(rng.integers(300, 900, (2, 2, 5)), jnp.int32)
  mask = jnp.arange(5)[None, None] < jnp.asarray(LENGTHS)[..., None]
  size = CONFIG.vision.image_size
  images = jnp.zeros((2, 0, size, size, 3), jnp.uint8)
  return prompts, jnp.array([6, 4]), images, completions, mask


score = jax.jit(scores.scores, static_argnums=0)


def gradients(function):
  return jax.jit(jax.value_and_grad(function, has_aux=True))


def test_scores_and_gradients_of_bundles_equal_those_of_whole_sequences(
  params, batch
):
  """The twin reads each prompt with its completion as one sequence."""
  prompts, lengths, images, completions, _ = batch
  weight = jnp.array([0.5, -2.0, 3.0, 1.0])
  ids, last = np.zeros((4, 11), np.int32), np.zeros(4, np.int32)
  for row, (u, c) in enumerate(np.ndindex(LENGTHS.shape)):
    parts = prompts[u, : lengths[u]], completions[u, c, : LENGTHS[u, c]]
    whole = np.concatenate(parts)
    ids[row, : len(whole)], last[row] = whole, len(whole) - 1
  none = jnp.concatenate([images, images])

  def twin(params):
    states, _, _ = text.prompt_states(
      CONFIG, params, ids, last + 1, none, dtype=jnp.float32
    )
    values = states[jnp.arange(4), last] @ params["score"]["w"][0]
    return jnp.sum(weight * values), values

  def ours(params):
    values = scores.scores(FORWARD, params, *batch).reshape(-1)
    return jnp.sum(weight * values), values

  (_, got), gradient = gradients(ours)(params)
  (_, want), expected = gradients(twin)(params)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(gradient),
    jax.tree.leaves(expected),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x, y, atol=5e-5, err_msg=name)


def test_padding_of_prompts_and_completions_changes_no_score(params, batch):
  prompts, lengths, images, completions, mask = batch
  wider = jnp.pad(prompts, ((0, 0), (0, 7)), constant_values=5)
  longer = jnp.pad(completions, ((0, 0), (0, 0), (0, 4)), constant_values=9)
  masked = jnp.pad(mask, ((0, 0), (0, 0), (0, 4)))
  want = score(FORWARD, params, *batch)
  got = score(FORWARD, params, wider, lengths, images, longer, masked)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_scores_are_in_float32_whatever_the_network_computes_in(params, batch):
  forward = FORWARD.replace(dtype=jnp.bfloat16)
  shape = jax.eval_shape(lambda x: scores.scores(forward, x, *batch), params)
  assert shape.dtype == jnp.float32


def test_a_new_head_scores_zero():
  tree = weights.random_params(CONFIG, 0, jnp.bfloat16)
  assert tree["score"]["w"].dtype == np.float32
  assert not tree["score"]["w"].any()
