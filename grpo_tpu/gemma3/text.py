"""The decoder over bundles: a prompt computed once, with its C completions.

Three passes share one layer: `bundle_states` (training and scoring),
`prefill` and `decode` (rollout). All scan over a stacked parameter tree, so
compile time does not grow with depth. Logits are not made here; states are
turned into log-probabilities by `logprobs` and into tokens by `sampling`.

References:
  Gemma 3 Technical Report (arXiv:2503.19786), section 2.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from data_pipelines import tokenizer
from grpo_tpu import sharding
from grpo_tpu.gemma3 import attention, lora, vision
from grpo_tpu.gemma3 import config as gemma3_config
from grpo_tpu.gemma3 import remat as remats

_NO_WINDOW = 2**30
_RMS_EPSILON = 1e-6


class Cache(flax.struct.PyTreeNode):
  """Keys and values of a bundle, rotated, layers stacked in front.

  The prompt's part stands once per bundle, whatever the number of completions.
  """

  prompt_k: Float[Array, "layers U P K H"]
  prompt_v: Float[Array, "layers U P K H"]
  k: Float[Array, "layers U C T K H"]
  v: Float[Array, "layers U C T K H"]


class _Layers(NamedTuple):
  """What differs between layers, stacked for the scan."""

  params: dict
  number: Int[Array, " layers"]
  window: Int[Array, " layers"]
  is_global: Int[Array, " layers"]


def prompt_states(
  config: gemma3_config.ModelConfig,
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: UInt8[Array, "U I height width 3"],
  *,
  dtype: jnp.dtype,
  implementation: str = "einsum",
) -> tuple[Float[Array, "U P D"], Array, Array]:
  """Final states of every prompt position, with the keys and values.

  Args:
    config: The model's sizes.
    params: The stacked tree of `weights`, which `lora` may have adapted.
    prompt_ids: Right-padded ids; soft tokens are `IMAGE_PLACEHOLDER`.
    prompt_length: Ids before the padding.
    images: One per block of placeholders, in order; `I` may be 0.
    dtype: Of the matrix products; RMSNorm and softmax stay in fp32.
    implementation: Of attention, from `attention.implementation`.

  Returns:
    The states, and keys and values `[layers, U, P, K, H]`.
  """
  x, blocks = _embedded_prompt(config, params, prompt_ids, images, dtype)
  tables = _rope_tables(config, jnp.arange(prompt_ids.shape[1])[None])

  def layer(x, stack):
    sight = _sight(config, stack, prompt_length, blocks)
    x, k, v = _layer(config, stack, x, tables, sight, implementation)
    return x, (k[:, 0], v[:, 0])

  x, (k, v) = jax.lax.scan(layer, x, _layers(config, params))
  return _rms_norm(params["final_norm"], x)[:, 0], k, v


def logits(
  config: gemma3_config.ModelConfig,
  params: dict,
  tokens: Int[np.ndarray, "B L"],
  images: UInt8[np.ndarray, "B I height width 3"] | None = None,
) -> Float[Array, "B L V"]:
  """Logits after each token of whole rows, in fp32: what others compare with.

  Not for training: all logits exist at once. Rows are expanded on the host.

  Args:
    config: The model's sizes.
    params: The stacked tree of `weights`.
    tokens: Right-padded with `tokenizer.PAD`. Given images, each
      `config.vision.start_of_image` stands for the whole block of one: a blank
      line, start, soft tokens, end, a blank line, as the released models read
      it. Logits at such a token are those after the block's first blank line.
    images: At the size of the tower; a row's first ones are those it names, and
      what is beyond them is not looked at.

  Raises:
    ValueError: A row names more images than there are, or the model has no
      tower.
  """
  tokens = np.asarray(tokens)
  if images is None:
    images = np.zeros((len(tokens), 0, 1, 1, 3), np.uint8)
  elif config.vision is None:
    raise ValueError("images must be None for a model without a vision tower.")
  ids, length, position = _expanded(config, tokens, images.shape[1])
  return _logits(config, params, ids, length, jnp.asarray(images), position)


def _expanded(
  config: gemma3_config.ModelConfig, tokens: np.ndarray, num_images: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Padded ids, their lengths, and where each of `tokens` has come to lie."""
  rows, position = [], np.zeros(tokens.shape, np.int32)
  lengths = []
  for row, at in zip(tokens.tolist(), position, strict=True):
    ids: list[int] = []
    named = 0
    real = max(
      (i + 1 for i, x in enumerate(row) if x != tokenizer.PAD), default=1
    )
    for i, token in enumerate(row):
      at[i] = len(ids)
      vision = config.vision if num_images else None
      if vision and token == vision.start_of_image:
        named += 1
        soft = [tokenizer.IMAGE_PLACEHOLDER] * vision.soft_tokens
        block = [token, *soft, vision.end_of_image]
        ids += [tokenizer.BLANK_LINE, *block, tokenizer.BLANK_LINE]
      else:
        ids.append(token)
      if i + 1 == real:
        lengths.append(len(ids))
    if named > num_images:
      raise ValueError(
        f"tokens name {named} images in a row, and images has {num_images}."
      )
    rows.append(ids)
  padded = np.full((len(rows), max(map(len, rows))), tokenizer.PAD, np.int32)
  for out, ids in zip(padded, rows, strict=True):
    out[: len(ids)] = ids
  return padded, np.array(lengths, np.int32), position


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, ids, length, images, position):
  with jax.default_matmul_precision("highest"):
    states, _, _ = prompt_states(
      config, params, ids, length, images, dtype=jnp.dtype(jnp.float32)
    )
    states = jnp.take_along_axis(states, position[..., None], axis=1)
    embedding = params["embedder"]["input_embedding"].astype(jnp.float32)
    return jnp.einsum("bld,vd->blv", states, embedding)


