"""Encodes a batch's pixels for an update that trains the image tower.

Every row of a batch has as many slots for images as its richest row shows. Here
the tower encodes the images alone, in chunks that all devices share. They are
computed once more going backward, so a batch that fills more than three
quarters of the slots has them all encoded.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.distributed import compile_cache, sharding
from grpo_tpu.models.gemma3 import vision
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl.train_batch import TrainBatch


def _count_images(prompt_ids: Array) -> Array:
  """The number of runs of placeholders in the prompts of all processes."""
  is_soft = prompt_ids == GEMMA3.image_placeholder
  return (is_soft[:, 1:] & ~is_soft[:, :-1]).sum()


count_images = compile_cache.AotJit(jax.jit(_count_images))


def has_pixels(batch: TrainBatch) -> bool:
  """True for images that no tower has encoded."""
  return batch.images.dtype == jnp.uint8 and batch.images.size > 0


def with_num_encoded(
  batch: TrainBatch, mesh: Mesh, num_images: int | None = None
) -> TrainBatch:
  """Says how many slots the tower encodes for a batch, if it has pixels.

  The number is a quarter, a half or three quarters of the slots, so that few
  programs are compiled; 0 is all. Without `num_images` they are counted.
  """
  if not has_pixels(batch):
    return batch.replace(num_encoded=0)
  if num_images is None:
    num_images = int(count_images(batch.prompt_ids))
  shards = sharding.data_shards(mesh)[1]
  slots = batch.images.shape[0] * batch.images.shape[1]
  part = shards * max(1, slots // (4 * shards))
  number = max(1, -(-num_images // part)) * part
  return batch.replace(num_encoded=number if 4 * number <= 3 * slots else 0)


def encode(
  forward: ForwardConfig, params: dict, batch: TrainBatch, num_parts: int
) -> tuple[TrainBatch, Callable[[Array], dict] | None]:
  """Replaces pixels with features, if the batch says how many to encode.

  The tower runs on no more images at a time than a microbatch would. Also
  returns a function that maps the gradient of the features to that of the
  tower's parameters, in fp32; None without `num_encoded`.
  """
  if not batch.num_encoded:
    return batch, None
  tower = params["vision_encoder"]
  types = jax.tree.map(lambda x: x.dtype, tower)
  features, pull = jax.vjp(
    lambda tower: _features(forward, batch, num_parts, tower, types),
    jax.tree.map(lambda x: x.astype(jnp.float32), tower),
  )

  def tower_gradient(gradient: Array) -> dict:
    tree = {"vision_encoder": pull(gradient.astype(features.dtype))[0]}
    return sharding.constrain_params(tree)

  return batch.replace(images=features, num_encoded=0), tower_gradient


def _features(
  forward: ForwardConfig,
  batch: TrainBatch,
  num_parts: int,
  tower: dict,
  types: dict,
) -> Float[Array, "U I S tower_width"]:
  """Features of the images, and zeros in slots that are not encoded.

  The tower runs in its `types`; the gradients of chunks add up in fp32.
  """
  config = forward.config.vision
  assert config is not None
  rows, slots, *size = batch.images.shape
  pixels = batch.images.reshape(rows * slots, *size)
  is_soft = batch.prompt_ids == GEMMA3.image_placeholder
  counts = is_soft.sum(axis=1, keepdims=True) // config.soft_tokens
  is_image = jnp.arange(slots)[None] < counts
  order = jnp.argsort(~is_image.ravel(), stable=True)[: batch.num_encoded]
  at_once = math.gcd(batch.num_encoded, max(1, rows // num_parts) * slots)

  def encode_chunk(tower, chunk):
    return vision.soft_tokens(
      config,
      jax.tree.map(lambda x, dtype: x.astype(dtype), tower, types),
      sharding.constrain_activation(pixels[chunk], "bundles"),
      dtype=forward.dtype,
      remat=forward.vision_remat,
    )

  if at_once < batch.num_encoded:  # Or backward would hold all chunks.
    encode_chunk = jax.checkpoint(encode_chunk)
  _, found = jax.lax.scan(
    lambda _, chunk: (None, encode_chunk(tower, chunk)),
    None,
    order.reshape(-1, at_once),
  )
  found = found.reshape(batch.num_encoded, *found.shape[2:])
  features = jnp.zeros((len(pixels), *found.shape[1:]), found.dtype)
  features = features.at[order].set(found)
  features = features.reshape(rows, slots, *found.shape[1:])
  return sharding.constrain_activation(features, "bundles")
