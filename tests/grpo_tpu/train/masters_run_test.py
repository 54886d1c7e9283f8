"""A run in bfloat16 learns what the same run in float32 learns."""

import jax
import numpy as np
import pytest

from configs import smoke
from data_pipelines import dataset
from grpo_tpu.config import schema
from grpo_tpu.distributed import sharding
from grpo_tpu.observability import alarms
from grpo_tpu.rl import masters
from grpo_tpu.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")
CHANGES = {
  "data.prompt_buckets": (64,),
  "data.prompts_per_step": 8,
  "data.synthetic.num_problems": 512,
  "eval.every_steps": 0,
  "eval.num_problems": 16,
  "model.train_vision": False,
  "model.weights": "random:0",
  "optimizer.learning_rate": 1e-6,
  "optimizer.schedule": "constant",
  "optimizer.warmup_steps": 0,
  "train.microbatch_bundles": 8,
}


def weight_changes(workdir, num_steps, **changes):
  """Masters or weights at first, their changes, and those of rounded weights.

  Also returns each update's lost fraction.
  """
  values = smoke.get_config("warm_start")
  values.update_from_flattened_dict(
    CHANGES | {"train.num_steps": num_steps} | changes
  )
  config = schema.Config.from_config_dict(values)
  data = dataset.open_dataset(
    config.data, config.model_inputs, str(workdir), for_training=True
  )
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  trainer = Trainer(config, data, mesh)

  def weights(state):
    finest = masters.finest(state.params, state.opt_state)
    return jax.device_get((finest, masters.finest(state.params, ())))

  lost = []
  with jax.set_mesh(mesh):
    state = trainer.init()
    before = weights(state)
    for step in range(1, num_steps + 1):
      batch, _ = trainer.collect(state, step)
      batch = trainer.score(state, batch)
      state, metrics = trainer.update(state, batch)
      lost.append(float(metrics["train/update_below_half_ulp_fraction"]))
    finest, rounded = jax.tree.map(np.subtract, weights(state), before)
  return before[0], finest, rounded, lost


def relative_distance(actual, expected):
  difference = jax.tree.map(np.subtract, actual, expected)
  return norm(difference) / norm(expected)


def norm(tree):
  leaves = [np.float64(x) for x in jax.tree.leaves(tree)]
  return np.sqrt(sum(np.sum(np.square(x)) for x in leaves))


@pytest.mark.parametrize(
  "num_steps", [20, pytest.param(200, marks=pytest.mark.nightly)]
)
def test_masters_change_as_float32_weights_do(
  tmp_path, record_property, num_steps
):
  """On the same batches at a rate of 1e-6; rounded weights alone do not."""
  start, expected, _, lost_in_float32 = weight_changes(tmp_path, num_steps)
  masters_start, actual, rounded, lost = weight_changes(
    tmp_path, num_steps, **{"model.param_dtype": "bfloat16"}
  )
  # Masters are not rounded at first either.
  jax.tree.map(np.testing.assert_array_equal, masters_start, start)
  of_masters = relative_distance(actual, expected)
  of_rounded = relative_distance(rounded, expected)
  record_property("relative distance of masters", float(of_masters))
  record_property("relative distance of rounded weights", float(of_rounded))
  assert of_masters < 0.05 and of_rounded > 1
  alarm = alarms.Alarms(own_samples=False)
  name = "train/update_below_half_ulp_fraction"
  for value in (*lost, *lost_in_float32):
    assert not alarm.check(1, {name: value})


def test_updates_far_too_small_ring_the_alarm(tmp_path, caplog):
  *_, lost = weight_changes(tmp_path, 2, **{"optimizer.learning_rate": 1e-12})
  name = "train/update_below_half_ulp_fraction"
  assert alarms.Alarms(own_samples=False).check(2, {name: lost[-1]}) == [name]
  assert "raise optimizer.learning_rate" in caplog.text
