"""The parameter tree: its shapes, random values, and files to load and save.

The layers of the decoder are stacked along a leading axis, and so are those of
the image tower, so that one scan runs them all. Names and axes within a layer
are those of the `gemma` library; norms hold the deviation of their scale from
one.
"""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from grpo_tpu.models.gemma3 import config as gemma3_config
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
  text = _text_shapes(config)
  shapes = {name: _cast_shapes(tree, dtype) for name, tree in text.items()}
  if config.vision:
    shapes |= {"vision_encoder": _vision_shapes(config.vision)}
    shapes["embedder"] |= {
      "mm_soft_embedding_norm": {"scale": _f32(config.vision.width)},
      "mm_input_projection": _f32(config.vision.width, config.embed_dim),
    }
  return shapes


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
    std = _fan_in(name, shape.shape) ** -0.5
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


# Functions of a config and a path, by the scheme of `model.weights`. Each
# refuses files of another model without a device. The `load` method of the
# result takes shapes, types and shardings, and returns the tree.
OPENERS = {"hf": open_hf, "gemma": _open_gemma, "gguf": gguf.File}


def _f32_params(config: gemma3_config.ModelConfig) -> dict:
  return abstract_params(config, jnp.dtype(jnp.float32))


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
  """Number of terms that a product with this matrix sums."""
  leaf = name.rsplit("/", 1)[-1]
  match leaf:
    case "input_embedding" | "pos_embedding":
      return shape[-1]
    case "q_einsum" | "kv_einsum":
      return shape[-2]
    case "gating_einsum":
      return shape[-1]
    case "attn_vec_einsum":
      return shape[-3] * shape[-2]
    case "linear" | "mm_input_projection":
      return shape[-2]
  # Kernels of the image tower: [layers, in..., out...].
  parent = name.rsplit("/", 2)[-2]
  match parent:
    case "embedding":
      return math.prod(shape[:-1])
    case "query" | "key" | "value":
      return shape[-3]
    case "out":
      return shape[-3] * shape[-2]
    case "mlp_in" | "mlp_out":
      return shape[-2]
  raise AssertionError(f"no rule for {name}")


def _text_shapes(config: gemma3_config.ModelConfig) -> dict:
  layers, d, f = config.num_layers, config.embed_dim, config.hidden_dim
  q, k, h = config.num_heads, config.num_kv_heads, config.head_dim
  return {
    "embedder": {"input_embedding": _f32(config.vocab_size, d)},
    "layers": {
      "pre_attention_norm": {"scale": _f32(layers, d)},
      "attn": {
        "q_einsum": _f32(layers, q, d, h),
        "kv_einsum": _f32(layers, 2, k, d, h),
        "query_norm": {"scale": _f32(layers, h)},
        "key_norm": {"scale": _f32(layers, h)},
        "attn_vec_einsum": _f32(layers, q, h, d),
      },
      "post_attention_norm": {"scale": _f32(layers, d)},
      "pre_ffw_norm": {"scale": _f32(layers, d)},
      "mlp": {
        "gating_einsum": _f32(layers, 2, f, d),
        "linear": _f32(layers, f, d),
      },
      "post_ffw_norm": {"scale": _f32(layers, d)},
    },
    "final_norm": {"scale": _f32(d)},
  }


def _vision_shapes(config: gemma3_config.VisionConfig) -> dict:
  layers, d, f = config.depth, config.width, config.mlp_dim
  q, h = config.num_heads, config.width // config.num_heads
  patch, side = config.patch_size, config.image_size // config.patch_size
  projection = {"kernel": _f32(layers, d, q, h), "bias": _f32(layers, q, h)}
  norm = {"scale": _f32(layers, d), "bias": _f32(layers, d)}
  return {
    "embedding": {"kernel": _f32(patch, patch, 3, d), "bias": _f32(d)},
    "pos_embedding": _f32(1, side * side, d),
    "layers": {
      "attention_norm": norm,
      "query": projection,
      "key": projection,
      "value": projection,
      "out": {"kernel": _f32(layers, q, h, d), "bias": _f32(layers, d)},
      "mlp_norm": norm,
      "mlp_in": {"kernel": _f32(layers, d, f), "bias": _f32(layers, f)},
      "mlp_out": {"kernel": _f32(layers, f, d), "bias": _f32(layers, d)},
    },
    "norm": {"scale": _f32(d), "bias": _f32(d)},
  }


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _cast_shapes(tree: dict, dtype: jnp.dtype) -> dict:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
