"""Bfloat16 weights learn what float32 ones learn, by their masters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from grpo_tpu.checkpoint import load, reader
from grpo_tpu.config import schema
from grpo_tpu.distributed import sharding
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.models.settings import LoraConfig
from grpo_tpu.rl import learner, masters, optimizer, score
from grpo_tpu.rl.partial_step import PartialStep
from grpo_tpu.rl.settings import (
  PRESETS,
  LearnerConfig,
  OptimizerConfig,
  ShapingConfig,
)
from grpo_tpu.rl.train_batch import TrainBatch
from tests.grpo_tpu.checkpoint import checkpointing

CONFIG = OptimizerConfig(
  learning_rate=1e-6,
  schedule="constant",
  warmup_steps=0,
  num_steps=100,
  end_fraction=0.1,
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  weight_decay=0.1,
  max_grad_norm=1.0,
)


def make_tx(is_frozen=lambda path: False):
  return optimizer.make_optimizer(CONFIG, is_frozen=is_frozen)


def weights_of(dtype):
  """Matrices of a size that networks have, and a leaf that stays float32."""
  rng = np.random.default_rng(0)
  kernel, head = rng.normal(0, 0.02, (2, 64, 32)).astype(jnp.bfloat16)
  return {
    "kernel": jnp.asarray(kernel, dtype),
    "norm": {"scale": jnp.asarray(kernel[0], dtype)},
    "projector": jnp.asarray(head, jnp.float32),
  }


def train(params, num_updates, tx):
  """Parameters and state after updates with gradients of one direction."""
  state = tx.init(params)
  rng = np.random.default_rng(1)
  gradient = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 1, x.shape), jnp.float32), params
  )
  for _ in range(num_updates):
    updates, state = tx.update(gradient, state, params)
    params = masters.apply_updates(params, updates, state)
  return params, state


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_masters_are_what_float32_weights_would_be_and_weights_are_rounded():
  """From one start; weight decay, too, is of the masters."""
  expected, _ = train(weights_of(jnp.float32), 50, make_tx())
  params, state = train(weights_of(jnp.bfloat16), 50, make_tx())
  assert_equal(masters.finest(params, state), expected)
  for name in ("kernel", "norm"):
    rounded = optax.tree.cast(expected[name], jnp.bfloat16)
    assert_equal(params[name], rounded)
  # The sum of the updates is large enough for many weights to move.
  moved = params["kernel"] != weights_of(jnp.bfloat16)["kernel"]
  assert jnp.mean(moved) > 0.2


def test_trained_weights_of_a_shorter_type_alone_have_masters():
  def names(params, is_frozen=lambda path: False):
    state = make_tx(is_frozen).init(params)
    if not isinstance(state, masters.MastersState):
      return None
    return set(reader.describe_leaves(state.masters).items())

  short = weights_of(jnp.bfloat16)
  assert names(weights_of(jnp.float32)) is None
  scale, kernel = ("norm/scale", "float32[32]"), ("kernel", "float32[64,32]")
  assert names(short) == {scale, kernel}
  assert names(short, lambda path: path == "kernel") == {scale}


def settings_of(**model):
  config = schema.Config.from_config_dict(base.get_config())
  return dataclasses.replace(config.model, weights="random:0", **model)


def make_learner(model, mesh):
  forward = ForwardConfig(
    config=model.network,
    dtype=jnp.float32,
    remat="none",
    temperature=1.0,
    chunk_size=16,
    train_vision=False,
  )
  config = LearnerConfig(
    objective=PRESETS["grpo"],
    optimizer=CONFIG,
    shaping=ShapingConfig(**base.get_config().shaping),
    num_microbatches=1,
  )
  return learner.Learner(model, forward, mesh, config)


def embedded_logps(forward, params, batch):
  """As `token_logps`, of a network that is nothing but its embedding."""
  embedding = params["embedder"]["input_embedding"].astype(jnp.float32)
  ids = batch.completion_ids
  logits = jax.nn.log_softmax(embedding[ids] @ embedding.T)
  logps = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
  return logps, jnp.zeros_like(logps)


def make_batch(mesh, scale=1.0):
  rng = np.random.default_rng(2)
  batch = TrainBatch(
    np.ones((4, 3), np.int32),
    np.full(4, 3, np.int32),
    np.zeros((4, 0, 2, 2, 3), np.uint8),
    completion_ids=rng.integers(0, 100, (4, 2, 5), np.int32),
    completion_mask=np.ones((4, 2, 5), bool),
    advantages=scale * rng.normal(0, 1, (4, 2)).astype(np.float32),
  )
  return sharding.device_put_batch(mesh, batch)


@pytest.fixture
def mesh(monkeypatch):
  """Two devices, each with half of the parameters."""
  monkeypatch.setattr(score, "token_logps", embedded_logps)
  mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    yield mesh


def copy(tree):
  return jax.tree.map(np.array, tree)


def start(mesh):
  """A learner in bfloat16, its first state, and the weights in float32."""
  model = settings_of(param_dtype="bfloat16")
  fine = dataclasses.replace(model, param_dtype="float32")
  params = load.load_params(fine, mesh)
  loaded, made = copy(params), make_learner(model, mesh)
  return made, made.init(params), loaded


def test_masters_start_from_weights_that_were_not_rounded(mesh):
  """They lie on the devices as their weights do."""
  made, state, loaded = start(mesh)
  assert_equal(masters.finest(state.params, state.opt_state), loaded)
  assert_equal(
    state.params,
    jax.tree.map(lambda x, y: x.astype(y.dtype), loaded, state.params),
  )
  layers = state.params["layers"], state.opt_state.masters["layers"]
  for weight, master in zip(*map(jax.tree.leaves, layers), strict=True):
    assert (weight.dtype, master.dtype) == (jnp.bfloat16, jnp.float32)
    assert master.sharding == weight.sharding
  assert not master_of(state).sharding.is_fully_replicated
  abstract = made.abstract_state()
  assert reader.describe_leaves(state) == reader.describe_leaves(abstract)
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
    lambda x: x.sharding, abstract
  )


def master_of(state):
  return state.opt_state.masters["embedder"]["input_embedding"]


def test_an_update_takes_over_the_masters_and_a_skipped_one_leaves_them(mesh):
  made, state, loaded = start(mesh)
  before = copy(state)
  skipped, metrics = made.update(state, make_batch(mesh, jnp.nan), None)
  assert metrics["skipped_updates"] == 1
  assert_equal(
    (skipped.params, skipped.opt_state),
    (
      before.params,
      before.opt_state,
    ),
  )
  after, metrics = made.update(skipped, make_batch(mesh), None)
  assert metrics["skipped_updates"] == 0
  assert all(x.is_deleted() for x in jax.tree.leaves(skipped.opt_state))
  embedding = loaded["embedder"]["input_embedding"]
  assert np.mean(master_of(after) != embedding) > 0.9


def test_a_step_with_masters_resumes_between_two_updates_to_the_same_bits(
  mesh, tmp_path
):
  made, state, _ = start(mesh)
  batch = make_batch(mesh)
  state, _ = made.update(state, batch, None)
  partial = PartialStep(batch, 1, {}, [0.0]).to_data()
  with checkpointing.opened(tmp_path) as checkpoints:
    checkpoints.save(0, state, {}, partial_step=partial)
  expected, _ = made.update(state, batch, None)
  rows = sharding.batch_sharding(mesh)
  with checkpointing.opened(tmp_path) as checkpoints:
    restored = checkpoints.restore(
      made.abstract_state(), partial_step_sharding=rows
    )
  again = PartialStep.from_data(restored.partial_step, rows)
  assert again.updates_done == 1
  resumed, _ = made.update(restored.state, again.batch, None)
  assert_equal(resumed, expected)


def test_adapters_over_a_bfloat16_base_are_float32_and_have_no_masters(mesh):
  model = settings_of(
    param_dtype="bfloat16",
    lora=LoraConfig(rank=4, alpha=8.0, targets=("q",), init=""),
    train_vision=False,
  )
  state = make_learner(model, mesh).abstract_state()
  types = {x.dtype for x in jax.tree.leaves(state) if x.ndim}
  assert types == {jnp.dtype("float32")}
  assert not isinstance(state.opt_state, masters.MastersState)


def test_an_update_with_masters_holds_no_second_copy(mesh):
  """Its temporaries are those of an update of float32 parameters."""

  def temporaries(dtype):
    made = make_learner(settings_of(param_dtype=dtype), mesh)
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      make_batch(mesh),
    )
    state = made.abstract_state()
    compiled = made.update.trace(state, batch, None).lower().compile()
    size = sum(x.size for x in jax.tree.leaves(state.params))
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes == pytest.approx(
      stats.output_size_in_bytes, rel=1e-3
    )
    return stats.temp_size_in_bytes / (size / 2)

  full, with_masters = temporaries("float32"), temporaries("bfloat16")
  assert with_masters < full + 0.5
