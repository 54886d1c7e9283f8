"""The parameter tree: its shapes, how it is drawn, and the files it fits.

The decoder's layers are stacked along a leading axis, as are the tower's, so
that one scan runs them all. Names and axes within a layer are those of the
`gemma` library; norms hold the deviation of their scale from one.
"""

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

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
  """The tree as shapes; nothing is allocated.

  Args:
    config: The model's sizes.
    dtype: Of the decoder. The tower and projector stay in fp32, as released.
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
  """A tree drawn with NumPy; a leaf's values depend on its path and the seed.

  Matrices are normal with variance one over what they sum; the embedding has
  variance `1 / D`, so that both its scaled lookups and its logits have
  variance one.

  Args:
    config: The model's sizes.
    seed: Any non-negative integer.
    dtype: Of the decoder.
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
  """A Hugging Face checkpoint on the first device, in the type of its decoder.

  Tower and projector come in fp32, as everywhere.

  Args:
    directory: With config.json and *.safetensors.

  Raises:
    ValueError: The config is not one of Gemma 3, or the tensors are not those
      of the config.
  """
  config = huggingface_config.read(directory)
  checkpoint = huggingface.Checkpoint(
    directory, abstract_params(config, jnp.dtype(jnp.float32))
  )
  place = SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    abstract_params(config, checkpoint.dtype),
  )
  return config, checkpoint.load(abstract)


def open_hf(
  config: gemma3_config.ModelConfig, directory: str | os.PathLike[str]
) -> huggingface.Checkpoint:
  """A Hugging Face checkpoint of a known model, from which `load` reads.

  Looks at config.json and the headers, and touches no device. Rows of the
  embedding from the image placeholder's on, which transformers adds, are left
  in the file.

  Raises:
    ValueError: Sizes or tensors are not those of `config`; each is named.
  """
  if differences := huggingface_config.differences(directory, config):
    raise ValueError(
      f"{directory} holds a model of other sizes: {', '.join(differences)}."
    )
  return huggingface.Checkpoint(
    directory, abstract_params(config, jnp.dtype(jnp.float32))
  )


def to_hf(
  config: gemma3_config.ModelConfig,
  params: dict,
  directory: str | os.PathLike[str],
  *,
  dtype: Any = None,
  tokenizer_dir: str | os.PathLike[str] | None = None,
) -> None:
  """Writes a checkpoint that transformers loads and that gives these logits.

  Args:
    config: The model's sizes.
    params: Its parameters, wherever they lie.
    directory: A folder without a checkpoint; made if missing.
    dtype: Of all tensors; None keeps that of each.
    tokenizer_dir: Whose tokenizer and processor files are copied, if any.

  Raises:
    ValueError: `directory` holds a checkpoint.
  """
  huggingface.save(
    config,
    params,
    directory,
    dtype=None if dtype is None else np.dtype(dtype),
    tokenizer_dir=tokenizer_dir,
  )


def from_gemma(
  path: str | os.PathLike[str],
  *,
  config: gemma3_config.ModelConfig | None = None,
  dtype: Any = jnp.float32,
  place: assembly.Place = assembly.on_one_device,
) -> tuple[gemma3_config.ModelConfig, dict]:
  """The model of a `gemma` library checkpoint; see `released.Checkpoint`.

  Args:
    path: The checkpoint's folder, here or on gs://.
    config: What it must hold; None finds the released size that it is.
    dtype: Of the decoder.
    place: Gives the shapes of the tree their shardings.

  Returns:
    The sizes, and the tree on its devices.

  Raises:
    ValueError: It cannot be read as that model; lists every fault.
  """
  checkpoint = orbax_gemma.Checkpoint(path, config)
  abstract = abstract_params(checkpoint.config, jnp.dtype(dtype))
  checkpoint.check(abstract)
  tree = assembly.assembled(place(abstract), checkpoint.read)
  return checkpoint.config, tree


def from_gguf(
  path: str | os.PathLike[str],
  *,
  config: gemma3_config.ModelConfig | None = None,
  dtype: Any = jnp.float32,
  place: assembly.Place = assembly.on_one_device,
) -> tuple[gemma3_config.ModelConfig, dict]:
  """The model of a GGUF file, of a text size; see `gguf.File`.

  Args:
    path: The file, on this machine.
    config: What the file must hold; None takes what it says.
    dtype: Of the decoder.
    place: Gives the shapes of the tree their shardings.

  Returns:
    The sizes, and the tree on its devices.

  Raises:
    ValueError: The file cannot be read as that model; lists every fault.
  """
  file = gguf.File(path, config)
  abstract = place(abstract_params(file.config, jnp.dtype(dtype)))
  return file.config, assembly.assembled(abstract, file.read)


class _Opened(NamedTuple):
  """Files that have been checked, to be read a piece at a time."""

  read: assembly.Read

  def load(self, abstract: dict) -> dict:
    """The tree of these shapes, types and places."""
    return assembly.assembled(abstract, self.read)


def _open_gemma(
  config: gemma3_config.ModelConfig, path: str | os.PathLike[str]
) -> _Opened:
  checkpoint = orbax_gemma.Checkpoint(path, config)
  checkpoint.check(abstract_params(config, jnp.dtype(jnp.float32)))
  return _Opened(checkpoint.read)


def _open_gguf(
  config: gemma3_config.ModelConfig, path: str | os.PathLike[str]
) -> _Opened:
  return _Opened(gguf.File(path, config).read)


# By the scheme of `model.weights`, what opens the files it names: it refuses
# those of another model before a device is touched, and its `load` reads.
OPENERS = {"hf": open_hf, "gemma": _open_gemma, "gguf": _open_gguf}


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
  """How many terms a product with this matrix sums."""
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
  # Kernels of the tower: [layers, in..., out...].
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
