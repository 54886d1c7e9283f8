"""The decoder over bundles: a prompt computed once, with its `C` completions.

`bundle_states` serves training and scoring; `prompt_states` reads prompts alone
and `decoding` continues from its keys and values, with the same parts of a
layer. All loop over a stacked parameter tree, so compile time does not grow
with depth. Final states become log-probabilities in `logprobs`, scores in
`scores` and tokens in `sampling`.

References:
  Gemma 3 Technical Report (arXiv:2503.19786), section 2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import attention, embedding, lora, vision
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import remat as remats

_NO_WINDOW = 2**30
_RMS_EPSILON = 1e-6


# Pixels, or the features that the image tower made of them.
type Images = (
  UInt8[Array, "U I height width 3"] | Float[Array, "U I S tower_width"]
)


class LayerStack(NamedTuple):
  """Parameters and attention pattern of one layer, or of all, stacked."""

  params: dict
  window: Int[Array, " layers"]
  is_global: Int[Array, " layers"]


def prompt_states(
  config: gemma3_config.ModelConfig,
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: Images,
  *,
  dtype: jnp.dtype,
  implementation: str = "einsum",
) -> tuple[Float[Array, "U P D"], Array, Array]:
  """Final states of every prompt position, with the keys and values.

  `params` is the stacked tree of `weights`, perhaps with `lora` adapters. Ids
  are padded on the right. There is an image for each block of placeholders, in
  order; `I` may be 0. RMSNorm and softmax stay in fp32. Keys and values are
  `[layers, U, P, K, H]`.
  """
  x, blocks = _embed_prompt(config, params, prompt_ids, images, dtype)
  tables = rope_tables(config, jnp.arange(prompt_ids.shape[1])[None])

  def layer(x, stack):
    spec = _attention_spec(config, stack, prompt_length, blocks)
    x, k, v = _run_layer(config, stack, x, tables, spec, implementation)
    return x, (k[:, 0], v[:, 0])

  x, (k, v) = jax.lax.scan(layer, x, _layer_stack(config, params))
  return rms_norm(params["final_norm"], x)[:, 0], k, v


def bundle_states(
  config: gemma3_config.ModelConfig,
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: Images,
  completion_ids: Int[Array, "U C T"],
  *,
  dtype: jnp.dtype,
  remat: str,
  vision_remat: str = "full",
  implementation: str = "einsum",
  completion_length: Int[Array, "U C"] | None = None,
) -> Float[Array, "U C T D"]:
  """The states that predict each completion token.

  Index `t` holds the state that predicts completion token `t`: that of the
  prompt's last token for the first, that of token `t - 1` for the others. The
  result and its gradient, which flows to `params`, equal those of `C` separate
  rows that repeat prompt and images.

  The arguments are those of `prompt_states`, ids of completions, padded on the
  right, and one of `REMAT_POLICIES` for the layers and for the image tower.
  With `completion_length` the only states are those after the last tokens, or
  after the prompt where a completion has none: `[U, C, 1, D]`.
  """
  x, blocks = _embed_prompt(
    config, params, prompt_ids, images, dtype, vision_remat
  )
  y = embed(config, params, completion_ids, dtype)
  t = jnp.arange(completion_ids.shape[2])
  prompt_tables = rope_tables(config, jnp.arange(prompt_ids.shape[1])[None])
  tables = rope_tables(config, prompt_length[:, None] + t[None])

  def layer(carry, stack):
    x, y = carry
    spec = _attention_spec(config, stack, prompt_length, blocks)
    run = functools.partial(_run_layer, config, stack)
    x, k, v = run(x, prompt_tables, spec, implementation)
    prompt = (k[:, 0], v[:, 0])
    y, _, _ = run(y, tables, spec, implementation, prompt=prompt)
    return (x, y), None

  layer = remats.rematerialize(layer, remat)
  (x, y), _ = jax.lax.scan(layer, (x, y), _layer_stack(config, params))
  first = last_token_states(x[:, 0], prompt_length)[:, None, None]
  first = jnp.broadcast_to(first, (*y.shape[:2], 1, y.shape[-1]))
  if completion_length is None:
    states = jnp.concatenate([first, y[:, :, :-1]], axis=2)
  else:
    index = completion_length[:, :, None, None]
    states = jnp.concatenate([first, y], axis=2)
    states = jnp.take_along_axis(states, index, axis=2)
  return rms_norm(params["final_norm"], states)


def _layer_stack(config: gemma3_config.ModelConfig, params: dict) -> LayerStack:
  is_global = np.array(config.global_layers)
  return LayerStack(
    params=params["layers"],
    window=jnp.asarray(
      np.where(is_global, _NO_WINDOW, config.sliding_window), jnp.int32
    ),
    is_global=jnp.asarray(is_global, jnp.int32),
  )


def layer_at(
  config: gemma3_config.ModelConfig,
  params: dict,
  number: Int[Array, ""],
  *,
  is_global: bool,
) -> LayerStack:
  """One layer of the stack, by a number that may be traced."""
  return LayerStack(
    params=jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False),
      params["layers"],
    ),
    window=jnp.int32(_NO_WINDOW if is_global else config.sliding_window),
    is_global=jnp.int32(is_global),
  )


def _attention_spec(
  config, stack, prompt_length, blocks
) -> attention.AttentionSpec:
  return attention.AttentionSpec(
    prompt_length=prompt_length,
    window=stack.window,
    is_global=stack.is_global,
    local_window=config.sliding_window,
    soft_tokens=config.soft_tokens,
    image_block=blocks,
  )


def _run_layer(config, stack, x, tables, spec, implementation, *, prompt=None):
  """Runs one block on `x [U, C, t, D]`; also returns its keys and values."""
  q, k, v = queries_keys_values(config, stack, x, tables)
  read = attention.attend(
    q, k, v, spec, prompt=prompt, implementation=implementation
  )
  return after_attention(stack.params, x, read), k, v


def queries_keys_values(config, stack, x, tables):
  """Rotated queries and keys, and values, `[U, C, t, heads, H]` each."""
  attn = stack.params["attn"]
  y = rms_norm(stack.params["pre_attention_norm"], x)
  q = lora.einsum("uctd,qdh->uctqh", y, attn["q_einsum"])
  kv = lora.einsum("uctd,nkdh->uctnkh", y, attn["kv_einsum"])
  k, v = kv[:, :, :, 0], kv[:, :, :, 1]
  sin, cos = (table[stack.is_global] for table in tables)
  q = _rotate(rms_norm(attn["query_norm"], q), sin, cos) * config.query_scale
  k = _rotate(rms_norm(attn["key_norm"], k), sin, cos)
  q, k, v = (
    sharding.constrain_activation(heads, "heads") for heads in (q, k, v)
  )
  return q, k, v


def after_attention(params: dict, x: Array, read: Array) -> Array:
  """Output projection, gated MLP, and their residuals."""
  y = lora.einsum("uctqh,qhd->uctd", read, params["attn"]["attn_vec_einsum"])
  x = x + rms_norm(params["post_attention_norm"], y)
  y = rms_norm(params["pre_ffw_norm"], x)
  y = lora.einsum("uctd,nfd->nuctf", y, params["mlp"]["gating_einsum"])
  y = jax.nn.gelu(y[0], approximate=True) * y[1]
  y = sharding.constrain_activation(y, "hidden")
  y = lora.einsum("uctf,fd->uctd", y, params["mlp"]["linear"])
  return sharding.constrain_activation(
    x + rms_norm(params["post_ffw_norm"], y), "bundles"
  )


def rms_norm(params: dict, x: Array) -> Array:
  """RMSNorm over the last axis, in fp32; the result has the type of `x`."""
  y = x.astype(jnp.float32)
  y *= jax.lax.rsqrt(
    jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _RMS_EPSILON
  )
  scale = params["scale"].astype(jnp.float32)
  return (y * (1 + jnp.expand_dims(scale, range(x.ndim - 1)))).astype(x.dtype)


def rope_tables(
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


def embed(config, params, ids: Array, dtype) -> Array:
  """Scaled input embeddings of ids; the result has one more axis, `D`."""
  table = params["embedder"]["input_embedding"]
  # The scale is rounded to the compute type, as in the released models.
  scale = jnp.sqrt(jnp.asarray(config.embed_dim, jnp.float32)).astype(dtype)
  return embedding.lookup(table, ids, dtype) * scale


def _embed_prompt(config, params, prompt_ids, images, dtype, remat="none"):
  """Embeddings `[U, 1, P, D]` with soft tokens in them, and image blocks."""
  is_soft = prompt_ids == GEMMA3.image_placeholder
  x = embed(config, params, jnp.where(is_soft, 0, prompt_ids), dtype)
  starts = is_soft & ~jnp.pad(is_soft, ((0, 0), (1, 0)))[:, :-1]
  blocks = jnp.where(is_soft, jnp.cumsum(starts, axis=1), 0)
  if images.shape[1]:
    soft = _project_images(config, params, images, dtype, remat)
    slot = jnp.maximum(jnp.cumsum(is_soft, axis=1) - 1, 0)
    merged = jnp.take_along_axis(soft, slot[..., None], axis=1)
    x = jnp.where(is_soft[..., None], merged, x)
  return x[:, None], blocks


def _project_images(
  config, params, images, dtype, remat
) -> Float[Array, "U S D"]:
  """Soft tokens of all images of a prompt, concatenated."""
  if jnp.issubdtype(images.dtype, jnp.floating):
    soft = images.astype(dtype)
  else:
    soft = vision.soft_tokens(
      config.vision,
      params["vision_encoder"],
      images,
      dtype=dtype,
      remat=remat,
    )
  embedder = params["embedder"]
  soft = rms_norm(embedder["mm_soft_embedding_norm"], soft)
  soft = lora.einsum("uisw,wd->uisd", soft, embedder["mm_input_projection"])
  return soft.reshape(soft.shape[0], -1, soft.shape[-1])


@functools.partial(jax.named_call, name="last_prompt_state")
def last_token_states(
  x: Float[Array, "U P D"], length: Int[Array, " U"]
) -> Array:
  """The state of each prompt's last token."""
  return jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]
