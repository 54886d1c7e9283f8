"""What must move between chips and from memory, by the sharding plan alone.

Hand arithmetic over settings, for bounds: each transfer perfectly spread and
nothing moved twice. What a compiled program shows is searched for defects,
never summed, for its text says neither trips nor what was fused.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from grpo_tpu import chips, sharding
from grpo_tpu import config as run_config
from grpo_tpu.gemma3 import lora, weights

# Below this a collective is not worth a line.
_LARGE_BYTES = 16 * 2**20


def volume(
  config: run_config.Config, topology: chips.Topology, program: str
) -> dict[str, float]:
  """Bytes that a device sends in a call: inside its slice, and beyond.

  Args:
    config: The run's settings.
    topology: Where the replicas lie, in one slice or in several.
    program: Of `programs.names`.
  """
  mesh, step = config.mesh, program.partition(" ")[0]
  sharded, trained = _weights(config)
  # Each device sends its part to all others of a ring, and all parts pass.
  gathered = sharded * (mesh.fsdp - 1) / mesh.fsdp
  rows, micro = _tokens(config), config.num_microbatches
  reduced = _activations(config, rows) * 2 * (mesh.tensor - 1) / mesh.tensor
  dcn = 0.0
  if step == "prefill":
    prompts = rows - _tokens(config, prompts=False)
    each = 2 * (mesh.tensor - 1) / mesh.tensor
    ici = gathered + each * _activations(config, prompts)
  elif step == "decode_chunk":
    trips = decode_trips(config)
    written = _tokens(config, prompts=False) / config.rollout.max_new_tokens
    each = 2 * (mesh.tensor - 1) / mesh.tensor
    ici = trips * (gathered + each * _activations(config, written))
  elif step == "score":
    ici = gathered * micro + reduced
  else:
    # Gathered forward and backward; what is recomputed uses the latter.
    scattered = trained * (mesh.fsdp - 1) / mesh.fsdp
    passes = 3 if config.model.remat == "full" else 2
    ici = micro * (2 * gathered + scattered) + passes * reduced
    replicas = trained / mesh.fsdp * 2 * (mesh.replica - 1) / mesh.replica
    if topology.num_slices > 1:
      dcn = replicas
    else:
      ici += replicas
  return {"ici": ici, "dcn": dcn}


def least_hbm_bytes(config: run_config.Config, program: str) -> int:
  """Bytes that a device reads in a call, of weights and of caches."""
  step = program.partition(" ")[0]
  sharded, _ = _weights(config)
  micro = config.num_microbatches
  if step == "score":
    return int(sharded * micro)
  if step == "train_step":
    return int(sharded * micro * (3 if config.model.remat == "full" else 2))
  if step == "prefill":
    return int(sharded)
  share = decode_trips(config) / config.rollout.max_new_tokens
  return int(sharded * decode_trips(config) + share * _cache_reads(config))


def decode_trips(config: run_config.Config) -> int:
  """Tokens that a call of `decode_chunk` writes of a row."""
  settings = config.rollout
  return max(1, min(settings.chunk_tokens, settings.max_new_tokens - 1))


def _cache_reads(config: run_config.Config) -> float:
  """Of all decoding steps: the prompts' part, and of its own half."""
  model, settings = config.model_config, config.rollout
  shards = config.mesh.replica * config.mesh.fsdp * config.mesh.tensor
  token = 2 * model.num_kv_heads * model.head_dim
  token *= jnp.dtype(config.model.compute_dtype).itemsize
  num_global = sum(model.global_layers)
  new, prompt = settings.max_new_tokens, config.data.prompt_buckets[-1]
  window = model.sliding_window
  prompts = num_global * prompt + (model.num_layers - num_global) * min(
    prompt, window
  )
  own = num_global * new / 2 + (model.num_layers - num_global) * min(
    new / 2, window
  )
  rows = settings.num_generations
  return (
    config.data.prompts_per_step * new * token * (prompts + rows * own) / shards
  )


def _weights(config: run_config.Config) -> tuple[float, float]:
  """Bytes of the decoder's weights as they are used, and of their gradients.

  Of one tensor shard, whole along fsdp.
  """
  shapes = weights.abstract_params(
    config.model_config, jnp.dtype(config.model.compute_dtype)
  )
  shapes.pop("vision_encoder", None)
  used = sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes)
  )
  used /= config.mesh.tensor
  if config.lora is None:
    item = jnp.dtype(config.model.param_dtype).itemsize
    return used, used / jnp.dtype(config.model.compute_dtype).itemsize * item
  adapters = lora.abstract_adapters(config.model_config, config.lora)
  trained = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(adapters))
  return used, float(trained)


def _tokens(config: run_config.Config, *, prompts: bool = True) -> float:
  """Tokens that a device's rows have in a step."""
  rows = 1
  if config.data.kind == "online":
    rows = config.rollout.num_generations
  elif config.data.kind == "preference":
    rows = config.data.preference_completions
  length = rows * config.rollout.max_new_tokens
  length += config.data.prompt_buckets[-1] * prompts
  shards = config.mesh.replica * config.mesh.fsdp
  return config.data.prompts_per_step * length / shards


def _activations(config: run_config.Config, tokens: float) -> float:
  """Bytes of what tensor shards add up: twice in each layer."""
  model = config.model_config
  item = jnp.dtype(config.model.compute_dtype).itemsize
  return 2 * model.num_layers * tokens * model.embed_dim * item


def defects(
  config: run_config.Config, collectives: Iterable[Mapping[str, Any]]
) -> list[str]:
  """What a program's text shows that the sharding plan does not ask for.

  Args:
    config: The run's settings.
    collectives: As `aot.Collective` has them.
  """
  known = _shapes_of_weights(config)
  batch = config.mesh.replica * config.mesh.fsdp
  found = []
  for entry in collectives:
    shape = tuple(x for x in entry["shape"] if x > 1)
    size = math.prod(shape) * (2 if entry["dtype"] == "bf16" else 4)
    if size < _LARGE_BYTES:
      continue
    said = f"{entry['name']} of {entry['dtype']}{list(entry['shape'])}"
    said += f" ({size / 2**20:.0f} MiB)"
    is_weight = tuple(sorted(shape)) in known
    if entry["name"] == "all-reduce" and is_weight and batch > 1:
      found.append(f"{said}: a gradient that is not reduce-scattered")
    elif entry["name"] == "all-gather" and not is_weight:
      found.append(f"{said}: activations gathered")
    elif entry["name"] == "all-to-all":
      found.append(f"{said}: activations change places")
    elif entry["name"] == "all-reduce" and config.mesh.tensor == 1:
      found.append(f"{said}: partial products added up")
  return found


def _shapes_of_weights(config: run_config.Config) -> set[tuple[int, ...]]:
  """Axes of every weight and of its parts on a tensor shard, sorted."""
  shapes = weights.abstract_params(config.model_config, jnp.dtype("float32"))
  mesh = jax.sharding.AbstractMesh((1, 1, config.mesh.tensor), sharding.AXES)
  places = sharding.shardings(mesh, shapes)
  known = set()
  for x, place in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True
  ):
    local = place.shard_shape(x.shape)
    for axes in (local, local[1:], x.shape, x.shape[1:]):
      known.add(tuple(sorted(n for n in axes if n > 1)))
  return known
