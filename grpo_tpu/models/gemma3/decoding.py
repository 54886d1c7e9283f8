"""One token at a time: a prompt's cache, and the completions that share it.

The prompt's keys and values stand once per bundle, whatever the number of its
completions. Own keys have the full length in global layers and a ring of one
window in local ones; local layers hold no more of the prompt than a window can
reach. `docs/adr/0011-decoding-walks-global-layers.md` says how the layers are
gone through. Knows nothing of tokens' odds, or of which rows go on.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_tpu.models.gemma3 import attention, text
from grpo_tpu.models.gemma3 import config as gemma3_config


class Cache(flax.struct.PyTreeNode):
  """Keys and values of bundles, rotated, layers of a kind stacked in front.

  Attributes:
    prompt_k: Of prompts, in global layers; `prompt_v` likewise.
    prompt_v: Values.
    k: Of completions, in global layers; token `t` in slot `t`.
    v: Values.
    local_prompt_k: Of each prompt's last tokens, in local layers.
    local_prompt_v: Values.
    local_k: Of completions, in local layers; token `t` in slot `t % R`.
    local_v: Values.
  """

  prompt_k: Float[Array, "globals U K P H"]
  prompt_v: Float[Array, "globals U K P H"]
  k: Float[Array, "globals U C K T H"]
  v: Float[Array, "globals U C K T H"]
  local_prompt_k: Float[Array, "locals U K W H"]
  local_prompt_v: Float[Array, "locals U K W H"]
  local_k: Float[Array, "locals U C K R H"]
  local_v: Float[Array, "locals U C K R H"]


def cache_bytes(
  config: gemma3_config.ModelConfig,
  *,
  num_prompts: int,
  prompt_length: int,
  num_completions: int,
  max_new_tokens: int,
  dtype: jnp.dtype,
) -> tuple[int, int]:
  """Bytes of a cache: the prompts' part, and the completions' own."""
  num_global = sum(config.global_layers)
  num_local = config.num_layers - num_global
  token = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
  reach = min(prompt_length, config.sliding_window - 1)
  ring = min(max_new_tokens, config.sliding_window)
  prompt = num_prompts * (num_global * prompt_length + num_local * reach)
  own = num_global * max_new_tokens + num_local * ring
  return prompt * token, num_prompts * num_completions * own * token


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

  Args are those of `text.prompt_states`; the own part is empty.
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
  """The position of the first of each prompt's last `num_kept` tokens."""
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
  """Reads completion token `t` of every row; returns what predicts the next.

  Args:
    config: The model's sizes.
    params: The stacked tree of `weights`.
    cache: Written at token `t` of every layer.
    prompt_length: Ids of each prompt before its padding.
    ids: Token `t` of each row.
    t: Index of these tokens in their completions.
    dtype: Of the matrix products.
  """
  x = text.embed(config, params, ids[:, :, None], dtype)
  tables = text.rope_tables(config, (prompt_length + t)[:, None])
  is_global = np.array(config.global_layers)
  num_global = int(is_global.sum())

  def layer(x, number, keys, values, prompt, place, kind):
    """Layer `number`, the `place`-th of its kind; caches updated in place."""
    stack = text.layer_at(config, params, number, is_global=kind)
    q, k, v = text.queries_keys_values(config, stack, x, tables)
    keys = _put(keys, k, place, t)
    values = _put(values, v, place, t)
    prompt_k, prompt_v = (_at(part, place) for part in prompt)
    sees_prompt, sees_own = cache_masks(
      prompt_length,
      num_prompt=prompt_k.shape[2],
      num_own=keys.shape[4],
      t=t,
      window=None if kind else config.sliding_window,
    )

    def read_first(num_own):
      return attention.attend_cached(
        q[:, :, 0],
        (_at(keys, place, num_own), _at(values, place, num_own)),
        (prompt_k, prompt_v),
        sees_own=sees_own[:num_own],
        sees_prompt=sees_prompt,
      )

    read = _as_far_as_written(read_first, keys.shape[4], t)
    return text.after_attention(stack.params, x, read[:, :, None]), keys, values

  def locals_between(first, end, before, carry):
    """Layers `first` to `end`, all local, after `before` global ones."""

    def one(number, carry):
      x, keys, values = carry
      prompt = (cache.local_prompt_k, cache.local_prompt_v)
      place = number - before
      return layer(x, number, keys, values, prompt, place, False)

    return jax.lax.fori_loop(first, end, one, carry)

  def period(carry, scanned):
    x, keys, values, local_keys, local_values = carry
    place, first, number = scanned
    x, local_keys, local_values = locals_between(
      first, number, place, (x, local_keys, local_values)
    )
    prompt = (cache.prompt_k, cache.prompt_v)
    x, keys, values = layer(x, number, keys, values, prompt, place, True)
    return (x, keys, values, local_keys, local_values), None

  numbers = np.flatnonzero(is_global)
  firsts = np.concatenate([[0], numbers + 1])
  carry = (x, cache.k, cache.v, cache.local_k, cache.local_v)
  if num_global:
    scanned = (np.arange(num_global), firsts[:-1], numbers)
    carry, _ = jax.lax.scan(
      period, carry, jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), scanned)
    )
  x, keys, values, local_keys, local_values = carry
  if firsts[-1] < config.num_layers:
    x, local_keys, local_values = locals_between(
      int(firsts[-1]),
      config.num_layers,
      num_global,
      (x, local_keys, local_values),
    )
  states = text.rms_norm(params["final_norm"], x)[:, :, 0]
  return states, cache.replace(
    k=keys, v=values, local_k=local_keys, local_v=local_values
  )


