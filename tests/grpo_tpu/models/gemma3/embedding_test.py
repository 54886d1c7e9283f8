"""Sharded lookups and their gradients equal plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import embedding

VOCAB, WIDTH, U, T = 24, 16, 8, 5
# replica, fsdp, tensor.
MESHES = {
  "1x4": (1, 1, 4),
  "2x2": (1, 2, 2),
  "4x1": (1, 4, 1),
  "replicas": (2, 2, 2),
}


@pytest.fixture(params=MESHES.values(), ids=MESHES.keys())
def mesh(request):
  devices = jax.devices()[: np.prod(request.param)]
  return sharding.make_mesh(*request.param, devices=devices)


def table_ids_and_weights(dtype=jnp.float32):
  """Ids with repeats, and the first and last id of every shard."""
  rng = np.random.default_rng(0)
  ids = rng.integers(0, VOCAB, (U, T))
  ids[:, 0] = [0, 5, 6, 11, 12, 17, 18, 23]
  table = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), dtype)
  return table, ids, jnp.asarray(rng.normal(size=(U, T, WIDTH)), jnp.float32)


def rows_and_gradient(lookup, table, ids, weights, dtype):
  def loss(table):
    rows = lookup(table, ids, dtype)
    return jnp.sum(weights * rows.astype(jnp.float32)), rows

  (_, rows), gradient = jax.value_and_grad(loss, has_aux=True)(table)
  return rows, gradient


def plain(table, ids, dtype):
  return table[ids].astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sharded_lookup_equals_a_plain_one_with_its_gradient(mesh, dtype):
  table, ids, weights = table_ids_and_weights()
  want, gradient = rows_and_gradient(plain, table, ids, weights, dtype)
  with jax.set_mesh(mesh):
    places = sharding.param_shardings(
      mesh, {"embedder": {"input_embedding": table}}
    )
    place = places["embedder"]["input_embedding"]
    rows, got = jax.jit(
      lambda *args: rows_and_gradient(embedding.lookup, *args, dtype),
      out_shardings=(sharding.batch_sharding(mesh), place),
    )(
      jax.device_put(table, place),
      *sharding.device_put_batch(mesh, (ids, weights)),
    )
  assert rows.dtype == dtype and got.dtype == table.dtype
  np.testing.assert_array_equal(rows, want)
  np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-6)


def test_no_shard_holds_the_whole_table_or_its_gradient():
  """A device holds only its share of the table and of the rows."""
  mesh = sharding.make_mesh(1, 4, 2)
  table, ids, weights = table_ids_and_weights()
  with jax.set_mesh(mesh):
    places = sharding.param_shardings(
      mesh, {"embedder": {"input_embedding": table}}
    )
    place = places["embedder"]["input_embedding"]
    compiled = (
      jax.jit(
        lambda *args: rows_and_gradient(
          embedding.lookup, *args, jnp.dtype(jnp.float32)
        ),
        out_shardings=(sharding.batch_sharding(mesh), place),
      )
      .lower(
        jax.device_put(table, place),
        *sharding.device_put_batch(mesh, (ids, weights)),
      )
      .compile()
    )
  text = compiled.as_text()
  for whole in (
    f"f32[{VOCAB},{WIDTH}]",
    f"f32[{VOCAB // 2},{WIDTH}]",
    f"f32[{U},{T},{WIDTH}]",
  ):
    assert whole not in text
  assert f"f32[{VOCAB // 2},{WIDTH // 4}]" in text


def test_an_axis_that_the_mesh_does_not_divide_is_looked_up_too():
  table, ids, _ = table_ids_and_weights()
  with jax.set_mesh(sharding.make_mesh(1, 4, 2)):
    rows = jax.jit(
      lambda table, ids: embedding.lookup(table, ids, jnp.dtype(jnp.float32))
    )(table, ids[:3])
  np.testing.assert_array_equal(rows, table[ids[:3]])


def test_ids_of_any_rank_are_looked_up():
  table, ids, _ = table_ids_and_weights()
  mesh = sharding.make_mesh(1, 4, 2)
  with jax.set_mesh(mesh):
    for shaped in (ids[:, 0], ids[:, None]):
      rows = jax.jit(
        lambda table, ids: embedding.lookup(table, ids, jnp.dtype(jnp.float32))
      )(table, shaped)
      np.testing.assert_array_equal(rows, table[shaped])
