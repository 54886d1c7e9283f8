"""The score of each completion under a reward model, in bundles."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_tpu.models.gemma3 import text
from grpo_tpu.models.network import ForwardConfig


def scores(
  forward: ForwardConfig,
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: text.Images,
  completion_ids: Int[Array, "U C T"],
  completion_mask: Bool[Array, "U C T"],
) -> Float[Array, "U C"]:
  """The product of the head and the state at the last token, in fp32.

  Args:
    forward: How the network runs.
    params: A tree with the leaf `score/w`; carries the gradient.
    prompt_ids: Ids, padded on the right, of prompts with an image block each.
    prompt_length: Number of ids before the padding.
    images: Pixels or features, as in `text.prompt_states`.
    completion_ids: Ids, padded on the right.
    completion_mask: True on tokens, False on padding. A completion without
      tokens is scored at the prompt's last token.

  Returns:
    One score per completion, as transformers' `Gemma3ForSequenceClassification`
    gives it for the whole sequence with one label.
  """
  positions = jnp.arange(1, completion_mask.shape[2] + 1)[None, None]
  states = text.final_states(
    forward.config,
    params,
    prompt_ids,
    prompt_length,
    images,
    completion_ids,
    jnp.max(positions * completion_mask, axis=2),
    dtype=forward.dtype,
    remat=forward.remat,
    vision_remat=forward.vision_remat,
    implementation=forward.attention,
  )
  return jnp.einsum(
    "ucd,od->uc",
    states.astype(jnp.float32),
    params["score"]["w"].astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
