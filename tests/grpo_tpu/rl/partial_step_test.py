"""A partial step comes out of a checkpoint as it went in."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_tpu.rl import partial_step
from grpo_tpu.rl.train_batch import TrainBatch


@pytest.fixture
def place():
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
  return NamedSharding(mesh, PartitionSpec("fsdp"))


def make_step(place, *, skipped):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 9, (4, 2, 3), dtype=np.int32)
  bundles = TrainBatch(
    prompt_ids=jnp.asarray(rng.integers(0, 9, (4, 5), dtype=np.int32)),
    prompt_length=jnp.asarray([1, 5, 3, 2], jnp.int32),
    # Of a model that sees none.
    images=jnp.zeros((4, 0, 896, 896, 3), jnp.uint8),
    completion_ids=jnp.asarray(tokens),
    completion_mask=jnp.asarray(tokens > 2),
    advantages=jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
    old_per_token_logps=jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32),
  )
  scalars = {
    "rollout/reward": np.float32(0.1),
    "train/loss": jnp.float32(1 / 3),
    "train/grad_norm": jnp.float32(jnp.nan),
    "perf/rollout_seconds": 0.25,
    "rollout/batches": 3,
  }
  bundles = jax.device_put(bundles, place).replace(num_encoded=3)
  return partial_step.PartialStep(bundles, 3, scalars, skipped)


def through_a_checkpoint(step, place):
  """As one holds it: arrays that no file is without, and a record of JSON."""
  unfinished = step.to_data()
  assert all(array.size for array in unfinished.arrays.values())
  assert all(a.sharding == place for a in unfinished.arrays.values())
  unfinished.record.update(json.loads(json.dumps(unfinished.record)))
  return partial_step.PartialStep.from_data(unfinished, place)


def test_what_comes_out_is_what_went_in(place):
  before = make_step(place, skipped=[0.0, 1.0])
  after = through_a_checkpoint(before, place)
  assert after.num_batches == 3 and after.skipped == [0.0, 1.0]
  assert after.batch.num_encoded == 0  # Every start chooses it for its devices.
  for name, value in vars(before.batch.replace(num_encoded=None)).items():
    other = getattr(after.batch.replace(num_encoded=None), name)
    assert (value is None) == (other is None), name
    if value is not None:
      assert (value.dtype, value.sharding) == (other.dtype, other.sharding)
      np.testing.assert_array_equal(value, other, err_msg=name)


def test_its_metrics_come_out_to_the_last_bit(place):
  before = make_step(place, skipped=[0.0])
  after = through_a_checkpoint(before, place)
  assert after.metrics.keys() == before.metrics.keys()
  for name, value in before.metrics.items():
    np.testing.assert_array_equal(np.float32(after.metrics[name]), value)


def test_the_cursor_counts_updates_done_and_those_skipped_are_done(place):
  for skipped in ([], [0.0], [1.0, 0.0]):
    step = make_step(place, skipped=skipped)
    assert step.updates_done == step.to_data().updates_done == len(skipped)