def bundle_states(
  config: gemma3_config.ModelConfig,
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: UInt8[Array, "U I height width 3"],
  completion_ids: Int[Array, "U C T"],
  *,
  dtype: jnp.dtype,
  remat: str,
  vision_remat: str = "full",
  implementation: str = "einsum",
) -> Float[Array, "U C T D"]:
  """The states that predict each completion token.

  Position `t` holds the state from which completion token `t` is predicted:
  the prompt's last token for the first, completion token `t - 1` after. Equal,
  with its gradient, to `C` separate rows that repeat prompt and image.

  Args:
    config: The model's sizes.
    params: The stacked tree of `weights`; carries the gradient.
    prompt_ids: Right-padded ids; soft tokens are `IMAGE_PLACEHOLDER`.
    prompt_length: Ids before the padding.
    images: One per block of placeholders, in order; `I` may be 0.
    completion_ids: Right-padded ids of the completions of each prompt.
    dtype: Of the matrix products; RMSNorm and softmax stay in fp32.
    remat: What layers keep for the backward pass, of `remat.POLICIES`.
    vision_remat: What the blocks of the image tower keep; of no matter where
      it carries no gradient.
    implementation: Of attention, from `attention.implementation`.
  """
  num_prompt, num_own = prompt_ids.shape[1], completion_ids.shape[2]
  x, blocks = _embedded_prompt(
    config, params, prompt_ids, images, dtype, vision_remat
  )
  y = _embedded(config, params, completion_ids, dtype)
  t = jnp.arange(num_own)
  prompt_tables = _rope_tables(config, jnp.arange(num_prompt)[None])
  tables = _rope_tables(config, prompt_length[:, None] + t[None])

  def layer(carry, stack):
    x, y = carry
    sight = _sight(config, stack, prompt_length, blocks)
    x, k, v = _layer(config, stack, x, prompt_tables, sight, implementation)
    y, _, _ = _layer(
      config,
      stack,
      y,
      tables,
      sight,
      implementation,
      prompt=(k[:, 0], v[:, 0]),
    )
    return (x, y), None

  layer = remats.rematerialised(layer, remat)
  (x, y), _ = jax.lax.scan(layer, (x, y), _layers(config, params))
  first = _last(x[:, 0], prompt_length)[:, None, None]
  first = jnp.broadcast_to(first, (*y.shape[:2], 1, y.shape[-1]))
  states = jnp.concatenate([first, y[:, :, :-1]], axis=2)
  return _rms_norm(params["final_norm"], states)


