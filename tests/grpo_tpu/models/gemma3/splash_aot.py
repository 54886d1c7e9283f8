"""Compiles the gradient of the whole network for four TPU chips, with splash.

Runs in a process with libtpu and no TPU. Prints the number of kernels in the
lowered program and in the compiled one.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import attention, text, weights
from grpo_tpu.models.gemma3 import config as gemma3_config

# As small as the kernel's lanes allow, with key-value heads to divide.
CONFIG = dataclasses.replace(
  gemma3_config.CONFIGS["tiny"],
  head_dim=128,
  num_heads=4,
  num_kv_heads=2,
  sliding_window=128,
)


def main() -> None:
  chips = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2"
  ).devices
  mesh = Mesh(
    np.array(chips).reshape(1, 2, 2),
    ("replica", "fsdp", "tensor"),
    axis_types=(AxisType.Auto,) * 3,
  )
  tree = weights.abstract_params(CONFIG, jnp.dtype(jnp.float32))
  params = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    tree,
    sharding.param_shardings(mesh, tree),
  )
  side = CONFIG.vision.image_size
  bundles = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
    for shape, dtype in (
      ((2, 256), jnp.int32),
      ((2,), jnp.int32),
      ((2, 1, side, side, 3), jnp.uint8),
      ((2, 2, 128), jnp.int32),
    )
  ]

  def loss(params, *bundles):
    states = text.bundle_states(
      CONFIG,
      params,
      *bundles,
      dtype=jnp.dtype(jnp.bfloat16),
      remat="full",
      implementation=attention.choose_implementation("auto", chips[0].platform),
    )
    return jnp.mean(jnp.square(states.astype(jnp.float32)))

  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss)).lower(params, *bundles)
    compiled = lowered.compile()
  kernels = [x.as_text().count("tpu_custom_call") for x in (lowered, compiled)]
  print(json.dumps(dict(zip(("lowered", "compiled"), kernels, strict=True))))


if __name__ == "__main__":
  main()
