"""Encodes the images of a batch with the image tower, each image once.

Images are identified by their pixels, so one that several prompts show, or that
a cache of earlier steps holds, is not encoded again. The features pass through
this host's memory, where they are a fraction of the pixels; no process sees
those of another. Knows nothing of prompts.
"""

import collections
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from grpo_tpu.distributed import compile_cache, sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import vision


class ImageEncoder:
  """Encodes images and caches their features.

  Attributes:
    encode: The compiled function of the tower's parameters and pixels.
    num_encoded: Number of images of the last batch that were encoded, over all
      processes.
  """

  def __init__(
    self,
    config: gemma3_config.VisionConfig,
    mesh: Mesh,
    *,
    dtype: jnp.dtype,
    per_shard: int,
    cache_bytes: int,
  ):
    """Encodes nothing yet.

    Each data shard will encode `per_shard` images at a time. This process's
    cache of the features used last has `cache_bytes`, 0 for a tower that is
    trained.
    """
    self._config, self._mesh, self._dtype = config, mesh, dtype
    self._per_shard, self._cache_bytes = per_shard, cache_bytes
    self._cache: collections.OrderedDict[bytes, np.ndarray] = (
      collections.OrderedDict()
    )
    self.encode = compile_cache.AotJit(jax.jit(self._tower))
    self.num_encoded = 0

  def features(
    self,
    params: dict,
    images: UInt8[np.ndarray, "U I height width 3"],
    num_images: Int[np.ndarray, " U"],
  ) -> Float[np.ndarray, "U I S tower_width"]:
    """The output of `vision.soft_tokens` for this process's images.

    Only the first `num_images` of a row are images; the features of others are
    zeros, and cost nothing.
    """
    shape = (*images.shape[:2], self._config.soft_tokens, self._config.width)
    features = np.zeros(shape, self._dtype)
    self.num_encoded = 0
    if not features.size:  # On every process.
      return features
    is_image = np.arange(shape[1]) < num_images[:, None]
    own = images[is_image]
    names = [hashlib.blake2b(x.tobytes()).digest() for x in own]
    known = {x: self._cache[x] for x in names if x in self._cache}
    new = {
      name: image
      for name, image in zip(names, own, strict=True)
      if name not in known
    }
    encoded = self._encode_all(params, list(new.values()))
    known |= dict(zip(new, encoded, strict=True))
    self._store(known)
    if names:
      features[is_image] = np.stack([known[name] for name in names])
    return features

  def compile_ahead(self, params: dict) -> None:
    """Compiles `encode` for parameters given as shapes."""
    self.encode.prepare(params["vision_encoder"], self.abstract_pixels())

  def abstract_pixels(self) -> jax.ShapeDtypeStruct:
    """Shape and sharding of the pixels that `encode` takes."""
    shape = self._pixels_shape(sharding.data_shards(self._mesh)[1])
    return sharding.abstract_batch(self._mesh, np.uint8, *shape)

  def _encode_all(self, params: dict, images: list[np.ndarray]) -> list:
    """Features of this process's images, in order."""
    shards = len(sharding.data_shards(self._mesh)[0])
    at_once = shards * self._per_shard
    # All processes take part in every call, so they must agree on the number.
    needed = np.asarray(
      multihost_utils.process_allgather(np.array(len(images)))
    )
    num_calls = -(-int(needed.max()) // at_once)
    self.num_encoded = int(needed.sum())
    pixels = np.zeros((num_calls, *self._pixels_shape(shards)), np.uint8)
    if images:
      pixels.reshape(-1, *pixels.shape[2:])[: len(images)] = images
    parts = [
      self.encode(
        params["vision_encoder"], sharding.device_put_batch(self._mesh, part)
      )
      for part in pixels
    ]
    rows = [x for part in parts for x in sharding.local_rows(self._mesh, part)]
    return rows[: len(images)]

  def _store(self, used: dict[bytes, np.ndarray]) -> None:
    if not (self._cache_bytes and used):
      return
    self._cache |= used
    for name in used:
      self._cache.move_to_end(name)
    size = next(iter(used.values())).nbytes
    while len(self._cache) * size > self._cache_bytes:
      self._cache.popitem(last=False)

  def _pixels_shape(self, shards: int) -> tuple[int, int, int, int]:
    side = self._config.shown_size
    return shards * self._per_shard, side, side, 3

  def _tower(self, tower: dict, pixels: Array) -> Array:
    features = vision.soft_tokens(
      self._config, tower, pixels, dtype=self._dtype, remat="none"
    )
    return jax.lax.with_sharding_constraint(
      features.astype(self._dtype), sharding.batch_sharding(self._mesh)
    )
