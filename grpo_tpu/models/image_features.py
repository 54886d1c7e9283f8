"""What the image tower makes of a batch's pictures, each encoded once.

Pictures are known by their pixels, so one that several prompts show, or that a
cache of earlier steps holds, is not read again. The results pass through this
host's memory, where they are a fraction of the pixels; no process sees those of
another. Knows nothing of prompts.
"""

import collections
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from grpo_tpu.distributed import compile_cache, sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import vision


class ImageEncoder:
  """Encodes the pictures of one tower's batches.

  Attributes:
    encode: The program, of the tower's parameters and pixels.
    num_encoded: Pictures of the last batch, over all processes.
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

    Args:
      config: The tower's sizes.
      mesh: Where it runs.
      dtype: Of its matrix products, and of its results.
      per_shard: Pictures that each data shard encodes at a time.
      cache_bytes: Of results to keep, those last used, from batch to batch; not
        for a tower that is trained. Every process keeps its own.
    """
    self._config, self._mesh, self._dtype = config, mesh, dtype
    self._per_shard, self._cache_bytes = per_shard, cache_bytes
    self._kept: collections.OrderedDict[bytes, np.ndarray] = (
      collections.OrderedDict()
    )
    self.encode = compile_cache.AotJit(jax.jit(self._tower))
    self.num_encoded = 0

  def features(
    self, params: dict, images: UInt8[np.ndarray, "U I height width 3"]
  ) -> Float[np.ndarray, "U I S tower_width"]:
    """What `vision.soft_tokens` makes of this process's pictures.

    Args:
      params: The tree of `weights`.
      images: Of this process's prompts.
    """
    flat = images.reshape(-1, *images.shape[2:])
    names = [hashlib.blake2b(x.tobytes()).digest() for x in flat]
    known = {name: self._kept[name] for name in names if name in self._kept}
    new = {
      name: picture
      for name, picture in zip(names, flat, strict=True)
      if name not in known
    }
    made = self._encoded(params, list(new.values()))
    known |= dict(zip(new, made, strict=True))
    self._keep(known)
    shape = (*images.shape[:2], self._config.soft_tokens, self._config.width)
    return np.stack([known[name] for name in names]).reshape(shape)

  def compile_ahead(self, params: dict) -> None:
    """Compiles what encodes, for parameters given as shapes."""
    self.encode.prepare(params["vision_encoder"], self.abstract_pixels())

  def abstract_pixels(self) -> jax.ShapeDtypeStruct:
    """What `encode` reads at a time, beside the tower's parameters."""
    shape = self._pixels(sharding.data_shards(self._mesh)[1])
    return jax.ShapeDtypeStruct(
      shape, np.uint8, sharding=sharding.batch_sharding(self._mesh)
    )

  def _encoded(self, params: dict, pictures: list[np.ndarray]) -> list:
    """Results for this process's pictures, in order."""
    shards = len(sharding.data_shards(self._mesh)[0])
    at_once = shards * self._per_shard
    # All take part in every call, so they must agree how many there are.
    needed = np.asarray(
      multihost_utils.process_allgather(np.array(len(pictures)))
    )
    count = -(-int(needed.max()) // at_once)
    self.num_encoded = int(needed.sum())
    pixels = np.zeros((count, *self._pixels(shards)), np.uint8)
    if pictures:
      pixels.reshape(-1, *pixels.shape[2:])[: len(pictures)] = pictures
    made = [
      self.encode(
        params["vision_encoder"], sharding.device_put_batch(self._mesh, part)
      )
      for part in pixels
    ]
    rows = [x for part in made for x in sharding.local_rows(self._mesh, part)]
    return rows[: len(pictures)]

  def _keep(self, used: dict[bytes, np.ndarray]) -> None:
    if not self._cache_bytes:
      return
    self._kept |= used
    for name in used:
      self._kept.move_to_end(name)
    size = next(iter(used.values())).nbytes
    while len(self._kept) * size > self._cache_bytes:
      self._kept.popitem(last=False)

  def _pixels(self, shards: int) -> tuple[int, int, int, int]:
    side = self._config.shown_size
    return shards * self._per_shard, side, side, 3

  def _tower(self, tower: dict, pixels: Array) -> Array:
    made = vision.soft_tokens(
      self._config, tower, pixels, dtype=self._dtype, remat="none"
    )
    return jax.lax.with_sharding_constraint(
      made.astype(self._dtype), sharding.batch_sharding(self._mesh)
    )
