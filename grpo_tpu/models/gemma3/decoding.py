"""Decoding one token at a time over a prompt's cache that completions share.

A prompt's keys and values exist once per bundle, whatever the number of its
completions. Completions have a cache of the full length in global layers and a
ring of one window in local ones; local layers keep no more of the prompt than a
window can reach. `docs/adr/0011-decoding-walks-global-layers.md` explains the
order of the layers. Knows nothing of sampling, or of which rows are live.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_tpu.models.gemma3 import attention, embedding, text
from grpo_tpu.models.gemma3 import config as gemma3_config


class Cache(flax.struct.PyTreeNode):
  """Rotated keys, and values, of bundles; the layers of a kind are stacked."""

  prompt_k: Float[Array, "globals U K P H"]
  prompt_v: Float[Array, "globals U K P H"]
  # Of completions; token `t` is in slot `t`.
  k: Float[Array, "globals U C K T H"]
  v: Float[Array, "globals U C K T H"]
  # Of each prompt's last tokens.
  local_prompt_k: Float[Array, "locals U K W H"]
  local_prompt_v: Float[Array, "locals U K W H"]
  # Of completions; token `t` is in slot `t % R`.
  local_k: Float[Array, "locals U C K R H"]
  local_v: Float[Array, "locals U C K R H"]


def least_bytes_read(
  config: gemma3_config.ModelConfig,
  params: dict,
  *,
  steps: Int[np.ndarray, "*prompts C"],
  prompt_length: int,
  dtype: jnp.dtype,
) -> int:
  """Bytes that decoding has to read at least.

  Each token reads the weights once for all rows, and the caches, of type
  `dtype`, of live rows and of their padded prompts. `steps` are the numbers of
  tokens that decoding samples for each row.
  """
  num_global, window = sum(config.global_layers), config.sliding_window
  num_local = config.num_layers - num_global
  token = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
  # The i-th step of a row reads i of its own tokens, or a window of them.
  own = steps * (steps + 1) // 2
  beyond = np.maximum(steps - window, 0)
  in_window = own - beyond * (beyond + 1) // 2
  prompts = steps.max(axis=-1).sum() * (
    num_global * prompt_length + num_local * min(prompt_length, window - 1)
  )
  cached = num_global * own.sum() + num_local * in_window.sum() + prompts
  weights = (params["layers"], embedding.output_embedding(params))
  weight_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))
  return int(steps.max() * weight_bytes + cached * token)


def prefill(
  config: gemma3_config.ModelConfig,
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: Array,
  *,
  num_completions: int,
  max_new_tokens: int,
  dtype: jnp.dtype,
  implementation: str = "einsum",
) -> tuple[Float[Array, "U D"], Cache]:
  """The state that predicts the first token, and a cache to decode from.

  The arguments are those of `text.prompt_states`; the completions' part of the
  cache is empty.
  """
  states, k, v = text.prompt_states(
    config,
    params,
    prompt_ids,
    prompt_length,
    images,
    dtype=dtype,
    implementation=implementation,
  )
  is_global = np.array(config.global_layers)
  k, v = (x.swapaxes(2, 3) for x in (k, v))  # [layers, U, K, P, H]
  local_k, local_v = (
    _last_tokens(x[~is_global], prompt_length, config.sliding_window - 1)
    for x in (k, v)
  )
  own = (prompt_ids.shape[0], num_completions, config.num_kv_heads)
  ring = min(max_new_tokens, config.sliding_window)

  def empty(layers, length):
    return jnp.zeros((layers, *own, length, config.head_dim), k.dtype)

  cache = Cache(
    prompt_k=k[is_global],
    prompt_v=v[is_global],
    k=empty(is_global.sum(), max_new_tokens),
    v=empty(is_global.sum(), max_new_tokens),
    local_prompt_k=local_k,
    local_prompt_v=local_v,
    local_k=empty((~is_global).sum(), ring),
    local_v=empty((~is_global).sum(), ring),
  )
  return text.last_token_states(states, prompt_length), cache


def _first_kept(length: Int[Array, " U"], num_kept: int) -> Int[Array, " U"]:
  """Position of the first of each prompt's last `num_kept` tokens."""
  return jnp.maximum(length - num_kept, 0)


def _last_tokens(
  x: Float[Array, "layers U K P H"], length: Int[Array, " U"], reach: int
) -> Float[Array, "layers U K W H"]:
  """The last tokens of each prompt, as many as are within reach."""
  if reach >= x.shape[3]:
    return x
  position = _first_kept(length, reach)[:, None] + jnp.arange(reach)[None]
  return jnp.take_along_axis(x, position[None, :, None, :, None], axis=3)


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
  """Reads token `t` of every completion; returns the states that predict more.

  The cache holds keys and values of prompts and of tokens before `t`; the new
  one has those of token `t` too.
  """
  x = text.embed(config, params, ids[:, :, None], dtype)
  tables = text.rope_tables(config, (prompt_length + t)[:, None])
  token = _Token(config, params, cache, prompt_length, tables, t)

  def period(carry, scanned):
    x, keys, values, local_keys, local_values = carry
    index, first, number = scanned
    x, local_keys, local_values = token.local_layers(
      first, number, index, (x, local_keys, local_values)
    )
    x, keys, values = token.layer(
      number, index, (x, keys, values), is_global=True
    )
    return (x, keys, values, local_keys, local_values), None

  numbers = np.flatnonzero(config.global_layers)
  firsts = np.concatenate([[0], numbers + 1])
  carry = (x, cache.k, cache.v, cache.local_k, cache.local_v)
  if numbers.size:
    scanned = (np.arange(numbers.size), firsts[:-1], numbers)
    carry, _ = jax.lax.scan(
      period, carry, jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), scanned)
    )
  x, keys, values, local_keys, local_values = carry
  if firsts[-1] < config.num_layers:
    x, local_keys, local_values = token.local_layers(
      int(firsts[-1]),
      config.num_layers,
      numbers.size,
      (x, local_keys, local_values),
    )
  states = text.rms_norm(params["final_norm"], x)[:, :, 0]
  return states, cache.replace(
    k=keys, v=values, local_k=local_keys, local_v=local_values
  )


