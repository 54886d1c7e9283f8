"""Logits of whole rows, to compare with other implementations of Gemma 3."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import embedding, text


def logits(
  config: gemma3_config.ModelConfig,
  params: dict,
  tokens: Int[np.ndarray, "B L"],
  images: UInt8[np.ndarray, "B I height width 3"] | None = None,
) -> Float[Array, "B L V"]:
  """Logits after each token of whole rows, in fp32.

  Args:
    config: Sizes of the network.
    params: The stacked tree of `weights`.
    tokens: Ids, right-padded with `GEMMA3.pad`. With images, each
      `config.vision.start_of_image` stands for an image's whole block: a blank
      line, start, soft tokens, end, a blank line, as in the released models.
      Logits at such a token are those after the block's first blank line.
    images: Pixels at the size of the tower. A row reads as many as it names;
      the rest is ignored.

  Raises:
    ValueError: If a row names more images than there are, or the model has no
      image tower.
  """
  tokens = np.asarray(tokens)
  if images is None:
    images = np.zeros((len(tokens), 0, 1, 1, 3), np.uint8)
  elif config.vision is None:
    raise ValueError("images must be None for a model without a vision tower.")
  ids, length, position = _expand_images(config, tokens, images.shape[1])
  return _logits(config, params, ids, length, jnp.asarray(images), position)


def _expand_images(
  config: gemma3_config.ModelConfig, tokens: np.ndarray, num_images: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Padded ids, their lengths, and the new position of each of `tokens`."""
  vision = config.vision if num_images else None
  rows, lengths = [], []
  position = np.zeros(tokens.shape, np.int32)
  for row, new in zip(tokens.tolist(), position, strict=True):
    ids: list[int] = []
    named = 0
    for i, token in enumerate(row):
      new[i] = len(ids)
      if vision and token == vision.start_of_image:
        named += 1
        soft = [GEMMA3.image_placeholder] * vision.soft_tokens
        block = [token, *soft, vision.end_of_image]
        ids += [GEMMA3.blank_line, *block, GEMMA3.blank_line]
      else:
        ids.append(token)
    if named > num_images:
      raise ValueError(
        f"tokens name {named} images in a row, and images has {num_images}."
      )
    rows.append(ids)
    length = len(ids)
    while length > 1 and ids[length - 1] == GEMMA3.pad:
      length -= 1
    lengths.append(length)
  padded = np.full((len(rows), max(map(len, rows))), GEMMA3.pad, np.int32)
  for out, ids in zip(padded, rows, strict=True):
    out[: len(ids)] = ids
  return padded, np.array(lengths, np.int32), position


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, ids, length, images, position):
  with jax.default_matmul_precision("highest"):
    states, _, _ = text.prompt_states(
      config, params, ids, length, images, dtype=jnp.dtype(jnp.float32)
    )
    states = jnp.take_along_axis(states, position[..., None], axis=1)
    table = embedding.output_embedding(params).astype(jnp.float32)
    return jnp.einsum("bld,vd->blv", states, table)
