"""What must move between chips and from memory, by the sharding plan alone.

Hand arithmetic over settings, for bounds: each transfer perfectly spread, and
nothing moved more often than the programs must that keep no weights whole: for
each microbatch, and for each token that is decoded. What a compiled program
shows is searched for defects, never summed, for its text says neither trips nor
what was fused.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware, sharding
from grpo_tpu.models.gemma3 import lora, weights

# Below this a collective is not worth a line.
_LARGE_BYTES = 16 * 2**20

_DECODING = ("decode_chunk", "evaluation_decode")


def volume(
  config: run_config.Config, topology: hardware.Topology, program: str
) -> dict[str, float]:
  """Bytes that a device sends in a call: inside its slice, and beyond.

  Args:
    config: The run's settings.
    topology: Where the replicas lie, in one slice or in several.
    program: Of `programs.names`.
  """
  mesh, step = config.mesh, program.partition(" ")[0]
  if step in ("move", "results"):
    return {"ici": 0.0, "dcn": 0.0}
  sharded, trained = _weights(config)
  if step == "pictures":
    sharded = _tower(config)
  # Each device sends its part to all others of a ring, and all parts pass.
  gathered = sharded * (mesh.fsdp - 1) / mesh.fsdp
  micro, dcn = config.num_microbatches, 0.0
  if step == "pictures":
    ici = gathered
  elif step.endswith("prefill"):
    prompts, _ = _rollout(config, step)
    tokens = prompts * config.data.prompt_buckets[-1]
    ici = gathered + _forward(config, tokens)
  elif step in _DECODING:
    _, rows = _rollout(config, step)
    ici = decode_trips(config) * (gathered + _forward(config, rows))
  elif step == "score":
    ici = gathered * micro + _forward(config, _tokens(config))
  elif step == "evaluation_score":
    tokens = _tokens(config, config.eval.batch_size)
    ici = gathered + _forward(config, tokens)
  else:
    # Gathered forward and backward; what is recomputed uses the latter.
    scattered = trained * (mesh.fsdp - 1) / mesh.fsdp
    ici = micro * (2 * gathered + scattered)
    ici += _passes(config) * _added_up(config, _tokens(config))
    ici += 2 * _looked_up(config, _tokens(config))
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
  match step:
    case "move" | "results":
      return 0  # Beside what they are given and give.
    case "pictures":
      return int(_tower(config))
    case "score":
      return int(sharded * config.num_microbatches)
    case "train_step":
      return int(sharded * config.num_microbatches * _passes(config))
    case "decode_chunk" | "evaluation_decode":
      trips = decode_trips(config)
      share = trips / config.rollout.max_new_tokens
      return int(sharded * trips + share * _cache_reads(config, step))
  return int(sharded)


def decode_trips(config: run_config.Config) -> int:
  """Tokens that a call of a decoding program writes of a row."""
  settings = config.rollout
  return max(1, min(settings.chunk_tokens, settings.max_new_tokens - 1))


def _passes(config: run_config.Config) -> int:
  """Times that a microbatch goes through the layers."""
  return 3 if config.model.remat in ("full", "offload") else 2


def _rollout(config: run_config.Config, step: str) -> tuple[float, float]:
  """Prompts of a data shard that are completed together, and their rows."""
  shards = config.mesh.replica * config.mesh.fsdp
  if step.startswith("evaluation"):
    return config.eval.batch_size / shards, config.eval.batch_size / shards
  prompts = config.data.prompts_per_step / config.num_rollouts / shards
  return prompts, prompts * config.rollout.num_generations


def _cache_reads(config: run_config.Config, step: str) -> float:
  """Of all decoding steps: the prompts' part, and of its own half."""
  model, settings = config.model_config, config.rollout
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
  bundles, rows = _rollout(config, step)
  reads = new * token * (bundles * prompts + rows * own)
  # Heads are cut over tensor shards, where these divide them.
  is_cut = model.num_kv_heads % config.mesh.tensor == 0
  return reads / (config.mesh.tensor if is_cut else 1)


def _tower(config: run_config.Config) -> float:
  """Bytes of the image tower's weights as they are used."""
  shapes = weights.abstract_params(
    config.model_config, jnp.dtype(config.model.compute_dtype)
  )
  item = jnp.dtype(config.model.compute_dtype).itemsize
  leaves = jax.tree.leaves(shapes["vision_encoder"])
  return float(sum(math.prod(x.shape) for x in leaves) * item)


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