def prefill(
  config: gemma3_config.ModelConfig,
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: UInt8[Array, "U I height width 3"],
  *,
  num_completions: int,
  max_new_tokens: int,
  dtype: jnp.dtype,
  implementation: str = "einsum",
) -> tuple[Float[Array, "U D"], Cache]:
  """The state that predicts the first token, and a cache to decode from."""
  states, k, v = prompt_states(
    config,
    params,
    prompt_ids,
    prompt_length,
    images,
    dtype=dtype,
    implementation=implementation,
  )
  layers, u, _, kv_heads, head_dim = k.shape
  empty = jnp.zeros(
    (layers, u, num_completions, max_new_tokens, kv_heads, head_dim), k.dtype
  )
  return _last(states, prompt_length), Cache(k, v, empty, empty)


def decode(
  config: gemma3_config.ModelConfig,
  params: dict,
  cache: Cache,
  prompt_length: Int[Array, " U"],
  ids: Int[Array, "U C"],
  t: Int[Array, ""],
  *,
  dtype: jnp.dtype,
) -> tuple[Float[Array, "U C D"], Cache]:
  """Reads completion token `t` of every row; returns what predicts the next.

  Args:
    config: The model's sizes.
    params: The stacked tree of `weights`.
    cache: Written at index `t` of every layer.
    prompt_length: Ids of each prompt before its padding.
    ids: Token `t` of each row.
    t: Index of these tokens in their completions.
    dtype: Of the matrix products.
  """
  x = _embedded(config, params, ids[:, :, None], dtype)
  tables = _rope_tables(config, (prompt_length + t)[:, None])

  def layer(carry, scanned):
    x, keys, values = carry
    stack, prompt_k, prompt_v = scanned
    q, k, v = _queries_keys_values(config, stack, x, tables)
    # The caches ride in the carry and are updated in place.
    keys = _put(keys, k, stack.number, t)
    values = _put(values, v, stack.number, t)
    read = attention.attend(
      q,
      keys[stack.number],
      values[stack.number],
      _sight(config, stack, prompt_length),
      prompt=(prompt_k, prompt_v),
      t=t[None],
    )
    return (_after_attention(stack.params, x, read), keys, values), None

  (x, keys, values), _ = jax.lax.scan(
    layer,
    (x, cache.k, cache.v),
    (_layers(config, params), cache.prompt_k, cache.prompt_v),
  )
  states = _rms_norm(params["final_norm"], x)[:, :, 0]
  return states, cache.replace(k=keys, v=values)


def _put(cache: Array, new: Array, layer: Array, t: Array) -> Array:
  """Writes `new [U, C, 1, K, H]` at a layer and a token of the cache."""
  zero = jnp.zeros_like(layer)
  start = (layer, zero, zero, t.astype(layer.dtype), zero, zero)
  return jax.lax.dynamic_update_slice(cache, new[None], start)


def _layers(config: gemma3_config.ModelConfig, params: dict) -> _Layers:
  is_global = np.array(config.global_layers)
  return _Layers(
    params=params["layers"],
    number=jnp.arange(config.num_layers),
    window=jnp.asarray(
      np.where(is_global, _NO_WINDOW, config.sliding_window), jnp.int32
    ),
    is_global=jnp.asarray(is_global, jnp.int32),
  )


def _sight(config, stack, prompt_length, blocks=None) -> attention.Sight:
  return attention.Sight(
    prompt_length=prompt_length,
    window=stack.window,
    is_global=stack.is_global,
    local_window=config.sliding_window,
    soft_tokens=config.soft_tokens,
    image_block=blocks,
  )


def _layer(config, stack, x, tables, sight, implementation, *, prompt=None):
  """One block on `x [U, C, t, D]`; returns the keys and values it made."""
  q, k, v = _queries_keys_values(config, stack, x, tables)
  read = attention.attend(
    q, k, v, sight, prompt=prompt, implementation=implementation
  )
  return _after_attention(stack.params, x, read), k, v


def _queries_keys_values(config, stack, x, tables):
  attn = stack.params["attn"]
  y = _rms_norm(stack.params["pre_attention_norm"], x)
  q = lora.einsum("uctd,qdh->uctqh", y, attn["q_einsum"])
  k, v = lora.einsum("uctd,nkdh->nuctkh", y, attn["kv_einsum"])
  sin, cos = (table[stack.is_global] for table in tables)
  q = _rotate(_rms_norm(attn["query_norm"], q), sin, cos) * config.query_scale
  k = _rotate(_rms_norm(attn["key_norm"], k), sin, cos)
  q, k, v = (sharding.activation(heads, "heads") for heads in (q, k, v))
  return q, k, v


