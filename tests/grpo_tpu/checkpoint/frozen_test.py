"""A frozen network computes as the parameters that it is a copy of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from grpo_tpu.checkpoint import load
from grpo_tpu.checkpoint.frozen import Frozen
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.models.network import make_forward
from grpo_tpu.rl import score
from grpo_tpu.rl.train_batch import TrainBatch

BASE = dataclasses.replace(
  Config.from_config_dict(base.get_config()).model, weights="random:1"
)


@pytest.fixture(scope="module")
def mesh():
  """All devices, so that parameters are really sharded."""
  return sharding.make_mesh(replica=1, fsdp=8, tensor=1)


def keep(params, mesh, *, dtype="float32", memory="device"):
  setting = "model.reference_memory"
  return Frozen(params, mesh, dtype=dtype, memory=memory, setting=setting)


def load_random(mesh, **changes):
  settings = dataclasses.replace(BASE, **changes)
  return settings, load.load_params(settings, mesh)


def test_a_network_in_bfloat16_keeps_norms_the_tower_and_a_head(mesh):
  """What the network casts to bf16 anyhow is kept so, and nothing else."""
  _, params = load_random(mesh, head="score")
  kept = 0
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(params),
    jax.tree.leaves(keep(params, mesh, dtype="bfloat16").params),
    strict=True,
  ):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_kept = "vision_encoder" in name or name.endswith(("scale", "score/w"))
    kept += is_kept
    assert y.dtype == (jnp.float32 if is_kept else jnp.bfloat16), name
    assert y.sharding == x.sharding, name
    np.testing.assert_array_equal(x.astype(y.dtype), y)
  assert 0 < kept < len(jax.tree.leaves(params))
  same = jax.tree.map(lambda x, y: x is y, params, keep(params, mesh).params)
  assert all(jax.tree.leaves(same))


def test_a_network_in_bfloat16_scores_alike_under_compute_in_bfloat16(mesh):
  """To the bit: the network casts the same numbers, only later."""
  settings, params = load_random(mesh, compute_dtype="bfloat16")
  forward = make_forward(
    settings, mesh, temperature=1.0, min_new_tokens=0, banned_ids=()
  )
  # Norms that bf16 cannot hold, for drawn ones are zeros and ones.
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x + 0.001234 if path[-1].key == "scale" else x, params
  )
  ids = np.random.default_rng(0).integers(110, 900, (1, 2, 6))
  bundles = TrainBatch(
    prompt_ids=jnp.asarray(ids[:, 0], jnp.int32),
    prompt_length=jnp.array([6]),
    images=jnp.zeros((1, 0, 48, 48, 3), jnp.uint8),
    completion_ids=jnp.asarray(ids, jnp.int32),
    completion_mask=jnp.ones(ids.shape, bool),
  )
  whole, kept = (
    score.score_batch(
      forward,
      jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree),
      bundles,
      num_microbatches=1,
    )
    for tree in (params, keep(params, mesh, dtype="bfloat16").params)
  )
  jax.tree.map(np.testing.assert_array_equal, whole, kept)


def test_a_network_in_host_memory_comes_back_to_the_devices(mesh):
  _, params = load_random(mesh)
  reference = keep(params, mesh, memory="pinned_host")
  for x, away, back in zip(
    *map(jax.tree.leaves, (params, reference._params, reference.params)),
    strict=True,
  ):
    assert away.sharding.memory_kind == "pinned_host"
    assert back.sharding.memory_kind == "device"
    assert back.sharding.spec == x.sharding.spec
    np.testing.assert_array_equal(back, x)


def test_a_memory_that_the_devices_lack_is_refused():
  """Before anything is moved."""
  device = type("Device", (), {"addressable_memories": lambda _: []})()
  mesh = type("Mesh", (), {"local_devices": [device]})()
  with pytest.raises(
    ValueError, match=r"^model.reference_memory \('pinned_host'\) must"
  ):
    keep({}, mesh, memory="pinned_host")
