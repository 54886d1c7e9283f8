"""Where each array lies on the mesh: one table of rules.

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

# The first rule whose pattern ends a parameter's path applies. Optimizer
# moments stand at paths that end alike.
RULES = (
  (r"embedder/input_embedding", P("tensor", "fsdp")),  # [V, D]
  (r"embedder/mm_input_projection", P("fsdp", None)),  # [width, D]
  (r"attn/q_einsum", P(None, "tensor", "fsdp", None)),  # [layers, Q, D, H]
  (
    r"attn/kv_einsum",
    P(None, None, "tensor", "fsdp", None),
  ),  # [.., 2, K, D, H]
  (r"attn/attn_vec_einsum", P(None, "tensor", None, "fsdp")),  # [.., Q, H, D]
  (r"mlp/gating_einsum", P(None, None, "tensor", "fsdp")),  # [layers, 2, F, D]
  (r"mlp/linear", P(None, "tensor", "fsdp")),  # [layers, F, D]
  # Adapters are cut along the axes that their weights are; r is the rank.
  (r"mm_input_projection/lora_a", P("fsdp", None)),  # [width, r]
  (r"mm_input_projection/lora_b", P()),  # [r, D]
  (r"q_einsum/lora_a", P(None, "fsdp", None)),  # [layers, D, r]
  (r"q_einsum/lora_b", P(None, None, "tensor", None)),  # [layers, r, Q, H]
  (r"(kv|gating)_einsum/lora_a", P(None, None, "fsdp", None)),  # [.., 2, D, r]
  (
    r"kv_einsum/lora_b",
    P(None, None, None, "tensor", None),
  ),  # [.., 2, r, K, H]
  (r"gating_einsum/lora_b", P(None, None, None, "tensor")),  # [.., 2, r, F]
  (r"attn_vec_einsum/lora_a", P(None, "tensor", None, None)),  # [.., Q, H, r]
  (r"linear/lora_a", P(None, "tensor", None)),  # [layers, F, r]
  (r"(attn_vec_einsum|linear)/lora_b", P(None, None, "fsdp")),  # [.., r, D]
  (r"vision_encoder/embedding/kernel", P()),  # [patch, patch, 3, width]
  (r"vision_encoder/pos_embedding", P()),  # [1, N, width]
  (
    r"(query|key|value)/kernel",
    P(None, "fsdp", None, None),
  ),  # [.., width, q, h]
  (r"out/kernel", P(None, None, None, "fsdp")),  # [layers, q, h, width]
  (r"mlp_in/kernel", P(None, "fsdp", None)),  # [layers, width, F]
  (r"mlp_out/kernel", P(None, None, "fsdp")),  # [layers, F, width]
  (r"scale|bias", P()),
  (r"count|step|position", P()),  # Scalars of the optimizer and the state.
)

# Where activations lie, at the borders between layers: bundles are shared out,
# and heads and hidden widths cut as the weights that make them are.
ACTIVATIONS = {
  "bundles": BATCH,  # [U, ...]
  "heads": P(*BATCH, None, None, "tensor", None),  # [U, C, t, heads, H]
  "hidden": P(*BATCH, None, None, "tensor"),  # [U, C, t, F]
}

# Where a rollout keeps keys and values, by their names in `decoding.Cache`.
CACHES = (
  (r"(local_)?prompt_[kv]", P(None, *BATCH, "tensor")),  # [layers, U, K, p, H]
  (r"(local_)?[kv]", P(None, *BATCH, None, "tensor")),  # [.., U, C, K, t, H]
)


def make_mesh(
  replica: int,
  fsdp: int,
  tensor: int,
  *,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """The device mesh: neighbours in a slice are neighbours in the mesh.

  Where the devices are of several slices, `replica` alone goes from one to the
  next, over the data-centre network.

  Args:
    replica: Copies of the parameters.
    fsdp: Shards of parameters and of each copy's part of the batch.
    tensor: Shards of heads and hidden widths.
    devices: All there are, unless some are given.

  Raises:
    ValueError: The axes do not multiply out to the devices there are, or cannot
      be laid over their slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = (replica, fsdp, tensor)
  if np.prod(shape) != len(devices):
    raise ValueError(
      f"mesh.replica * mesh.fsdp * mesh.tensor ({replica} * {fsdp} * {tensor}) "
      f"must equal the {len(devices)} devices there are; set "
      f"mesh.fsdp={len(devices)} to shard over all of them."
    )
  # CPU and GPU devices need not say.
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if replica % slices:
    raise ValueError(
      f"mesh.replica ({replica}) must be a multiple of the {slices} slices "
      "there are, for no other axis may span the network between them; set "
      f"mesh.replica={slices}."
    )
  layout = (
    mesh_utils.create_hybrid_device_mesh(
      (replica // slices, fsdp, tensor),
      (slices, 1, 1),
      devices,
      allow_split_physical_axes=True,
    )
    if slices > 1
    else mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  )
  return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(replica: int, fsdp: int, tensor: int) -> AbstractMesh:
  """A mesh of no devices, to ask where things would lie."""
  return AbstractMesh((replica, fsdp, tensor), AXES)


def param_shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
  """The sharding of each leaf of a tree of parameters or optimizer state.

  Raises:
    ValueError: A leaf that no rule knows, or one that the mesh does not divide.
  """

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, spec in RULES:
      if re.search(rf"(^|/)({pattern})$", name):
        spec = spec if leaf.ndim else P()
        return NamedSharding(mesh, _fit_spec(mesh, name, leaf.shape, spec))
    raise ValueError(f"no sharding rule knows the parameter {name}.")

  return jax.tree_util.tree_map_with_path(sharding, tree)


def constrain_params(tree: Any) -> Any:
  """Parameters or optimizer state, under jit, held where the rules want them.

  On the mesh of `jax.set_mesh`; as it comes where there is none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, param_shardings(mesh, tree))


def constrain_activation(x: jax.Array, kind: str) -> jax.Array:
  """An array, under jit, held where `ACTIVATIONS` wants it.

  An axis that the mesh does not divide is copied: the one key-value head of the
  small models, the bundles of a batch too small to be shared out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = [
    axis if axis and size % _num_shards(mesh, axis) == 0 else None
    for size, axis in zip(x.shape, ACTIVATIONS[kind], strict=False)
  ]
  return jax.lax.with_sharding_constraint(x, P(*spec))


def cache_spec(mesh: Mesh, name: str, num_kv_heads: int) -> P:
  """Where a cache of this name lies; heads the mesh does not divide are copied.

  Raises:
    ValueError: No rule knows the cache.
  """
  for pattern, spec in CACHES:
    if re.fullmatch(pattern, name):
      is_cut = num_kv_heads % mesh.shape["tensor"] == 0
      return spec if is_cut else P(None, *BATCH)
  raise ValueError(f"no sharding rule knows the cache {name}.")


def _num_shards(mesh: AbstractMesh, axis: str | tuple[str, ...]) -> int:
  """How many parts an axis of an array is cut into."""
  names = (axis,) if isinstance(axis, str) else axis
  return math.prod(mesh.shape[name] for name in names)


def _fit_spec(
  mesh: Mesh | AbstractMesh, name: str, shape: tuple[int, ...], spec: P
) -> P:
  """The rule, less the head axis of keys and values with fewer heads."""
  axes = list(spec)
  for index, axis in enumerate(axes):
    if axis is None or shape[index] % mesh.shape[axis] == 0:
      continue
    if axis == "tensor" and "/kv_einsum" in f"/{name}":
      axes[index] = None  # One key-value head, as in 270M and 1B, is copied.
      continue
    ways = mesh.shape[axis]
    near = next(n for n in range(ways, 0, -1) if shape[index] % n == 0)
    raise ValueError(
      f"mesh.{axis} ({ways}) must divide axis {index} of {name} {shape}; "
      f"choose a divisor of {shape[index]}: the nearest below is "
      f"mesh.{axis}={near}."
    )
  return P(*axes)


def data_shards(
  mesh: Mesh, process_index: int | None = None
) -> tuple[tuple[int, ...], int]:
  """Which of how many equal parts of each batch a process reads.

  Part `i` lies on the devices at place `i` of the batch axes, and whoever holds
  one of these reads it: processes that `tensor` spans read the same rows, and
  the parts of a process need not stand side by side.

  Args:
    mesh: Of the run.
    process_index: This process where None.
  """
  if process_index is None:
    process_index = jax.process_index()
  places = mesh.devices.reshape(-1, mesh.shape["tensor"])
  mine = [
    place
    for place, devices in enumerate(places)
    if any(device.process_index == process_index for device in devices)
  ]
  return tuple(mine), len(places)


def process_rows(mesh: Mesh, num_rows: int, process_index: int) -> list[int]:
  """Which rows of a whole batch a process reads."""
  shards, count = data_shards(mesh, process_index)
  size = num_rows // count
  return [row for i in shards for row in range(i * size, (i + 1) * size)]


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows shared out over the data axes, batch axis first."""
  return NamedSharding(mesh, BATCH)


def device_put_batch(mesh: Mesh, tree: Any) -> Any:
  """Device arrays from this process's rows of each array, batch axis first.

  The rows are those of `data_shards`, in its order.
  """
  place, (shards, count) = batch_sharding(mesh), data_shards(mesh)

  def put(rows):
    rows = np.asarray(rows)
    size = len(rows) // len(shards)

    def part(index):
      start = shards.index((index[0].start or 0) // size) * size
      return rows[start : start + size]

    shape = (size * count, *rows.shape[1:])
    return jax.make_array_from_callback(shape, place, part)

  return jax.tree.map(put, tree)


def local_rows(mesh: Mesh, tree: Any) -> Any:
  """This process's rows of each array, as NumPy arrays."""

  def rows(x):
    parts = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([parts[start].data for start in sorted(parts)])

  return jax.tree.map(rows, _reshard(tree, batch_sharding(mesh)))


def all_rows(mesh: Mesh, tree: Any) -> Any:
  """Every process's rows of each array as NumPy, in the order of the batch.

  Args:
    mesh: Where the batch would lie.
    tree: This process's rows, as `device_put_batch` takes them.
  """
  rows = _reshard(device_put_batch(mesh, tree), replicated_sharding(mesh))
  return jax.device_get(rows)


def device_put_whole(mesh: Mesh, tree: Any, place: P) -> Any:
  """Device arrays from NumPy ones that every process has whole."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, NamedSharding(mesh, place), lambda index: x[index]
    ),
    tree,
  )


@functools.partial(jax.jit, static_argnums=1)
def _reshard(tree, place):
  return jax.lax.with_sharding_constraint(tree, place)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())
