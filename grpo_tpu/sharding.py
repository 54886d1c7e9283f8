"""Where each array lies on the mesh: one table of rules.

Mesh axes: `replica` (slices, over the data-centre network), `fsdp` (shards of
parameters and of the batch), `tensor` (heads and hidden widths).
"""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
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


def make_mesh(replica: int, fsdp: int, tensor: int) -> Mesh:
  """The device mesh.

  Raises:
    ValueError: The axes do not multiply out to the devices there are.
  """
  shape = (replica, fsdp, tensor)
  if np.prod(shape) != jax.device_count():
    raise ValueError(
      f"mesh.replica * mesh.fsdp * mesh.tensor ({replica} * {fsdp} * {tensor}) "
      f"must equal the {jax.device_count()} devices there are; set "
      f"mesh.fsdp={jax.device_count()} to shard over all of them."
    )
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def shardings(mesh: Mesh, tree: Any) -> Any:
  """The sharding of each leaf of a tree of parameters or optimizer state.

  Raises:
    ValueError: A leaf that no rule knows, or one that the mesh does not divide.
  """

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, spec in RULES:
      if re.search(rf"(^|/)({pattern})$", name):
        spec = spec if leaf.ndim else P()
        return NamedSharding(mesh, _fitted(mesh, name, leaf.shape, spec))
    raise ValueError(f"no sharding rule knows the parameter {name}.")

  return jax.tree_util.tree_map_with_path(sharding, tree)


def _fitted(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P) -> P:
  """The rule, less the head axis of keys and values with fewer heads."""
  axes = list(spec)
  for index, axis in enumerate(axes):
    if axis is None or shape[index] % mesh.shape[axis] == 0:
      continue
    if axis == "tensor" and "/kv_einsum" in f"/{name}":
      axes[index] = None  # One key-value head, as in 270M and 1B, is copied.
      continue
    raise ValueError(
      f"mesh.{axis} ({mesh.shape[axis]}) must divide axis {index} of {name} "
      f"{shape}; choose a divisor of {shape[index]}."
    )
  return P(*axes)


def data_shard(mesh: Mesh) -> tuple[int, int]:
  """Which of how many equal parts of each batch this process reads."""
  if mesh.shape["tensor"] > 1 and jax.process_count() > 1:
    per_process = jax.local_device_count()
    if per_process % mesh.shape["tensor"]:
      raise ValueError(
        f"mesh.tensor ({mesh.shape['tensor']}) must divide the {per_process} "
        "devices of a process, so that each process holds whole rows."
      )
  return jax.process_index(), jax.process_count()


def num_data_shards(mesh: Mesh) -> int:
  """Parts that the data axes cut a batch into."""
  return mesh.shape["replica"] * mesh.shape["fsdp"]


def batch(mesh: Mesh) -> NamedSharding:
  """Rows shared out over the data axes, batch axis first."""
  return NamedSharding(mesh, BATCH)


def put_batch(mesh: Mesh, tree: Any) -> Any:
  """Device arrays from this process's rows of each array, batch axis first."""
  place = batch(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(place, rows), tree
  )


def local_rows(mesh: Mesh, tree: Any) -> Any:
  """This process's rows of each array as NumPy, batch axis first."""
  rows = multihost_utils.global_array_to_host_local_array(tree, mesh, BATCH)
  return jax.device_get(rows)


def put_whole(mesh: Mesh, tree: Any, place: P) -> Any:
  """Device arrays from NumPy ones that every process has whole."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, NamedSharding(mesh, place), lambda index: x[index]
    ),
    tree,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())
