"""Completions are scored as they came: sampled in our way, or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl import score, train_state, train_step
from grpo_tpu.rl.settings import PRESETS
from grpo_tpu.rl.train_batch import TrainBatch

pytestmark = pytest.mark.usefixtures("quick_compile")
OBJECTIVES = {
  "demonstrations": None,
  "preference": dataclasses.replace(PRESETS["dapo"], beta=0.1),
}


@pytest.fixture(scope="module")
def given(tiny):
  """Completions of two tokens that end at once, as data may hold them."""
  ids = np.random.default_rng(0).integers(110, 130, (4, 2, 2))
  ids[..., 1] = GEMMA3.stop_ids[0]
  return TrainBatch(
    *tiny.prompts(4, num_images=0),
    completion_ids=jnp.asarray(ids, jnp.int32),
    completion_mask=jnp.ones(ids.shape, bool),
    advantages=jnp.asarray([[1.0, -1.0]] * 4),
  )


def forward_of(tiny, **changes):
  neutral = ForwardConfig(
    config=tiny.config,
    dtype=jnp.dtype(jnp.float32),
    remat="none",
    temperature=1.0,
    chunk_size=16,
    train_vision=False,
  )
  return neutral.replace(**changes)


@pytest.mark.parametrize(
  "changes", [{"temperature": 0.5}, {"min_new_tokens": 4}], ids=str
)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_how_we_sample_does_not_change_training_on_given_completions(
  tiny, given, kind, changes
):
  """Loss and gradient, to the bit; plain descent by 1 shows the gradient."""
  tx = optax.sgd(1.0)

  def update(**changes):
    step = train_step.make_train_step(
      forward_of(tiny, **changes),
      tx,
      config=OBJECTIVES[kind],
      num_microbatches=1,
    )
    params = jax.tree.map(jnp.copy, tiny.params)
    state = train_state.TrainState(
      jnp.int32(0), jnp.int32(0), params, tx.init(params)
    )
    state, metrics = step(state, given)
    return jax.device_get((state.params, metrics))

  jax.tree.map(np.testing.assert_array_equal, update(**changes), update())


def test_sampled_completions_are_scored_at_their_temperature(tiny, given):
  sampled = given.replace(sampler_logps=jnp.zeros((4, 2, 2)))

  def logps(batch, temperature):
    forward = forward_of(tiny, temperature=temperature)
    scored = score.score_batch(forward, tiny.params, batch, num_microbatches=1)
    return np.asarray(scored[0])

  at_one, at_half = logps(sampled, 1.0), logps(sampled, 0.5)
  assert np.abs(at_half - at_one).max() > 0.1
  np.testing.assert_array_equal(logps(given, 0.5), at_one)
