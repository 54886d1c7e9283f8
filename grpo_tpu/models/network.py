"""How the network runs: static choices that training and sampling share."""

import flax.struct
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_tpu.models.gemma3 import attention
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.settings import ModelSettings


class ForwardConfig(flax.struct.PyTreeNode):
  """Static choices of a forward pass; hashable, so jit can take it.

  Attributes:
    config: Sizes of the network.
    dtype: Type of the matrix products.
    remat: Rematerialization of the layers, one of `REMAT_POLICIES`.
    temperature: Temperature of sampling, and of scoring what was sampled.
    chunk_size: Number of tokens whose logits exist at a time.
    train_vision: True if gradients reach the image tower.
    vision_remat: Rematerialization of the image tower.
    attention: Implementation, from `gemma3.attention.choose_implementation`.
    banned_ids: Token ids of probability 0, as in the rollout.
    min_new_tokens: Number of tokens before which stop tokens have
      probability 0 in sampling, and in scoring what was sampled.
  """

  config: gemma3_config.ModelConfig = flax.struct.field(pytree_node=False)
  dtype: jnp.dtype = flax.struct.field(pytree_node=False)
  remat: str = flax.struct.field(pytree_node=False)
  temperature: float = flax.struct.field(pytree_node=False)
  chunk_size: int = flax.struct.field(pytree_node=False)
  train_vision: bool = flax.struct.field(pytree_node=False)
  vision_remat: str = flax.struct.field(pytree_node=False, default="full")
  attention: str = flax.struct.field(pytree_node=False, default="einsum")
  banned_ids: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
  min_new_tokens: int = flax.struct.field(pytree_node=False, default=0)


def make_forward(
  model: ModelSettings,
  mesh: Mesh,
  *,
  temperature: float,
  min_new_tokens: int,
  banned_ids: tuple[int, ...],
) -> ForwardConfig:
  """The forward pass that settings ask for, on the devices of a mesh."""
  return ForwardConfig(
    config=model.network,
    dtype=jnp.dtype(model.compute_dtype),
    remat=model.remat,
    temperature=temperature,
    chunk_size=model.logits_chunk,
    train_vision=model.train_vision,
    vision_remat=model.vision_remat,
    attention=attention.choose_implementation(
      model.attention, mesh.devices.flat[0].platform
    ),
    banned_ids=banned_ids,
    min_new_tokens=min_new_tokens,
  )
