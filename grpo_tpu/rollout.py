"""Completions of prompts, sampled by the policy that is being trained.

A prompt, with its image, runs through the network once; its completions decode
over the shared cache until every row has stopped.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from data_pipelines import tokenizer
from grpo_tpu import logprobs, sampling
from grpo_tpu.gemma3 import config as gemma3_config
from grpo_tpu.gemma3 import text


class Completions(flax.struct.PyTreeNode):
  """What was sampled.

  Attributes:
    ids: Tokens up to and including the stop token; padding after.
    mask: True on sampled tokens, the stop token included.
    logps: Log-probability of each token as the sampler saw it; 0 on padding.
    stopped: Whether a stop token came before the length ran out.
  """

  ids: Int[Array, "U C T"]
  mask: Bool[Array, "U C T"]
  logps: Float[Array, "U C T"]
  stopped: Bool[Array, "U C"]


def no_poll() -> None:
  """For callers that nothing can interrupt."""


@functools.partial(
  jax.jit,
  static_argnames=(
    "config",
    "num_completions",
    "max_new_tokens",
    "temperature",
    "dtype",
    "attention",
    "banned_ids",
  ),
)
def rollout(
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: UInt8[Array, "U I height width 3"],
  prompt_index: Int[Array, " U"],
  step_key: Key[Array, ""],
  *,
  config: gemma3_config.ModelConfig,
  num_completions: int,
  max_new_tokens: int,
  temperature: float,
  dtype: jnp.dtype,
  attention: str = "einsum",
  banned_ids: tuple[int, ...] = (),
) -> Completions:
  """Samples `num_completions` completions of each prompt.

  Args:
    params: The policy.
    prompt_ids: Right-padded ids.
    prompt_length: Ids before the padding.
    images: Pictures of each prompt, in the order of their placeholders.
    prompt_index: Each prompt's place in the step's whole batch.
    step_key: The run's key folded with the step.
    config: The model's sizes.
    num_completions: Rows per prompt (`C`).
    max_new_tokens: Tokens per row at most (`T`).
    temperature: Logits are divided by it; 0 takes the likeliest token.
    dtype: Of the matrix products.
    attention: Of the prompts, from `gemma3.attention.implementation`; a token
      at a time reads the cache by einsum.
    banned_ids: Never drawn, and in no probability; see `logprobs.logits_of`.
  """
  embedding = params["embedder"]["input_embedding"]
  keys = sampling.row_keys(step_key, prompt_index, num_completions)
  state, cache = text.prefill(
    config,
    params,
    prompt_ids,
    prompt_length,
    images,
    num_completions=num_completions,
    max_new_tokens=max_new_tokens,
    dtype=dtype,
    implementation=attention,
  )
  state = jnp.broadcast_to(state[:, None], (*keys.shape, state.shape[-1]))

  def extend(completions: Completions, state, t) -> Completions:
    """Draws token `t` of every row that has not stopped."""
    logits = logprobs.logits_of(
      state,
      embedding,
      temperature=temperature or 1.0,
      banned_ids=banned_ids,
    )
    ids = (
      sampling.sample(logits, keys, t)
      if temperature
      else sampling.greedy(logits)
    )
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    logps = chosen - jax.nn.logsumexp(logits, axis=-1)
    stopped = completions.stopped
    ids = jnp.where(stopped, tokenizer.PAD, ids)
    return Completions(
      ids=completions.ids.at[:, :, t].set(ids),
      mask=completions.mask.at[:, :, t].set(~stopped),
      logps=completions.logps.at[:, :, t].set(jnp.where(stopped, 0.0, logps)),
      stopped=stopped | jnp.isin(ids, jnp.asarray(tokenizer.STOP_IDS)),
    )

  def unfinished(carry):
    t, completions, _ = carry
    return (t + 1 < max_new_tokens) & ~jnp.all(completions.stopped)

  def step(carry):
    t, completions, cache = carry
    ids = completions.ids[:, :, t]
    state, cache = text.decode(
      config, params, cache, prompt_length, ids, t, dtype=dtype
    )
    return t + 1, extend(completions, state, t + 1), cache

  shape = (*keys.shape, max_new_tokens)
  empty = Completions(
    ids=jnp.full(shape, tokenizer.PAD, jnp.int32),
    mask=jnp.zeros(shape, bool),
    logps=jnp.zeros(shape, jnp.float32),
    stopped=jnp.zeros(keys.shape, bool),
  )
  start = jnp.zeros((), jnp.int32)
  _, completions, _ = jax.lax.while_loop(
    unfinished, step, (start, extend(empty, state, start), cache)
  )
  return completions
