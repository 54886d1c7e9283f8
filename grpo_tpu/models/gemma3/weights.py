"""The parameter tree: its shapes, random values, and files to load and save.

The layers of the decoder are stacked along a leading axis, and so are those of
the image tower, so that one scan runs them all. Names and axes within a layer
are those of the `gemma` library; norms hold the deviation of their scale from
one.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3.convert import (
  gguf,
  huggingface,
  huggingface_config,
  orbax_gemma,
)


def abstract_params(
  config: gemma3_config.ModelConfig, dtype: jnp.dtype
) -> dict:
  """The tree as shapes, with the decoder in `dtype`.

  Image tower and projector stay in fp32, as released, and so does a head.
  """
  # The length of each axis of `leaves.toml`.
  sizes = {
    "l": config.num_layers,
    "n": 2,
    "d": config.embed_dim,
    "f": config.hidden_dim,
    "q": config.num_heads,
    "k": config.num_kv_heads,
    "h": config.head_dim,
    "v": config.vocab_size,
    "o": 1,
  }
  tower_sizes = {}
  if tower := config.vision:
    sizes["w"] = tower.width
    tower_sizes = {
      "l": tower.depth,
      "n": 1,
      "w": tower.width,
      "f": tower.mlp_dim,
      "q": tower.num_heads,
      "h": tower.width // tower.num_heads,
      "s": (tower.image_size // tower.patch_size) ** 2,
      "y": tower.patch_size,
      "x": tower.patch_size,
      "c": 3,
    }
  tree = {}
  for path, leaf in leaves.LEAVES.items():
    in_tower, in_projector = path.startswith("vision_encoder/"), "/mm_" in path
    is_score = path.startswith("score/")
    if is_score and not config.has_score:
      continue
    if config.vision or not (in_tower or in_projector):
      length = tower_sizes if in_tower else sizes
      tree[path] = jax.ShapeDtypeStruct(
        tuple(length[axis] for axis in leaf.axes),
        jnp.float32 if in_tower or in_projector or is_score else dtype,
      )
  return traverse_util.unflatten_dict(tree, sep="/")


def random_params(
  config: gemma3_config.ModelConfig, seed: int, dtype: jnp.dtype
) -> dict:
  """A random tree from NumPy; a leaf's values depend on its path and the seed.

  Matrices are normal; their variance is one over the number of terms that they
  sum. The embedding has variance `1 / D`, so that its scaled lookups and its
  logits both have variance one. The head of a reward model is zero.
  """
  tree = {}
  for path, shape in leaves.by_path(abstract_params(config, dtype)).items():
    leaf = leaves.LEAVES[path]
    if leaf.summed and not path.startswith("score/"):
      rng = np.random.default_rng([seed, *path.encode()])
      std = leaf.fan_in(leaf.sizes(shape.shape)) ** -0.5
      values = rng.standard_normal(shape.shape, np.float32) * std
    else:
      # LayerNorm multiplies by its scale, RMSNorm by one plus its scale.
      is_factor = path.startswith("vision_encoder") and path.endswith("scale")
      values = np.full(shape.shape, float(is_factor))
    tree[path] = values.astype(shape.dtype)
  return traverse_util.unflatten_dict(tree, sep="/")


def open_files(
  scheme: str, config: gemma3_config.ModelConfig, path: str | os.PathLike[str]
) -> huggingface.Checkpoint | orbax_gemma.Checkpoint | gguf.File:
  """Opens another program's files, which `model.weights` names as SCHEME:PATH.

  Needs no device. The `load` method of the result takes shapes, types and
  shardings, and returns the tree, which has a head if `has_head` is true.

  Raises:
    ValueError: They hold another model than that of `config`.
  """
  readers = {
    "hf": huggingface.Checkpoint,
    "gemma": orbax_gemma.Checkpoint,
    "gguf": gguf.File,
  }
  config = dataclasses.replace(config, has_score=has_head(scheme, path))
  shapes = abstract_params(config, jnp.dtype(jnp.float32))
  return readers[scheme](path, config, shapes)


def has_head(scheme: str, path: str | os.PathLike[str]) -> bool:
  """True if the files of another program hold a reward model."""
  return scheme == "hf" and huggingface_config.read(path).has_score
