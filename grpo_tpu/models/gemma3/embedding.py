"""Rows of the embedding by their ids; each shard looks up what it holds.

The table is cut along the vocabulary over `tensor` and along its width over
`fsdp`, and ids are shared out over `fsdp` too. Left to itself, the compiler
gathers the rows of everyone on everyone, and adds up whole gradients. Here ids
travel, which are small, then each row once, to where its id came from; back,
its gradient once, to where the table lies. Neither is ever there in full.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grpo_tpu.distributed import sharding

# As `sharding.RULES` has it.
_TABLE = P("tensor", "fsdp")


class _Table(NamedTuple):
  """What the backward pass must know of the table, and of the rows."""

  num_rows: int
  dtype: jnp.dtype
  rows: jnp.dtype


def output_embedding(params: dict) -> Float[Array, "V D"]:
  """The matrix that makes logits of final states; also the input embedding."""
  return params["embedder"]["input_embedding"]


def lookup(
  table: Float[Array, "V D"], ids: Int[Array, "U ..."], dtype: jnp.dtype
) -> Float[Array, "U ... D"]:
  """The rows of the ids, in a type.

  On the mesh of `jax.set_mesh`; as the compiler would have it where there is
  none, or where it does not divide the first axis of the ids.

  Args:
    table: Carries the gradient, which adds up in fp32 on a mesh.
    ids: All below `V`.
    dtype: Of the rows, and of what travels.
  """
  mesh, (batch,) = jax.sharding.get_abstract_mesh(), sharding.BATCH
  if mesh.empty or mesh.size == 1:
    return table[ids].astype(dtype)
  if ids.shape[0] % math.prod(mesh.shape[name] for name in batch):
    return table[ids].astype(dtype)
  return _lookup(_Table(len(table), table.dtype, dtype), table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(kind: _Table, table: Array, ids: Array) -> Array:
  def found(table, ids):
    ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
    place, is_own = _places(ids, len(table))
    rows = jnp.where(is_own[..., None], table[place].astype(kind.rows), 0)
    # One of the shards has the row, and the others nothing: no sum rounds.
    rows = jax.lax.psum(rows, "tensor")
    # Of everyone's rows some columns, for all columns of one's own rows.
    return jax.lax.all_to_all(rows, "fsdp", 0, rows.ndim - 1, tiled=True)

  return jax.shard_map(
    found,
    in_specs=(_TABLE, sharding.BATCH),
    out_specs=sharding.BATCH,
    check_vma=False,
  )(table, ids)


def _forward(kind, table, ids):
  return _lookup(kind, table, ids), ids


def _backward(kind: _Table, ids: Array, gradient: Array):
  def added(ids, gradient):
    ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
    last = gradient.ndim - 1
    gradient = jax.lax.all_to_all(gradient, "fsdp", last, 0, tiled=True)
    num_rows = kind.num_rows // jax.lax.axis_size("tensor")
    place, is_own = _places(ids, num_rows)
    total = jnp.zeros((num_rows, gradient.shape[-1]), jnp.float32)
    # Beyond the end of the table, where it is dropped, if it is another's.
    place = jnp.where(is_own, place, num_rows)
    total = total.at[place].add(gradient.astype(jnp.float32), mode="drop")
    return jax.lax.psum(total, "replica").astype(kind.dtype)

  total = jax.shard_map(
    added,
    in_specs=(sharding.BATCH, sharding.BATCH),
    out_specs=_TABLE,
    check_vma=False,
  )(ids, gradient)
  return total, None


_lookup.defvjp(_forward, _backward)


def _places(
  ids: Int[Array, "*batch"], num_rows: int
) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
  """Where ids lie in this shard's rows, and whether they do."""
  place = ids - jax.lax.axis_index("tensor") * num_rows
  is_own = (place >= 0) & (place < num_rows)
  return jnp.where(is_own, place, 0), is_own
