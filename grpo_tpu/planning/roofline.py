"""Bounds on the time of a program and of a step, from settings and peaks.

Bytes sent between chips and read from memory are computed from the sharding
plan. They are lower bounds: each transfer is perfectly spread, and weights move
no more often than programs must that keep no weights whole, which is once per
microbatch and per decoded token. The text of a compiled program shows neither
trip counts nor fusions, so it is searched for defects and never summed.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import hardware, sharding
from grpo_tpu.distributed.hardware import Topology
from grpo_tpu.models.gemma3 import lora, weights
from grpo_tpu.planning import arrays, programs
from grpo_tpu.planning.changes import data_shards

# Smaller collectives are not worth a line in the report.
_LARGE_BYTES = 16 * 2**20


def bounds_seconds(
  chip: hardware.Chip, flops: float, hbm_bytes: float, sent: dict[str, float]
) -> dict[str, float]:
  """Seconds that one call takes at least, by the resource that bounds it.

  Work and bytes are those of one device, the sent ones as `sent_bytes` gives.
  """
  per = chip.devices_per_chip
  return {
    "compute": flops * per / chip.peak_flops,
    "hbm": hbm_bytes * per / chip.hbm_bandwidth,
    "ici": sent["ici"] * per / chip.ici_bandwidth,
    "dcn": sent["dcn"] * per / chip.dcn_bandwidth,
  }


def step_bounds(
  config: Config, topology: Topology, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
  """Bounds of a whole step of text and of images, from rows of `plan.json`."""
  tokens = max(row["completion_tokens"] for row in rows)
  chips = topology.num_chips
  return {
    kind: {
      "step_seconds_at_least": seconds,
      "completion_tokens_per_second_at_most": tokens / seconds,
      "chip_hours_per_1000_steps_at_least": seconds * chips * 1000 / 3600,
    }
    for kind, seconds in _step_seconds(config, rows).items()
  }


def least_step_seconds(config: Config, topology: Topology) -> float:
  """A bound of a whole step that needs no compilation."""
  rows = []
  for name in programs.names(config):
    sent = sent_bytes(config, topology, name)
    least_bytes = least_hbm_bytes(config, name)
    bounds = bounds_seconds(topology.chip, 0.0, least_bytes, sent)
    rows.append({"name": name, "bounds_seconds": bounds})
  return max(_step_seconds(config, rows).values())


def _step_seconds(
  config: Config, rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
  """Adds up the programs' bounds, each as often as a step calls the program."""
  rollouts = config.num_rollouts
  chunks = (config.rollout.max_new_tokens - 1) / tokens_per_chunk(config)
  images = config.data.prompts_per_step * config.data.images_per_prompt
  images /= config.rollout.pictures_per_shard
  calls = {
    "pictures": math.ceil(images / data_shards(config)),
    "prefill": rollouts,
    "decode_chunk": chunks * rollouts,
    "results": rollouts,
    "train_step": config.train.num_iterations,
    "move": 0,  # If all rows run to full length, no row ever moves.
  }
  return {
    kind: sum(
      calls.get(programs.step_of(row["name"]), 1)
      * max(row["bounds_seconds"].values())
      for row in rows
      if programs.part_of(row["name"]) != "evaluation"
      and (kind in row["name"] or "(" not in row["name"])
    )
    for kind in ("text", "image")
    if any(kind in row["name"] for row in rows)
  }


def sent_bytes(
  config: Config, topology: Topology, program: str
) -> dict[str, float]:
  """Bytes that a device sends in one call, within its slice and to others."""
  if programs.is_network(program):
    return sent_bytes(_as_network(config, program), topology, "score")
  mesh, step = config.mesh, programs.step_of(program)
  used, trained = _weight_bytes(config)
  batch_tokens = _batch_tokens(config, config.data.prompts_per_step)

  def ring(num_bytes: float) -> float:
    """Bytes sent if each device passes on every shard but its own."""
    return num_bytes * (mesh.fsdp - 1) / mesh.fsdp

  ici = dcn = 0.0
  match step:
    case "pictures":
      ici = ring(_tower_bytes(config))
    case "prefill" | "evaluation_prefill":
      prompts, _ = _rollout_rows(config, step)
      tokens = prompts * config.data.prompt_buckets[-1]
      ici = ring(used) + _forward_bytes(config, tokens)
    case "decode_chunk" | "evaluation_decode":
      _, rows = _rollout_rows(config, step)
      trips = tokens_per_chunk(config)
      ici = trips * (ring(used) + _forward_bytes(config, rows))
    case "score":
      ici = ring(used) * config.num_microbatches
      ici += _forward_bytes(config, batch_tokens)
    case "evaluation_score":
      tokens = _batch_tokens(config, config.eval.batch_size)
      ici = ring(used) + _forward_bytes(config, tokens)
    case "train_step":
      # Weights are gathered in the forward and in the backward pass, which also
      # serves recomputation; gradients are scattered.
      ici = config.num_microbatches * (2 * ring(used) + ring(trained))
      ici += _passes(config) * _reduced_bytes(config, batch_tokens)
      ici += 2 * _embedded_bytes(config, batch_tokens)
      replicas = trained / mesh.fsdp * 2 * (mesh.replica - 1) / mesh.replica
      if topology.num_slices > 1:
        dcn = replicas
      else:
        ici += replicas
  return {"ici": ici, "dcn": dcn}


