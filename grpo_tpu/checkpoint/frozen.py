"""Frozen networks: their type, their memory, their way to the devices.

The reference, teachers, reward models and judges are such networks.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_tpu.checkpoint import load
from grpo_tpu.models.gemma3 import lora
from grpo_tpu.models.settings import ModelSettings


class Frozen:
  """Parameters that no update changes; `is_copied` to the devices to run."""

  def __init__(
    self,
    params: dict,
    mesh: Mesh,
    *,
    dtype: str,
    memory: str,
    setting: str,
  ):
    """Keeps `params`, with matrices of the decoder in `dtype`, in `memory`.

    Norms, the image tower and a head stay as they are: small, and computed in
    fp32.
    `setting` is the one that names the memory, for errors.
    """
    kinds = {m.kind for m in mesh.local_devices[0].addressable_memories()}
    if memory not in kinds:
      raise ValueError(
        f"{setting} ({memory!r}) must be a memory of the devices, which have "
        f"{', '.join(sorted(kinds))}; set {setting}=device."
      )
    self._memory, self.is_copied = memory, memory != "device"
    self._params = self._move(_cast(params, dtype), memory)

  @property
  def params(self) -> dict:
    """The parameters, on the devices."""
    return self._move(self._params, "device")

  def _move(self, params: dict, memory: str) -> dict:
    if self._memory == "device":
      return params
    shardings = jax.tree.map(
      lambda x: x.sharding.with_memory_kind(memory), params
    )
    return jax.device_put(params, shardings)


def abstract_frozen(
  model: ModelSettings, mesh: Mesh, *, dtype: str, memory: str = "device"
) -> dict:
  """Shapes, types and shardings of the copy that is kept, or that runs."""
  params = load.abstract_params(model, mesh)
  return jax.tree.map(
    lambda x, param: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=param.sharding.with_memory_kind(memory)
    ),
    jax.eval_shape(lambda x: _cast(x, dtype), params),
    params,
  )


def _cast(params: dict, dtype: str) -> dict:
  """Casts the matrices of the decoder."""

  wanted = jnp.dtype(dtype)

  def cast(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_kept = name.endswith("scale")
    is_kept |= name.startswith(("vision_encoder", lora.HEAD))
    return x if is_kept or x.dtype == wanted else x.astype(wanted)

  return jax.tree_util.tree_map_with_path(cast, params)
