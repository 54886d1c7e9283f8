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
  """The product of `score/w` and the state after the last token, in fp32.

  As transformers' `Gemma3ForSequenceClassification` scores a whole sequence. A
  completion without tokens has the score of its prompt. The arrays are those of
  `text.bundle_states`; the gradient flows to `params`.
  """
  positions = jnp.arange(1, completion_mask.shape[2] + 1)[None, None]
  states = text.bundle_states(
    *(forward.config, params, prompt_ids, prompt_length, images),
    completion_ids,
    dtype=forward.dtype,
    remat=forward.remat,
    vision_remat=forward.vision_remat,
    implementation=forward.attention,
    completion_length=jnp.max(positions * completion_mask, axis=2),
  )
  return jnp.einsum(
    "ucd,od->uc",
    states[:, :, 0].astype(jnp.float32),
    params["score"]["w"].astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
