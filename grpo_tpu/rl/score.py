"""Log-probabilities of a batch's completions under given parameters.

The policy, the old policy and the reference are all scored here, and so are
completions by a reward model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_tpu.distributed import sharding
from grpo_tpu.models import logprobs, scores
from grpo_tpu.models.gemma3 import embedding, text
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl import pictures
from grpo_tpu.rl.train_batch import TrainBatch


def token_states(
  forward: ForwardConfig, params: dict, batch: TrainBatch
) -> Float[Array, "U C T D"]:
  """The final states that predict the completion tokens."""
  return text.bundle_states(
    forward.config,
    params,
    batch.prompt_ids,
    batch.prompt_length,
    batch.images,
    batch.completion_ids,
    dtype=forward.dtype,
    remat=forward.remat,
    vision_remat=forward.vision_remat,
    implementation=forward.attention,
  )


def token_logps(
  forward: ForwardConfig,
  params: dict,
  batch: TrainBatch,
  teacher_embedding: Float[Array, "V E"] | None = None,
) -> tuple[Float[Array, "U C T"], ...]:
  """Log-probability of each completion token, and the entropy at its position.

  With the output embedding of a teacher, whose states the batch has, also the
  KL to the teacher. Sampled completions are scored as the sampler drew them,
  with its temperature and without early stop tokens, others at temperature 1.
  Differentiable in `params`.
  """
  is_early = None
  if batch.is_sampled and forward.min_new_tokens:
    # There the sampler could not draw a stop token.
    shape = batch.completion_ids.shape
    is_early = jnp.arange(shape[-1]) < forward.min_new_tokens
    is_early = jnp.broadcast_to(is_early[None, None], shape)
  teacher = None
  if teacher_embedding is not None:
    assert batch.teacher_states is not None
    teacher = batch.teacher_states, teacher_embedding
  return logprobs.sharded_per_token_logps(
    token_states(forward, params, batch),
    batch.completion_ids,
    embedding.output_embedding(params),
    temperature=forward.temperature if batch.is_sampled else 1.0,
    chunk_size=forward.chunk_size,
    banned_ids=forward.banned_ids,
    is_early=is_early,
    teacher=teacher,
  )


def completion_scores(
  forward: ForwardConfig, params: dict, batch: TrainBatch
) -> Float[Array, "U C"]:
  """The reward model's score of each completion, in fp32."""
  return scores.scores(
    *(forward, params, batch.prompt_ids, batch.prompt_length, batch.images),
    *(batch.completion_ids, batch.completion_mask),
  )


@functools.partial(
  jax.jit, static_argnames=("num_microbatches", "gives_states")
)
def score_batch(
  forward: ForwardConfig,
  params: dict,
  batch: TrainBatch,
  *,
  num_microbatches: int,
  gives_states: bool = False,
) -> Any:
  """`token_logps` of a whole batch, without gradient, part after part.

  Of a model with a score, `completion_scores` instead; of a teacher that
  `gives_states`, `token_states`. `num_microbatches` divides the bundles.
  """
  batch, _ = pictures.encode(forward, params, batch, num_microbatches)
  of_part = completion_scores if forward.config.has_score else token_logps
  of_part = token_states if gives_states else of_part

  _, parts = jax.lax.scan(
    lambda _, micro: (None, of_part(forward, params, micro)),
    None,
    sharding.microbatches(batch, num_microbatches),
  )
  return jax.tree.map(sharding.whole_batch, parts)
