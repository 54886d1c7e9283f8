"""The sharding of every array, from one table of rules.

Mesh axes: `replica` (slices, over the data-centre network), `fsdp` (shards of
parameters and of the batch), `tensor` (heads and hidden widths).
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("replica", "fsdp", "tensor")
BATCH = P(("replica", "fsdp"))

# The first rule whose pattern matches the end of a parameter's path applies.
# The paths of optimizer moments end with the paths of their parameters.
# In the shapes, `*` is the axis of the layers.
RULES = (
  (r"embedder/input_embedding", P("tensor", "fsdp")),  # [V, D]
  (r"embedder/mm_input_projection", P("fsdp", None)),  # [width, D]
  (r"score/w", P()),  # [1, D]
  (r"attn/q_einsum", P(None, "tensor", "fsdp", None)),  # [layers, Q, D, H]
  (r"attn/kv_einsum", P(None, None, "tensor", "fsdp", None)),  # [*, 2, K, D, H]
  (r"attn/attn_vec_einsum", P(None, "tensor", None, "fsdp")),  # [*, Q, H, D]
  (r"mlp/gating_einsum", P(None, None, "tensor", "fsdp")),  # [layers, 2, F, D]
  (r"mlp/linear", P(None, "tensor", "fsdp")),  # [layers, F, D]
  # Adapters are split along the axes of their weights; r is the rank.
  (r"mm_input_projection/lora_a", P("fsdp", None)),  # [width, r]
  (r"mm_input_projection/lora_b", P()),  # [r, D]
  (r"q_einsum/lora_a", P(None, "fsdp", None)),  # [layers, D, r]
  (r"q_einsum/lora_b", P(None, None, "tensor", None)),  # [layers, r, Q, H]
  (r"(kv|gating)_einsum/lora_a", P(None, None, "fsdp", None)),  # [*, 2, D, r]
  (r"kv_einsum/lora_b", P(None, None, None, "tensor", None)),  # [*, 2, r, K, H]
  (r"gating_einsum/lora_b", P(None, None, None, "tensor")),  # [*, 2, r, F]
  (r"attn_vec_einsum/lora_a", P(None, "tensor", None, None)),  # [*, Q, H, r]
  (r"linear/lora_a", P(None, "tensor", None)),  # [layers, F, r]
  (r"(attn_vec_einsum|linear)/lora_b", P(None, None, "fsdp")),  # [*, r, D]
  (r"vision_encoder/embedding/kernel", P()),  # [patch, patch, 3, width]
  (r"vision_encoder/pos_embedding", P()),  # [1, N, width]
  # [*, width, q, h]
  (r"(query|key|value)/kernel", P(None, "fsdp", None, None)),
  (r"out/kernel", P(None, None, None, "fsdp")),  # [layers, q, h, width]
  (r"mlp_in/kernel", P(None, "fsdp", None)),  # [layers, width, F]
  (r"mlp_out/kernel", P(None, None, "fsdp")),  # [layers, F, width]
  (r"scale|bias", P()),
  (r"count|step|position", P()),  # Scalars of the optimizer and the state.
)

# Activations between layers: bundles are split over the data axes, and heads
# and hidden widths like the weights that produce them.
ACTIVATIONS = {
  "bundles": BATCH,  # [U, ...]
  "heads": P(*BATCH, None, None, "tensor", None),  # [U, C, t, heads, H]
  "hidden": P(*BATCH, None, None, "tensor"),  # [U, C, t, F]
}

# Keys and values of a rollout, by their names in `decoding.Cache`.
CACHES = (
  (r"(local_)?prompt_[kv]", P(None, *BATCH, "tensor")),  # [*, U, K, p, H]
  (r"(local_)?[kv]", P(None, *BATCH, None, "tensor")),  # [*, U, C, K, t, H]
)


def make_mesh(
  replica: int,
  fsdp: int,
  tensor: int,
  *,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """The mesh of these devices, or all; neighbours in a slice stay neighbours.

  If the devices belong to several slices, only `replica` spans the data-centre
  network between them.

  Raises:
    ValueError: The axes do not multiply out to the number of devices, or do not
      fit the slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = (replica, fsdp, tensor)
  # CPU and GPU devices may have no slice index.
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  # The whole mesh: an axis alone might lead from one error to the other.
  tensor_near = math.gcd(tensor, len(devices) // slices)
  fsdp_near = len(devices) // slices // tensor_near
  remedy = (
    f"set mesh.replica={slices} mesh.fsdp={fsdp_near} mesh.tensor={tensor_near}"
  )
  if math.prod(shape) != len(devices):
    raise ValueError(
      f"mesh.replica * mesh.fsdp * mesh.tensor ({replica} * {fsdp} * {tensor}) "
      f"must equal the number of devices ({len(devices)}); {remedy}."
    )
  if replica % slices:
    raise ValueError(
      f"mesh.replica ({replica}) must be a multiple of the number of slices "
      f"({slices}), because no other axis may span the network between them; "
      f"{remedy}."
    )
  if slices == 1:
    layout = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  else:
    layout = mesh_utils.create_hybrid_device_mesh(
      *((replica // slices, fsdp, tensor), (slices, 1, 1), devices),
      allow_split_physical_axes=True,
    )
  return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(replica: int, fsdp: int, tensor: int) -> AbstractMesh:
  """A mesh without devices, for shardings that are only planned."""
  return AbstractMesh((replica, fsdp, tensor), AXES)


def param_shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
  """The sharding of each leaf of a tree of parameters or optimizer state.

  Raises:
    ValueError: No rule matches a leaf, or the mesh does not divide its shape.
  """

  def find_sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, spec in RULES:
      if re.search(rf"(^|/)({pattern})$", name):
        spec = spec if leaf.ndim else P()
        return NamedSharding(mesh, _fit_spec(mesh, name, leaf.shape, spec))
    raise ValueError(f"no sharding rule matches the parameter {name}.")

  return jax.tree_util.tree_map_with_path(find_sharding, tree)


def constrain_params(tree: Any) -> Any:
  """Constrains parameters or optimizer state, under jit, to their shardings.

  The mesh is that of `jax.set_mesh`; without one nothing changes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, param_shardings(mesh, tree))


def constrain_activation(x: jax.Array, kind: str) -> jax.Array:
  """Constrains an activation, under jit, to its sharding in `ACTIVATIONS`.

  An axis that the mesh does not divide is replicated: the one key-value head of
  the small models, or the bundles of a batch that is smaller than the mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = list(ACTIVATIONS[kind])
  for index, axis in enumerate(spec):
    names = (axis,) if isinstance(axis, str) else axis or ()
    if x.shape[index] % math.prod(mesh.shape[name] for name in names):
      spec[index] = None
  return jax.lax.with_sharding_constraint(x, P(*spec))


def cache_spec(mesh: Mesh, name: str, num_kv_heads: int) -> P:
  """The partitioning of a cache; heads are replicated if they do not divide.

  Raises:
    ValueError: No rule matches the name.
  """
  for pattern, spec in CACHES:
    if re.fullmatch(pattern, name):
      is_split = num_kv_heads % mesh.shape["tensor"] == 0
      return spec if is_split else P(None, *BATCH)
  raise ValueError(f"no sharding rule matches the cache {name}.")


def _fit_spec(
  mesh: Mesh | AbstractMesh, name: str, shape: tuple[int, ...], spec: P
) -> P:
  """The rule, adapted for keys and values with fewer heads than shards."""
  axes = list(spec)
  for index, axis in enumerate(axes):
    if axis is None or shape[index] % mesh.shape[axis] == 0:
      continue
    if axis == "tensor" and "/kv_einsum" in f"/{name}":
      axes[index] = None  # Replicates the one head of 270M and 1B.
      continue
    shards = mesh.shape[axis]
    most = min(shards, shape[index])
    near = next(n for n in range(most, 0, -1) if shape[index] % n == 0)
    raise ValueError(
      f"mesh.{axis} ({shards}) must divide axis {index} of {name} {shape}; "
      f"choose a divisor of {shape[index]}: the nearest below is "
      f"mesh.{axis}={near}."
    )
  return P(*axes)


def data_shards(
  mesh: Mesh, process_index: int | None = None
) -> tuple[tuple[int, ...], int]:
  """The shards of each batch that a process reads, and how many there are.

  Shard `i` belongs to the devices at index `i` of the batch axes. Every process
  with such a device reads the shard: processes that share a `tensor` axis read
  the same rows. The shards of a process need not be adjacent. `process_index`
  None stands for this process.
  """
  if process_index is None:
    process_index = jax.process_index()
  rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
  owners = [{device.process_index for device in row} for row in rows]
  shards = tuple(i for i, x in enumerate(owners) if process_index in x)
  return shards, len(rows)


def process_rows(mesh: Mesh, num_rows: int, process_index: int) -> list[int]:
  """The rows of a whole batch that a process reads."""
  shards, count = data_shards(mesh, process_index)
  size = num_rows // count
  return [row for i in shards for row in range(i * size, (i + 1) * size)]


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays whose first axis is the batch."""
  return NamedSharding(mesh, BATCH)


def abstract_batch(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
  """Shape and sharding of an array whose first axis is the batch."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def device_put_batch(mesh: Mesh, tree: Any) -> Any:
  """Makes global device arrays from the rows of the process's `data_shards`."""
  sharding, (shards, count) = batch_sharding(mesh), data_shards(mesh)

  def device_put(rows):
    rows = np.asarray(rows)
    size = len(rows) // len(shards)

    def shard(index):
      start = shards.index((index[0].start or 0) // size) * size
      return rows[start : start + size]

    shape = (size * count, *rows.shape[1:])
    return jax.make_array_from_callback(shape, sharding, shard)

  return jax.tree.map(device_put, tree)


def local_rows(mesh: Mesh, tree: Any) -> Any:
  """The inverse of `device_put_batch`: this process's rows, as NumPy arrays."""

  def rows(x):
    shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([shards[start] for start in sorted(shards)])

  return jax.tree.map(rows, _reshard(tree, batch_sharding(mesh)))


def all_rows(mesh: Mesh, tree: Any) -> Any:
  """The rows of all processes in batch order, as NumPy arrays.

  `tree` holds this process's rows, as for `device_put_batch`.
  """
  rows = _reshard(device_put_batch(mesh, tree), replicated_sharding(mesh))
  return jax.device_get(rows)


def microbatches(batch: Any, count: int) -> Any:
  """`[U, ...]` as `[count, U / count, ...]`; devices keep their own rows."""

  def split(x):
    # No -1 here: the images of a text model have no elements.
    rows = x.shape[0] // count
    return x.reshape(rows, count, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, batch)


def whole_batch(parts: jax.Array) -> jax.Array:
  """The inverse of `microbatches`, for one array."""
  rows = parts.swapaxes(0, 1)
  return rows.reshape(-1, *parts.shape[2:])


def device_put_whole(mesh: Mesh, x: np.ndarray, spec: P) -> jax.Array:
  """Makes a device array from a NumPy array that every process has in full."""
  sharding = NamedSharding(mesh, spec)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


@functools.partial(jax.jit, static_argnums=1)
def _reshard(tree, sharding):
  return jax.lax.with_sharding_constraint(tree, sharding)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding with the whole array on every device."""
  return NamedSharding(mesh, P())