def least_hbm_bytes(config: Config, program: str) -> int:
  """Bytes of weights and caches that a device reads in one call, at least."""
  if programs.is_network(program):
    return least_hbm_bytes(_as_network(config, program), "score")
  step = programs.step_of(program)
  sharded, _ = _weight_bytes(config)
  match step:
    case "move" | "results":
      return 0  # Arguments and results are counted apart.
    case "pictures":
      return _tower_bytes(config)
    case "score":
      return int(sharded * config.num_microbatches)
    case "train_step":
      return int(sharded * config.num_microbatches * _passes(config))
    case "decode_chunk" | "evaluation_decode":
      trips = tokens_per_chunk(config)
      share = trips / config.rollout.max_new_tokens
      return int(sharded * trips + share * _cache_bytes(config, step))
  return int(sharded)


def _as_network(config: Config, program: str) -> Config:
  """The settings with a reward model or judge in the place of the policy."""
  network = arrays.reward_networks(config)[programs.step_of(program)]
  network = dataclasses.replace(network, head="", weights="")
  rewards = dataclasses.replace(config.rewards, models=(), judges=())
  return dataclasses.replace(config, model=network, rewards=rewards)


def tokens_per_chunk(config: Config) -> int:
  """Tokens per row that one call of a decoding program writes."""
  settings = config.rollout
  return max(1, min(settings.chunk_tokens, settings.max_new_tokens - 1))


def _passes(config: Config) -> int:
  """Passes of a microbatch through the layers, recomputation included."""
  return 3 if config.model.remat in ("full", "offload") else 2


def _rollout_rows(config: Config, step: str) -> tuple[float, float]:
  """Prompts and completions that a data shard decodes together."""
  shards = data_shards(config)
  if step.startswith("evaluation"):
    prompts = config.eval.batch_size / shards
    return prompts, prompts * config.eval.ways[-1]["num_completions"]
  prompts = config.data.prompts_per_step / config.num_rollouts / shards
  return prompts, prompts * config.rollout.num_generations


def _cache_bytes(config: Config, step: str) -> float:
  """Bytes that all decoding steps read of prompts and of completions.

  A completion is half written on average.
  """
  model, settings = config.model_config, config.rollout
  token = 2 * model.num_kv_heads * model.head_dim * _compute_bytes(config)
  num_global = sum(model.global_layers)
  num_local, window = model.num_layers - num_global, model.sliding_window
  new, prompt = settings.max_new_tokens, config.data.prompt_buckets[-1]
  prompts = num_global * prompt + num_local * min(prompt, window)
  own = num_global * new / 2 + num_local * min(new / 2, window)
  bundles, rows = _rollout_rows(config, step)
  reads = new * token * (bundles * prompts + rows * own)
  # Tensor shards split the heads only if they divide the number of heads.
  is_split = model.num_kv_heads % config.mesh.tensor == 0
  return reads / (config.mesh.tensor if is_split else 1)


def _compute_bytes(config: Config) -> int:
  return jnp.dtype(config.model.compute_dtype).itemsize


def _abstract_params(config: Config) -> dict[str, Any]:
  dtype = jnp.dtype(config.model.compute_dtype)
  return weights.abstract_params(config.model_config, dtype)


def _tower_bytes(config: Config) -> int:
  """Bytes of the image tower's weights, which are kept in fp32, as they run."""
  tower = _abstract_params(config)["vision_encoder"]
  return _whole_bytes(tower) // 4 * _compute_bytes(config)


