"""The parameter tree: its shapes, random values, and files to load and save.

The layers of the decoder are stacked along a leading axis, and so are those of
the image tower, so that one scan runs them all. Names and axes within a layer
are those of the `gemma` library; norms hold the deviation of their scale from
one.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3.convert import (
  assembly,
  gguf,
  huggingface,
  huggingface_config,
  orbax_gemma,
)


def abstract_params(
  config: gemma3_config.ModelConfig, dtype: jnp.dtype
) -> dict:
  """The tree as shapes; allocates nothing.

  Args:
    config: Sizes of the network.
    dtype: Type of the decoder. Image tower and projector stay in fp32, as
      released.
  """
  sizes, tower_sizes = _decoder_sizes(config), {}
  if config.vision:
    sizes["w"] = config.vision.width
    tower_sizes = _tower_sizes(config.vision)
  tree = {}
  for path, leaf in leaves.LEAVES.items():
    in_tower, in_projector = path.startswith("vision_encoder/"), "/mm_" in path
    if config.vision or not (in_tower or in_projector):
      length = tower_sizes if in_tower else sizes
      tree[path] = jax.ShapeDtypeStruct(
        tuple(length[axis] for axis in leaf.axes),
        jnp.float32 if in_tower or in_projector else dtype,
      )
  return traverse_util.unflatten_dict(tree, sep="/")


def _decoder_sizes(config: gemma3_config.ModelConfig) -> dict[str, int]:
  """Length of each axis of `leaves.toml` in the decoder."""
  return {
    "l": config.num_layers,
    "n": 2,
    "d": config.embed_dim,
    "f": config.hidden_dim,
    "q": config.num_heads,
    "k": config.num_kv_heads,
    "h": config.head_dim,
    "v": config.vocab_size,
  }


def _tower_sizes(config: gemma3_config.VisionConfig) -> dict[str, int]:
  """Length of each axis of `leaves.toml` in the image tower."""
  return {
    "l": config.depth,
    "n": 1,
    "w": config.width,
    "f": config.mlp_dim,
    "q": config.num_heads,
    "h": config.width // config.num_heads,
    "s": (config.image_size // config.patch_size) ** 2,
    "y": config.patch_size,
    "x": config.patch_size,
    "c": 3,
  }


def random_params(
  config: gemma3_config.ModelConfig, seed: int, dtype: jnp.dtype
) -> dict:
  """A random tree from NumPy; a leaf's values depend on its path and the seed.

  Matrices are normal; their variance is one over the number of terms that they
  sum. The embedding has variance `1 / D`, so that its scaled lookups and its
  logits both have variance one.

  Args:
    config: Sizes of the network.
    seed: A non-negative integer.
    dtype: Type of the decoder.
  """

  def draw(path, shape):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("bias"):
      return np.zeros(shape.shape, shape.dtype)
    if name.endswith("scale"):
      # LayerNorm multiplies by its scale, RMSNorm by one plus its scale.
      is_layer_norm = name.startswith("vision_encoder")
      return np.full(shape.shape, float(is_layer_norm), shape.dtype)
    rng = np.random.default_rng([seed, *name.encode()])
    leaf = leaves.LEAVES[name]
    std = leaf.fan_in(leaf.sizes(shape.shape)) ** -0.5
    return (rng.standard_normal(shape.shape, np.float32) * std).astype(
      shape.dtype
    )

  return jax.tree_util.tree_map_with_path(draw, abstract_params(config, dtype))


def from_hf(
  directory: str | os.PathLike[str],
) -> tuple[gemma3_config.ModelConfig, dict]:
  """Loads a Hugging Face checkpoint to the first device, in its decoder's type.

  Image tower and projector are in fp32, as everywhere.

  Args:
    directory: A folder with config.json and *.safetensors.

  Raises:
    ValueError: If the config is not one of Gemma 3, or the tensors are not
      those of the config.
  """
  config = huggingface_config.read(directory)
  checkpoint = huggingface.Checkpoint(directory, _f32_params(config))
  abstract = abstract_params(config, checkpoint.dtype)
  return config, checkpoint.load(assembly.on_one_device(abstract))


def open_hf(
  config: gemma3_config.ModelConfig, directory: str | os.PathLike[str]
) -> huggingface.Checkpoint:
  """Opens a Hugging Face checkpoint of a known model.

  Checks config.json and the headers without a device. Rows of the embedding
  from the image placeholder's on, which transformers adds, are never loaded.

  Raises:
    ValueError: If sizes or tensors are not those of `config`; names each.
  """
  if differences := huggingface_config.differences(directory, config):
    raise ValueError(
      f"{directory} holds a model of other sizes: {', '.join(differences)}."
    )
  return huggingface.Checkpoint(directory, _f32_params(config))


def _open_gemma(
  config: gemma3_config.ModelConfig, path: str | os.PathLike[str]
) -> orbax_gemma.Checkpoint:
  return orbax_gemma.Checkpoint(path, config, _f32_params(config))


def _open_gguf(
  config: gemma3_config.ModelConfig, path: str | os.PathLike[str]
) -> gguf.File:
  return gguf.File(path, config, _f32_params(config))


# Functions of a config and a path, by the scheme of `model.weights`. Each
# refuses files of another model without a device. The `load` method of the
# result takes shapes, types and shardings, and returns the tree.
OPENERS = {"hf": open_hf, "gemma": _open_gemma, "gguf": _open_gguf}


def _f32_params(config: gemma3_config.ModelConfig) -> dict:
  return abstract_params(config, jnp.dtype(jnp.float32))