def cache_masks(
  prompt_length: Int[Array, " U"],
  *,
  num_prompt: int,
  num_own: int,
  t: Int[Array, ""],
  window: int | None,
) -> tuple[Array, Array]:
  """Which cached tokens of the prompt and of its own row token `t` sees.

  A ring of `num_own` slots holds the newest tokens; slot `s` the newest whose
  index is `s` modulo that. So all it holds is within the window.

  Args:
    prompt_length: Tokens of each prompt before its padding.
    num_prompt: Cached ones: the first so many, or, if fewer than the prompt
      has, the last.
    num_own: Slots of the row's own cache.
    t: Index of the token in its completion.
    window: Reach in positions; None for any.

  Returns:
    Bools `[U, num_prompt]` and `[num_own]`.
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


def _as_far_as_written(
  read: Callable[[int], Array], num_own: int, t: Int[Array, ""]
) -> Array:
  """What `read` finds in the first quarters of the slots, as many as hold any.

  Which they are depends on `t` alone, as all else here does.
  """
  quarters = sorted({-(-num_own * i // 4) for i in (1, 2, 3, 4)})
  number = sum((t >= end).astype(jnp.int32) for end in quarters[:-1])
  return jax.lax.switch(
    number, [functools.partial(read, end) for end in quarters]
  )


def _at(stacked: Array, place: Array, num_slots: int | None = None) -> Array:
  """A layer's part of a cache, of which the first slots may do."""
  start = (place, *(jnp.zeros_like(place) for _ in stacked.shape[1:]))
  size = [1, *stacked.shape[1:]]
  if num_slots is not None:
    size[4] = num_slots
  return jax.lax.dynamic_slice(stacked, start, size)[0]


def _put(cache: Array, new: Array, place: Array, t: Array) -> Array:
  """Writes `new [U, C, 1, K, H]` at a layer and a token of the cache."""
  new = new.swapaxes(2, 3)[None]  # [1, U, C, K, 1, H]
  zero = jnp.zeros_like(t)
  slot = t % cache.shape[4]
  start = (place.astype(t.dtype), zero, zero, zero, slot, zero)
  return jax.lax.dynamic_update_slice(cache, new, start)
