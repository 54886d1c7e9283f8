"""The image tower: pixels to soft tokens in the text model's embedding space.

SigLIP (pre-LayerNorm ViT with learned positions), average pooling to a fixed
number of tokens, RMSNorm and a linear projection. Knows nothing of prompts.

References:
  Zhai et al., "Sigmoid Loss for Language Image Pre-Training"
  (arXiv:2303.15343); Gemma 3 Technical Report (arXiv:2503.19786), section 2.1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import remat as remats

_LAYER_NORM_EPSILON = 1e-6


# Query patches whose attention weights exist at a time; the weights of all 4096
# patches of an image would take a gibibyte.
_PATCHES_AT_A_TIME = 512


def soft_tokens(
  config: gemma3_config.VisionConfig,
  params: dict,
  images: UInt8[Array, "*batch H W 3"],
  *,
  dtype: jnp.dtype,
  remat: str,
) -> Float[Array, "*batch S width"]:
  """The pooled output of the tower, before the projector.

  `params` is the tree under `vision_encoder`. Images have `config.shown_size`.
  Norms and softmax stay in fp32. `remat` is one of `REMAT_POLICIES`.
  """
  batch = images.shape[:-3]
  x = _patches(config, images.reshape(-1, *images.shape[-3:]))
  # [n, N, patch * patch * 3] @ [patch * patch * 3, width]
  kernel = params["embedding"]["kernel"].reshape(-1, config.width)
  x = x.astype(dtype) @ kernel.astype(dtype)
  # The bias [width] is added to the positions [1, N, width].
  bias = _broadcastable(params["embedding"]["bias"], x)
  offset = position_embeddings(config, params["pos_embedding"]) + bias
  x = x + offset.astype(dtype)

  def block(x, layer):
    # Gathers weights to the devices of the images, not images to weights.
    return sharding.constrain_activation(
      _block(config, layer, x), "bundles"
    ), None

  x = sharding.constrain_activation(x, "bundles")
  block = remats.rematerialize(block, remat)
  x, _ = jax.lax.scan(block, x, params["layers"])
  x = _layer_norm(params["norm"], x)
  return _pool(x, config.soft_tokens).reshape(
    *batch, config.soft_tokens, config.width
  )


def position_embeddings(
  config: gemma3_config.VisionConfig, learned: Float[Array, "1 N width"]
) -> Float[Array, "1 n width"]:
  """Position embeddings at `shown_size`, interpolated from the learned ones."""
  if config.shown_size == config.image_size:
    return learned
  before, after = (
    size // config.patch_size for size in (config.image_size, config.shown_size)
  )
  grid = learned.reshape(before, before, -1)
  grid = jax.image.resize(grid, (after, after, grid.shape[-1]), "linear")
  return grid.reshape(1, after * after, -1)


def _patches(config, images: Array) -> Array:
  """Splits images `[n, H, W, 3]` to `[n, N, patch * patch * 3]` in [-1, 1]."""
  side, patch = config.shown_size // config.patch_size, config.patch_size
  x = images.astype(jnp.float32) / 127.5 - 1.0
  x = x.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(-1, side * side, patch * patch * 3)


def _block(config, params: dict, x: Array) -> Array:
  y = _layer_norm(params["attention_norm"], x)
  q, k, v = (
    jnp.einsum("ntd,dqh->ntqh", y, params[name]["kernel"].astype(y.dtype))
    + params[name]["bias"][None, None].astype(y.dtype)
    for name in ("query", "key", "value")
  )
  y = _attend(q * q.shape[-1] ** -0.5, k, v)
  out = params["out"]
  x += jnp.einsum("ntqh,qhd->ntd", y, out["kernel"].astype(y.dtype))
  x += _broadcastable(out["bias"], x).astype(x.dtype)
  y = _layer_norm(params["mlp_norm"], x)
  y = jax.nn.gelu(_dense(params["mlp_in"], y), approximate=True)
  return x + _dense(params["mlp_out"], y)


def _attend(q: Array, k: Array, v: Array) -> Array:
  """Attention `[n, N, heads, h]` among all patches, some queries at a time."""

  def attend(q):
    scores = jnp.einsum("ntqh,nsqh->nqts", q, k)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    return jnp.einsum("nqts,nsqh->ntqh", weights.astype(v.dtype), v)

  n, num_patches, *rest = q.shape
  if num_patches <= _PATCHES_AT_A_TIME or num_patches % _PATCHES_AT_A_TIME:
    return attend(q)
  parts = q.reshape(n, -1, _PATCHES_AT_A_TIME, *rest).swapaxes(0, 1)
  # Without the checkpoint, the weights of all parts would be kept.
  y = jax.lax.map(jax.checkpoint(attend), parts)
  return y.swapaxes(0, 1).reshape(q.shape)


def _dense(params: dict, x: Array) -> Array:
  bias = _broadcastable(params["bias"], x).astype(x.dtype)
  return x @ params["kernel"].astype(x.dtype) + bias


def _broadcastable(vector: Array, x: Array) -> Array:
  """A vector along the last axis of `x`, with the rank of `x`."""
  return jnp.expand_dims(vector, range(x.ndim - 1))


def _layer_norm(params: dict, x: Array) -> Array:
  y = x.astype(jnp.float32)
  y = y - y.mean(axis=-1, keepdims=True)
  variance = jnp.square(y).mean(axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(variance + _LAYER_NORM_EPSILON)
  y = y * _broadcastable(params["scale"], y) + _broadcastable(params["bias"], y)
  return y.astype(x.dtype)


def _pool(x: Array, num_tokens: int) -> Array:
  """Averages square windows of `[n, side * side, d]` to `num_tokens`."""
  side, pooled = round(x.shape[1] ** 0.5), round(num_tokens**0.5)
  window = side // pooled
  x = x.reshape(-1, pooled, window, pooled, window, x.shape[-1])
  return x.mean(axis=(2, 4)).reshape(-1, num_tokens, x.shape[-1])
