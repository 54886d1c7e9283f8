"""Decoding against the training pass, and its masks against plain ones."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.models.gemma3 import attention, decoding, text

pytestmark = pytest.mark.usefixtures("quick_compile")
LENGTHS = np.array([14, 10, 11])
NUM_COMPLETIONS, NUM_TOKENS = 2, 9


def random_params(tiny, num_layers):
  """The tiny model with random norms and another number of layers."""
  rng = np.random.default_rng(num_layers)

  def changed(path, x):
    if path[0].key == "layers":
      x = jnp.concatenate([x] * 3)[:num_layers]
    return x + rng.normal(0, 0.2, x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(changed, tiny.params)


@pytest.mark.parametrize(
  ("num_layers", "window"),
  [(6, 6), (9, 4), (13, 11), (5, 6), (6, 32)],
  ids=["short", "tail", "shorter_than_prompts", "all_local", "long"],
)
def test_decoding_from_the_cache_equals_the_training_pass(
  tiny, num_layers, window
):
  """Teacher-forced: the state before token t is that of `bundle_states`."""
  config = dataclasses.replace(
    tiny.config, num_layers=num_layers, sliding_window=window
  )
  params = random_params(tiny, num_layers)
  prompts = tiny.prompts(len(LENGTHS))
  prompts = (prompts[0], jnp.asarray(LENGTHS), prompts[2])
  shape = (len(LENGTHS), NUM_COMPLETIONS, NUM_TOKENS)
  completions = jnp.asarray(np.random.default_rng(1).integers(110, 130, shape))
  expected = jax.jit(
    functools.partial(
      text.bundle_states, config, dtype=jnp.float32, remat="none"
    )
  )(params, *prompts, completions)
  state, cache = jax.jit(
    functools.partial(
      decoding.prefill,
      config,
      num_completions=NUM_COMPLETIONS,
      max_new_tokens=NUM_TOKENS,
      dtype=jnp.float32,
    )
  )(params, *prompts)
  np.testing.assert_allclose(state, expected[:, 0, 0], rtol=1e-4, atol=1e-4)
  decode = jax.jit(
    functools.partial(decoding.decode, config, dtype=jnp.float32)
  )
  for t in range(NUM_TOKENS - 1):
    state, cache = decode(
      params, cache, prompts[1], completions[:, :, t], jnp.asarray(t)
    )
    np.testing.assert_allclose(
      state, expected[:, :, t + 1], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("window", [2, 3, 5, 8, 30, None])
def test_a_ring_shows_the_same_tokens_as_a_full_cache(window):
  """Slot by slot, with the tokens that were written there."""
  num_prompt, num_own = 12, 11
  lengths = np.array([12, 7, 1, 3])
  reach = num_prompt if window is None else min(num_prompt, window - 1)
  ring = num_own if window is None else min(num_own, window)
  held = np.full(ring, -1)
  for t in range(num_own):
    held[t % ring] = t
    to_prompt, to_own = map(
      np.asarray,
      decoding.cache_masks(
        jnp.asarray(lengths),
        num_prompt=reach,
        num_own=ring,
        t=jnp.asarray(t),
        window=window,
      ),
    )
    plain_prompt, plain_own = attention.completion_masks(
      jnp.asarray(lengths),
      num_prompt,
      jnp.asarray([t]),
      num_own,
      jnp.asarray(2**30 if window is None else window),
    )
    seen = sorted(held[to_own])
    np.testing.assert_array_equal(seen, np.flatnonzero(plain_own[0, 0, 0]))
    for row, length in enumerate(lengths):
      kept = max(length - reach, 0) + np.arange(reach)
      np.testing.assert_array_equal(
        kept[to_prompt[row]], np.flatnonzero(plain_prompt[row, 0, 0])
      )


def cache_bytes(
  config, *, num_prompts, prompt_length, num_completions, max_new_tokens, dtype
):
  """Bytes of a cache: the part of prompts, and that of completions."""
  num_global = sum(config.global_layers)
  num_local = config.num_layers - num_global
  token = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
  reach = min(prompt_length, config.sliding_window - 1)
  ring = min(max_new_tokens, config.sliding_window)
  prompt = num_prompts * (num_global * prompt_length + num_local * reach)
  own = num_global * max_new_tokens + num_local * ring
  return prompt * token, num_prompts * num_completions * own * token


@pytest.mark.parametrize("window", [5, 40])
def test_cache_bytes_match_and_prompts_do_not_depend_on_the_group_size(
  tiny, window
):
  """Compared with the compiled results, for several group sizes and lengths."""
  config = dataclasses.replace(tiny.config, sliding_window=window)
  prompts = tiny.prompts(4)
  prompt_parts = set()
  for completions, tokens in itertools.product((1, 8), (3, 50)):
    sizes = {"num_completions": completions, "max_new_tokens": tokens}
    compiled = (
      jax.jit(
        functools.partial(decoding.prefill, config, dtype=jnp.bfloat16, **sizes)
      )
      .lower(tiny.params, *prompts)
      .compile()
    )
    state, cache = compiled.out_info
    prompt, own = cache_bytes(
      config,
      num_prompts=4,
      prompt_length=14,
      dtype=jnp.bfloat16,
      **sizes,
    )
    counted = {
      name: leaf.size * leaf.dtype.itemsize
      for name, leaf in vars(cache).items()
    }
    in_prompt = sum(n for name, n in counted.items() if "prompt" in name)
    assert (in_prompt, sum(counted.values()) - in_prompt) == (prompt, own)
    others = state.size * state.dtype.itemsize
    told = compiled.memory_analysis().output_size_in_bytes
    assert 0 <= told - (prompt + own + others) < 1024  # Pointers of a tuple.
    prompt_parts.add(prompt)
  assert len(prompt_parts) == 1