def _tokens(config: run_config.Config, prompts: int | None = None) -> float:
  """Tokens that a data shard's bundles have, of so many prompts or a step's."""
  length = sum(_lengths(config))
  shards = config.mesh.replica * config.mesh.fsdp
  return (prompts or config.data.prompts_per_step) * length / shards


def _lengths(config: run_config.Config) -> tuple[int, int]:
  """Tokens of a prompt, and of all its completions together."""
  rows = 1
  if config.data.kind == "online":
    rows = config.rollout.num_generations
  elif config.data.kind == "preference":
    rows = config.data.preference_completions
  prompt = config.data.prompt_buckets[-1]
  return prompt, rows * config.rollout.max_new_tokens


def _forward(config: run_config.Config, tokens: float) -> float:
  """Bytes of activations that a device sends while tokens pass forward."""
  return _looked_up(config, tokens) + _added_up(config, tokens)


def _looked_up(config: run_config.Config, tokens: float) -> float:
  """Bytes of rows of the embedding, or of their gradients.

  Data shards send each other columns, and tensor shards add up.
  """
  fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
  parts = (fsdp - 1) / fsdp + 2 * (tensor - 1) / tensor
  return parts * _state_bytes(config, tokens)


def _added_up(config: run_config.Config, tokens: float) -> float:
  """Bytes of what tensor shards add up: twice in each layer."""
  tensor = config.mesh.tensor
  times = 2 * config.model_config.num_layers * 2 * (tensor - 1) / tensor
  return times * _state_bytes(config, tokens)


def _state_bytes(config: run_config.Config, tokens: float) -> float:
  item = jnp.dtype(config.model.compute_dtype).itemsize
  return tokens * config.model_config.embed_dim * item


def defects(
  config: run_config.Config, collectives: Iterable[Mapping[str, Any]]
) -> list[str]:
  """What a program's text shows that the sharding plan does not ask for.

  Args:
    config: The run's settings.
    collectives: As `aot.Collective` has them.
  """
  known = _shapes_of_weights(config)
  # Rows of the embedding travel from where they lie to where their ids are.
  width = config.model_config.embed_dim
  columns = width // config.mesh.fsdp
  merged = {tokens * columns for tokens in _tokens_at_a_time(config)}
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
    if shape[0] == config.mesh.fsdp and shape[-1] == columns:
      # Its columns as parts, one for each shard.
      is_weight |= tuple(sorted((*shape[1:-1], width))) in known
    is_looked_up = shape[-1] in (width, columns) or math.prod(shape) in merged
    if entry["name"] == "all-reduce" and is_weight and batch > 1:
      found.append(f"{said}: a gradient that is not reduce-scattered")
    elif entry["name"] == "all-gather" and not is_weight:
      found.append(f"{said}: activations gathered")
    elif entry["name"] == "all-to-all" and not is_looked_up:
      found.append(f"{said}: activations change places")
    elif entry["name"] == "all-reduce" and config.mesh.tensor == 1:
      found.append(f"{said}: partial products added up")
  return found


def _tokens_at_a_time(config: run_config.Config) -> set[int]:
  """Tokens, over the shards of a replica, of what programs read at a time."""
  prompts = (
    config.train.microbatch_bundles,
    config.data.prompts_per_step // config.num_rollouts,
    config.eval.batch_size,
  )
  return {
    x // config.mesh.replica * y for x in prompts for y in _lengths(config)
  }


def _shapes_of_weights(config: run_config.Config) -> set[tuple[int, ...]]:
  """Axes of every weight and of its parts on a tensor shard, sorted."""
  shapes = weights.abstract_params(config.model_config, jnp.dtype("float32"))
  mesh = jax.sharding.AbstractMesh((1, 1, config.mesh.tensor), sharding.AXES)
  places = sharding.param_shardings(mesh, shapes)
  known = set()
  for x, place in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True
  ):
    local = place.shard_shape(x.shape)
    for axes in (local, local[1:], x.shape, x.shape[1:]):
      known.add(tuple(sorted(n for n in axes if n > 1)))
  return known
