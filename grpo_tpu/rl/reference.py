"""The frozen reference policy: its type, its memory, its way to the devices."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_tpu.checkpoint import load
from grpo_tpu.models.settings import ModelSettings


class Reference:
  """Parameters that log-probabilities are compared with."""

  def __init__(self, params: dict, model: ModelSettings, mesh: Mesh):
    """Keeps `params` as the settings ask, in type and memory.

    Norms and the image tower stay as they are: small, and computed in fp32.
    """
    self._memory = model.reference_memory
    kinds = {m.kind for m in mesh.local_devices[0].addressable_memories()}
    if self._memory not in kinds:
      raise ValueError(
        f"model.reference_memory ({self._memory!r}) must be a memory of the "
        f"devices, which have {', '.join(sorted(kinds))}; set "
        "model.reference_memory=device."
      )
    self._params = self._move(_cast(params, model), self._memory)

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


def abstract_reference(
  model: ModelSettings, mesh: Mesh, *, on_device: bool = False
) -> dict:
  """Shapes, types and shardings of the copy that is kept, or that runs."""
  params = load.abstract_params(model, mesh)
  kind = "device" if on_device else model.reference_memory
  return jax.tree.map(
    lambda x, param: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=param.sharding.with_memory_kind(kind)
    ),
    jax.eval_shape(lambda x: _cast(x, model), params),
    params,
  )


def _cast(params: dict, model: ModelSettings) -> dict:
  """Casts the matrices of the decoder to `model.reference_dtype`."""
  dtype = jnp.dtype(model.reference_dtype or model.param_dtype)

  def cast(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_kept = name.endswith("scale") or name.startswith("vision_encoder")
    return x if is_kept else x.astype(dtype)

  if dtype == model.param_dtype:
    return params
  return jax.tree_util.tree_map_with_path(cast, params)
