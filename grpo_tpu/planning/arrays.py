"""The arrays of a run as shapes, and their bytes on a device."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_tpu.checkpoint import load, networks
from grpo_tpu.checkpoint.frozen import abstract_frozen
from grpo_tpu.config.schema import Config
from grpo_tpu.models.settings import ModelSettings
from grpo_tpu.rewards import model
from grpo_tpu.rl import learner, masters
from grpo_tpu.rl.train_state import TrainState


@functools.cache
def reward_networks(config: Config) -> dict[str, ModelSettings]:
  """The settings of reward models, judges and the teacher by name."""
  rewards, policy = config.rewards, config.model
  found = model.read_models(rewards, policy)
  found += [
    policy
    if weights == "self"
    else networks.read_settings(weights, policy, setting="rewards.judges")
    for weights, *_ in rewards.judges
  ]
  named = dict(zip(rewards.network_weights, found, strict=True))
  return named | ({"teacher": config.teacher} if config.distills else {})


def abstract_network(
  config: Config, network: ModelSettings, mesh: Mesh, memory: str = "device"
) -> dict:
  """The parameters of one of `reward_networks`."""
  dtype = config.rewards.network_dtype or network.param_dtype
  return abstract_frozen(network, mesh, dtype=dtype, memory=memory)


def abstract_reference(
  config: Config, mesh: Mesh, memory: str = "device"
) -> dict:
  """The parameters of the reference."""
  dtype = config.model.reference_type
  return abstract_frozen(config.model, mesh, dtype=dtype, memory=memory)


def abstract_state(
  config: Config, mesh: Mesh
) -> tuple[TrainState, dict | None]:
  """The state, and the frozen base under LoRA's adapters."""
  tx = learner.policy_optimizer(config.model, config.optimizer_config)
  state = learner.abstract_state(config.model, mesh, tx)
  frozen = load.abstract_params(config.model, mesh) if config.lora else None
  return state, frozen


def optimizer_parts(state: TrainState) -> dict[str, Any]:
  """The optimizer's state by class; "masters" only if parameters have any."""
  if isinstance(state.opt_state, masters.MastersState):
    return state.opt_state._asdict()
  return {"optimizer": state.opt_state}


def device_bytes(tree: Any) -> int:
  """Bytes of one device's HBM that a tree of sharded shapes takes."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * item_bytes(x)
    for x in jax.tree.leaves(tree)
    if getattr(x, "sharding", None) is not None
    and x.sharding.memory_kind != "pinned_host"
  )


def item_bytes(x: Any) -> int:
  """Bytes of an element; of a random key, those of its two words."""
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return 8 if is_key else x.dtype.itemsize
