"""The embedding table, and lookups in which each shard reads its own part.

The table is split along the vocabulary over `tensor` and along its width over
`fsdp`; ids are split over `fsdp` too. The compiler alone would gather all rows
on all devices and sum whole gradients. Here the ids travel, which are small,
then each row once, to the device of its id. In the backward pass each gradient
travels once, to the device of its row. No device ever holds all of either.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grpo_tpu.distributed import sharding

# The same as in `sharding.RULES`.
_TABLE = P("tensor", "fsdp")


class _TableSpec(NamedTuple):
  """Size and types that the backward pass needs."""

  num_rows: int
  table_dtype: jnp.dtype
  row_dtype: jnp.dtype


def output_embedding(params: dict) -> Float[Array, "V D"]:
  """The matrix that makes logits of final states; also the input embedding."""
  return params["embedder"]["input_embedding"]


def lookup(
  table: Float[Array, "V D"], ids: Int[Array, "U ..."], dtype: jnp.dtype
) -> Float[Array, "U ... D"]:
  """The rows of `ids`, cast to `dtype` before they travel.

  Uses the mesh of `jax.set_mesh`. Without one, or if it does not divide the
  first axis of the ids, the lookup is left to the compiler. The gradient of
  `table` adds up in fp32 on a mesh.
  """
  mesh, (batch,) = jax.sharding.get_abstract_mesh(), sharding.BATCH
  if mesh.empty or mesh.size == 1:
    return table[ids].astype(dtype)
  if ids.shape[0] % math.prod(mesh.shape[name] for name in batch):
    return table[ids].astype(dtype)
  return _lookup(_TableSpec(len(table), table.dtype, dtype), table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(spec: _TableSpec, table: Array, ids: Array) -> Array:
  def read_rows(table, ids):
    ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
    row, is_own = _own_rows(ids, len(table))
    rows = jnp.where(is_own[..., None], table[row].astype(spec.row_dtype), 0)
    # One shard has the row and the others zeros, so the sum does not round.
    rows = jax.lax.psum(rows, "tensor")
    # Trades some columns of everyone's rows for all columns of its own rows.
    return jax.lax.all_to_all(rows, "fsdp", 0, rows.ndim - 1, tiled=True)

  return jax.shard_map(
    read_rows,
    in_specs=(_TABLE, sharding.BATCH),
    out_specs=sharding.BATCH,
    check_vma=False,
  )(table, ids)


def _forward(spec, table, ids):
  return _lookup(spec, table, ids), ids


def _backward(spec: _TableSpec, ids: Array, gradient: Array):
  def add_rows(ids, gradient):
    ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
    last = gradient.ndim - 1
    gradient = jax.lax.all_to_all(gradient, "fsdp", last, 0, tiled=True)
    num_rows = spec.num_rows // jax.lax.axis_size("tensor")
    row, is_own = _own_rows(ids, num_rows)
    total = jnp.zeros((num_rows, gradient.shape[-1]), jnp.float32)
    # Rows of other shards go past the end of the table, where they are dropped.
    row = jnp.where(is_own, row, num_rows)
    total = total.at[row].add(gradient.astype(jnp.float32), mode="drop")
    return jax.lax.psum(total, "replica").astype(spec.table_dtype)

  total = jax.shard_map(
    add_rows,
    in_specs=(sharding.BATCH, sharding.BATCH),
    out_specs=_TABLE,
    check_vma=False,
  )(ids, gradient)
  return total, None


_lookup.defvjp(_forward, _backward)


def _own_rows(
  ids: Int[Array, "*batch"], num_rows: int
) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
  """Row of each id in this shard (0 if in another), and True if it is here."""
  row = ids - jax.lax.axis_index("tensor") * num_rows
  is_own = (row >= 0) & (row < num_rows)
  return jnp.where(is_own, row, 0), is_own