def _after_attention(params: dict, x: Array, read: Array) -> Array:
  """Output projection, gated MLP, and their residuals."""
  y = lora.einsum("uctqh,qhd->uctd", read, params["attn"]["attn_vec_einsum"])
  x = x + _rms_norm(params["post_attention_norm"], y)
  y = _rms_norm(params["pre_ffw_norm"], x)
  gate, up = lora.einsum("uctd,nfd->nuctf", y, params["mlp"]["gating_einsum"])
  y = jax.nn.gelu(gate, approximate=True) * up
  y = sharding.activation(y, "hidden")
  y = lora.einsum("uctf,fd->uctd", y, params["mlp"]["linear"])
  return sharding.activation(
    x + _rms_norm(params["post_ffw_norm"], y), "bundles"
  )


def _rms_norm(params: dict, x: Array) -> Array:
  y = x.astype(jnp.float32)
  y *= jax.lax.rsqrt(
    jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _RMS_EPSILON
  )
  scale = params["scale"].astype(jnp.float32)
  return (y * (1 + jnp.expand_dims(scale, range(x.ndim - 1)))).astype(x.dtype)


def _rope_tables(
  config: gemma3_config.ModelConfig, positions: Int[Array, "#U t"]
) -> tuple[Float[Array, "2 #U t h"], Float[Array, "2 #U t h"]]:
  """Sines and cosines of local (0) and global (1) layers."""
  exponent = np.arange(config.head_dim // 2) * (2.0 / config.head_dim)
  frequency = np.stack(
    [
      config.local_rope_base**-exponent,
      config.global_rope_base**-exponent / config.global_rope_factor,
    ]
  )
  angle = positions.astype(jnp.float32)[None, :, :, None] * jnp.asarray(
    frequency[:, None, None], jnp.float32
  )
  return jnp.sin(angle), jnp.cos(angle)


def _rotate(x: Array, sin: Array, cos: Array) -> Array:
  """Applies RoPE to `x [U, C, t, heads, H]` with tables `[#U, t, H / 2]`."""
  sin, cos = sin[:, None, :, None], cos[:, None, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    [a * cos - b * sin, b * cos + a * sin], axis=-1
  ).astype(x.dtype)


def _embedded(config, params, ids: Array, dtype) -> Array:
  table = params["embedder"]["input_embedding"]
  # The factor is rounded to the table's type, as in the released models.
  scale = jnp.sqrt(jnp.asarray(config.embed_dim, jnp.float32)).astype(dtype)
  return table[ids].astype(dtype) * scale


def _embedded_prompt(config, params, prompt_ids, images, dtype, remat="none"):
  """Embeddings `[U, 1, P, D]` with soft tokens in place, and image blocks."""
  is_soft = prompt_ids == tokenizer.IMAGE_PLACEHOLDER
  x = _embedded(config, params, jnp.where(is_soft, 0, prompt_ids), dtype)
  starts = is_soft & ~jnp.pad(is_soft, ((0, 0), (1, 0)))[:, :-1]
  blocks = jnp.where(is_soft, jnp.cumsum(starts, axis=1), 0)
  if images.shape[1]:
    soft = _projected(config, params, images, dtype, remat)
    slot = jnp.maximum(jnp.cumsum(is_soft, axis=1) - 1, 0)
    merged = jnp.take_along_axis(soft, slot[..., None], axis=1)
    x = jnp.where(is_soft[..., None], merged, x)
  return x[:, None], blocks


def _projected(config, params, images, dtype, remat) -> Float[Array, "U S D"]:
  """Soft tokens of all images of a prompt, in a row."""
  soft = vision.soft_tokens(
    config.vision,
    params["vision_encoder"],
    images,
    dtype=dtype,
    remat=remat,
  )
  embedder = params["embedder"]
  soft = _rms_norm(embedder["mm_soft_embedding_norm"], soft)
  soft = lora.einsum("uisw,wd->uisd", soft, embedder["mm_input_projection"])
  return soft.reshape(soft.shape[0], -1, soft.shape[-1])


@functools.partial(jax.named_call, name="last_prompt_state")
def _last(x: Float[Array, "U P D"], length: Int[Array, " U"]) -> Array:
  return jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]