class _Token(NamedTuple):
  """Everything that is the same for all layers while one token is decoded."""

  config: gemma3_config.ModelConfig
  params: dict
  cache: Cache
  prompt_length: Array
  tables: tuple[Array, Array]
  t: Array

  def local_layers(self, first, end, num_before, carry):
    """Runs layers `first` to `end`, all local, after `num_before` globals."""
    return jax.lax.fori_loop(
      first,
      end,
      lambda number, carry: self.layer(
        number, number - num_before, carry, is_global=False
      ),
      carry,
    )

  def layer(self, number, index, carry, *, is_global: bool):
    """Runs layer `number`, which has the `index`-th cache of its kind.

    The carry is the activations and the completions' keys and values.
    """
    config, cache, t = self.config, self.cache, self.t
    x, keys, values = carry
    prompt = (cache.local_prompt_k, cache.local_prompt_v)
    if is_global:
      prompt = (cache.prompt_k, cache.prompt_v)
    stack = text.layer_at(config, self.params, number, is_global=is_global)
    q, k, v = text.queries_keys_values(config, stack, x, self.tables)
    keys = _write_token(keys, k, index, t)
    values = _write_token(values, v, index, t)
    prompt_k, prompt_v = (_layer_cache(part, index) for part in prompt)
    sees_prompt, sees_own = cache_masks(
      self.prompt_length,
      num_prompt=prompt_k.shape[2],
      num_own=keys.shape[4],
      t=t,
      window=None if is_global else config.sliding_window,
    )

    def attend_to_first(num_own):
      query = q[:, :, 0]
      own_k, own_v = (_layer_cache(x, index, num_own) for x in (keys, values))
      return attention.attend_cached(
        query,
        (own_k, own_v),
        (prompt_k, prompt_v),
        sees_own=sees_own[:num_own],
        sees_prompt=sees_prompt,
      )

    read = _attend_as_far_as_written(attend_to_first, keys.shape[4], t)
    return text.after_attention(stack.params, x, read[:, :, None]), keys, values


def cache_masks(
  prompt_length: Int[Array, " U"],
  *,
  num_prompt: int,
  num_own: int,
  t: Int[Array, ""],
  window: int | None,
) -> tuple[Array, Array]:
  """Masks of the cached tokens, of its prompt and its row, that token `t` sees.

  A ring of `num_own` slots holds the newest tokens; slot `s` holds the newest
  one whose index is `s` modulo `num_own`. So everything in it is within the
  window. The first `num_prompt` tokens of a prompt are cached, or, if it has
  more and there is a window, the last. The masks are `[U, num_prompt]` and
  `[num_own]`.
  """
  age = (t - jnp.arange(num_own)) % num_own
  length = prompt_length[:, None]
  first = 0
  if window is not None:
    first = _first_kept(prompt_length, num_prompt)[:, None]
  position = first + jnp.arange(num_prompt)[None]
  sees_prompt = position < length
  if window is not None:
    sees_prompt &= length + t - position < window
  return sees_prompt, age <= t


def _attend_as_far_as_written(
  attend: Callable[[int], Array], num_own: int, t: Int[Array, ""]
) -> Array:
  """Calls `attend` with the fewest quarters of the slots that hold all tokens.

  The number depends on `t` alone, so no schedule changes a result.
  """
  quarters = sorted({-(-num_own * i // 4) for i in (1, 2, 3, 4)})
  branch = sum((t >= end).astype(jnp.int32) for end in quarters[:-1])
  return jax.lax.switch(
    branch, [functools.partial(attend, end) for end in quarters]
  )


def _layer_cache(
  stacked: Array, index: Array, num_slots: int | None = None
) -> Array:
  """One layer's part of a cache, or its first slots."""
  start = (index, *(jnp.zeros_like(index) for _ in stacked.shape[1:]))
  size = [1, *stacked.shape[1:]]
  if num_slots is not None:
    size[4] = num_slots
  return jax.lax.dynamic_slice(stacked, start, size)[0]


def _write_token(cache: Array, new: Array, index: Array, t: Array) -> Array:
  """Writes `new [U, C, 1, K, H]` at a layer and a token of the cache."""
  new = new.swapaxes(2, 3)[None]  # [1, U, C, K, 1, H]
  zero = jnp.zeros_like(t)
  slot = t % cache.shape[4]
  start = (index.astype(t.dtype), zero, zero, zero, slot, zero)
  return jax.lax.dynamic_update_slice(cache, new, start)