def _whole_bytes(tree: Any) -> int:
  """Bytes of a tree's arrays, unsharded."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _weight_bytes(config: Config) -> tuple[float, float]:
  """Bytes of the decoder's weights and of the gradients.

  Both of one tensor shard, unsharded along fsdp, without the image tower.
  """
  shapes = _abstract_params(config)
  shapes.pop("vision_encoder", None)
  used = _whole_bytes(shapes) / config.mesh.tensor
  if config.lora is None:
    item = jnp.dtype(config.model.param_dtype).itemsize
    return used, used / _compute_bytes(config) * item
  adapters = lora.abstract_adapters(config.model_config, config.lora)
  return used, float(_whole_bytes(adapters))


def _batch_tokens(config: Config, prompts: int) -> float:
  """Tokens of a data shard in a batch of `prompts` bundles."""
  return prompts * sum(_bundle_tokens(config)) / data_shards(config)


def _bundle_tokens(config: Config) -> tuple[int, int]:
  """Tokens of a prompt, and of all its completions together."""
  prompt = config.data.prompt_buckets[-1]
  completions = programs.completions_per_prompt(config)
  return prompt, completions * config.rollout.max_new_tokens


def _forward_bytes(config: Config, tokens: float) -> float:
  """Bytes of activations that a device sends in a forward pass."""
  return _embedded_bytes(config, tokens) + _reduced_bytes(config, tokens)


def _embedded_bytes(config: Config, tokens: float) -> float:
  """Bytes sent to look up embeddings, or to return their gradients.

  Data shards exchange columns, and tensor shards reduce the rows.
  """
  fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
  parts = (fsdp - 1) / fsdp + 2 * (tensor - 1) / tensor
  return parts * _activation_bytes(config, tokens)


def _reduced_bytes(config: Config, tokens: float) -> float:
  """Bytes that tensor shards send to reduce activations, twice per layer."""
  tensor = config.mesh.tensor
  times = 2 * config.model_config.num_layers * 2 * (tensor - 1) / tensor
  return times * _activation_bytes(config, tokens)


def _activation_bytes(config: Config, tokens: float) -> float:
  return tokens * config.model_config.embed_dim * _compute_bytes(config)


def find_defects(
  config: Config, collectives: Iterable[Mapping[str, Any]]
) -> list[str]:
  """Describes large collectives that the sharding plan does not ask for.

  Takes the fields of each `aot.Collective`.
  """
  weight_axes = _weight_axes(config)
  width = config.model_config.embed_dim
  columns = width // config.mesh.fsdp
  # Looked-up rows of the embedding travel to the devices of their tokens.
  prompts = config.data.prompts_per_step // config.num_rollouts
  batches = config.train.microbatch_bundles, prompts, config.eval.batch_size
  looked_up = {
    bundles // config.mesh.replica * tokens * columns
    for bundles in batches
    for tokens in _bundle_tokens(config)
  }
  defects = []
  for entry in collectives:
    shape = tuple(x for x in entry["shape"] if x > 1)
    size = math.prod(shape) * (2 if entry["dtype"] == "bf16" else 4)
    if size < _LARGE_BYTES:
      continue
    name, dtype = entry["name"], entry["dtype"]
    text = f"{name} of {dtype}{list(entry['shape'])} ({size / 2**20:.0f} MiB)"
    is_weight = tuple(sorted(shape)) in weight_axes
    if shape[0] == config.mesh.fsdp and shape[-1] == columns:
      # The columns of a weight, split into one part per shard.
      is_weight |= tuple(sorted((*shape[1:-1], width))) in weight_axes
    is_row = shape[-1] in (width, columns) or math.prod(shape) in looked_up
    if name == "all-reduce" and is_weight and data_shards(config) > 1:
      defects.append(f"{text}: a gradient that is not reduce-scattered")
    elif name == "all-gather" and not is_weight:
      defects.append(f"{text}: activations are gathered")
    elif name == "all-to-all" and not is_row:
      defects.append(f"{text}: activations are resharded")
    elif name == "all-reduce" and config.mesh.tensor == 1:
      defects.append(f"{text}: partial products are summed")
  return defects


def _weight_axes(config: Config) -> set[tuple[int, ...]]:
  """Sorted axes of every weight and of its part on a tensor shard."""
  shapes = _abstract_params(config)
  mesh = jax.sharding.AbstractMesh((1, 1, config.mesh.tensor), sharding.AXES)
  shardings = sharding.param_shardings(mesh, shapes)
  known = set()
  for leaf, leaf_sharding in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
  ):
    local = leaf_sharding.shard_shape(leaf.shape)
    for axes in (local, local[1:], leaf.shape, leaf.shape[1:]):
      known.add(tuple(sorted(n for n in axes if n > 1)))
  return known
