"""Checkpoints in a bucket: saved, verified, restored and read by Orbax."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from grpo_tpu.checkpoint import reader
from tests.grpo_tpu.checkpoint import checkpointing

FOLDER = "gs://a-bucket/runs/a/checkpoints"


def state(seed=0):
  return {
    "w": jax.random.normal(jax.random.key(seed), (64, 32)),
    "key": jax.random.key(seed),
  }


def save(*steps, **settings):
  with checkpointing.opened(FOLDER, **settings) as checkpoints:
    for step in steps:
      checkpoints.save(step, state(step), {"is": step})


def restore():
  with checkpointing.opened(FOLDER) as checkpoints:
    restored = checkpoints.restore(state())
  assert restored is not None
  np.testing.assert_array_equal(restored.state["w"], state(restored.step)["w"])
  return restored.step, checkpoints.quarantined


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_what_is_saved_comes_back_and_orbax_reads_it_too(bucket_here):
  save(1, 2, 3, 4, keep=2)
  assert restore() == (4, 0)
  assert reader.steps(FOLDER) == [3, 4]
  found = ocp.PyTreeCheckpointHandler().restore(
    epath.Path(FOLDER) / "00000004" / "state"
  )
  np.testing.assert_array_equal(found["w"], state(4)["w"])
  manager = ocp.CheckpointManager(
    FOLDER,
    options=ocp.CheckpointManagerOptions(
      step_name_format=ocp.path.step.standard_name_format(
        step_format_fixed_length=8
      ),
      read_only=True,
    ),
  )
  assert manager.all_steps() == [3, 4]
