"""Reads weights of the text sizes from a GGUF file of llama.cpp.

Tensors are dequantized one by one. A file that asks for arithmetic other than
ours is refused by the name of the key or tensor.

References:
  The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
  The meaning of its keys for Gemma 3: `llm_build_gemma3` of llama.cpp.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3.convert import assembly

_RMS_EPSILON = 1e-6
_LAYERS_OF_27B = 62
# Keys that do not affect the arithmetic.
_IGNORED_KEYS = (
  "context_length",
  "vocab_size",
  "rope.scaling.finetuned",
  "rope.scaling.original_context_length",
)
# Number of elements that are dequantized at a time.
_BLOCK = 1 << 24


class File:
  """A GGUF file whose metadata and tensors have been checked."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    config: gemma3_config.ModelConfig,
    abstract_params: dict,
  ):
    """Checks the metadata of a file on this machine; reads no tensor.

    Raises:
      ValueError: If the `gguf` package is missing, or the file holds another
        model or arithmetic other than ours; or lists every tensor that is
        missing, extra, misshaped or unreadable.
    """
    source = f"GGUF file {os.fspath(path)}"
    self._library, file = _open(path)
    self._tensors = {tensor.name: tensor for tensor in file.tensors}
    fields = {name: field.contents for name, field in file.fields.items()}
    shapes = {name: _shape(x) for name, x in self._tensors.items()}
    found = _read_config(fields, shapes, source)
    if differences := assembly.config_differences(found, config):
      raise ValueError(
        f"{source} must hold the model of model.name, but differs in "
        f"{', '.join(differences)}; set model.name to the size of the file."
      )
    assembly.check_tensors(
      shapes,
      leaves.file_shapes(abstract_params, "gguf"),
      source,
      faults=_unreadable(self._library, self._tensors),
    )

  def load(self, abstract_params: dict) -> dict:
    """Loads the tree with these shapes, types and shardings."""
    return assembly.assemble(abstract_params, self._read)

  def _read(
    self, layer: int | None, pieces: dict[str, jax.ShapeDtypeStruct]
  ) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the given pieces of a layer."""
    for path, piece in pieces.items():
      yield path, self._piece(layer, path, piece)

  def _piece(
    self, layer: int | None, path: str, piece: jax.ShapeDtypeStruct
  ) -> np.ndarray:
    leaf = leaves.LEAVES[path]
    names = [name.format(layer) for name in leaf.gguf]
    if path.endswith("/scale"):
      # Files hold the whole factor; the tree holds its deviation from one.
      return self._dequantize(names[0], np.dtype(np.float32)) - 1
    axes, order = leaf.axes.removeprefix("l"), leaf.file_axes.replace(" ", "")
    sizes = dict(zip(axes, piece.shape, strict=True))
    matrices = [
      self._dequantize(name, piece.dtype)
      .reshape([sizes[axis] for axis in order])
      .transpose([order.index(axis) for axis in axes.removeprefix("n")])
      for name in names
    ]
    return np.stack(matrices) if axes[0] == "n" else matrices[0]

  def _dequantize(self, name: str, dtype: np.dtype) -> np.ndarray:
    """Dequantizes a tensor, a block of rows at a time."""
    tensor = self._tensors[name]
    shape = _shape(tensor)
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    out = np.empty((rows.shape[0], shape[-1]), dtype)
    step = max(1, _BLOCK // shape[-1])
    for start in range(0, rows.shape[0], step):
      block = rows[start : start + step]
      out[start : start + step] = self._library.dequantize(
        block, tensor.tensor_type
      )
    return out.reshape(shape)


def _shape(tensor: Any) -> tuple[int, ...]:
  return tuple(map(int, reversed(tensor.shape)))


def _open(path: str | os.PathLike[str]) -> tuple[Any, Any]:
  """The `gguf` package, and its reader of the file."""
  try:
    import gguf
  except ImportError as error:
    raise ValueError(
      f"GGUF file {os.fspath(path)} must be read with the gguf package, which "
      'is not installed; run pip install "grpo_tpu[export]".'
    ) from error
  try:
    return gguf, gguf.GGUFReader(path)
  # Everything that the reader raises for a file of noise, or one cut short.
  except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
    raise ValueError(
      f"GGUF file {os.fspath(path)} must be a whole GGUF file on this machine, "
      f"but cannot be read: {error}; name another, or fetch it again."
    ) from error


class _Metadata:
  """The keys of a file under `gemma3.`, which `take` removes one by one."""

  def __init__(self, fields: Mapping[str, Callable[[], Any]], source: str):
    self._source = source
    self.rest = {
      name.removeprefix("gemma3."): read()
      for name, read in fields.items()
      if name.startswith("gemma3.")
    }

  def take(self, key: str, default: Any = None) -> Any:
    """Removes a key and returns its value; without default it must exist."""
    value = self.rest.pop(key, default)
    if value is None:
      raise ValueError(
        f"{self._source} must say gemma3.{key}, and does not; convert the "
        "model again."
      )
    return value

  def require(self, holds: bool, name: str, value: Any, rule: str) -> None:
    """Raises a ValueError unless a rule holds."""
    if not holds:
      raise ValueError(
        f"{self._source} has {name} {value!r}, which must be {rule}; this "
        "program computes nothing else, so give the file of a released Gemma 3."
      )


def _read_config(
  fields: Mapping[str, Callable[[], Any]],
  shapes: Mapping[str, tuple[int, ...]],
  source: str,
) -> gemma3_config.ModelConfig:
  """The sizes in the metadata.

  Raises:
    ValueError: If a key is missing, or asks for arithmetic other than ours.
  """
  metadata = _Metadata(fields, source)
  take, require = metadata.take, metadata.require
  name = "general.architecture"
  architecture = fields.get(name, lambda: None)()
  require(architecture == "gemma3", name, architecture, "'gemma3'")
  num_layers, embed_dim = take("block_count"), take("embedding_length")
  num_heads = take("attention.head_count")
  head_dim = take("attention.key_length", embed_dim // num_heads)
  # As in llama.cpp: 27B alone scales by its width per head.
  per_head = embed_dim / num_heads if num_layers == _LAYERS_OF_27B else head_dim
  config = gemma3_config.ModelConfig(
    vocab_size=shapes.get("token_embd.weight", (0,))[0],
    num_layers=num_layers,
    embed_dim=embed_dim,
    hidden_dim=take("feed_forward_length"),
    num_heads=num_heads,
    num_kv_heads=take("attention.head_count_kv"),
    head_dim=head_dim,
    sliding_window=take("attention.sliding_window"),
    query_scale=float(take("attention.scale", per_head**-0.5)),
    local_rope_base=float(take("rope.freq_base_swa", 10_000.0)),
    global_rope_base=float(take("rope.freq_base")),
    global_rope_factor=float(take("rope.scaling.factor", 1.0)),
    vision=None,
  )
  _check_arithmetic(metadata, config)
  return config


def _check_arithmetic(
  metadata: _Metadata, config: gemma3_config.ModelConfig
) -> None:
  """Checks all other keys, which must ask for the only arithmetic there is."""
  take, require = metadata.take, metadata.require
  for key, only in (
    ("attention.value_length", config.head_dim),
    ("rope.dimension_count", config.head_dim),
    ("attention.sliding_window_pattern", gemma3_config.PERIOD),
    ("attention.causal", True),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
  ):
    found = take(key, only)
    require(found == only, f"gemma3.{key}", found, f"{only!r}")
  key = "attention.layer_norm_rms_epsilon"
  epsilon = take(key)
  is_close = abs(epsilon - _RMS_EPSILON) < 1e-3 * _RMS_EPSILON
  require(is_close, f"gemma3.{key}", epsilon, f"{_RMS_EPSILON}")
  kind = take("rope.scaling.type", "none")
  require(
    kind == "linear" or (kind == "none" and config.global_rope_factor == 1),
    "gemma3.rope.scaling.type",
    kind,
    "'linear', or 'none' with a gemma3.rope.scaling.factor of 1",
  )
  unknown = sorted(metadata.rest.keys() - set(_IGNORED_KEYS))
  require(
    not unknown,
    ", ".join(f"gemma3.{key}" for key in unknown),
    [metadata.rest[key] for key in unknown],
    "absent, because this program does not know the key",
  )


def _unreadable(library: Any, tensors: Mapping[str, Any]) -> dict[str, str]:
  """Tensors of a type that the package cannot dequantize, with the reason."""
  refused = set()
  for kind in {tensor.tensor_type for tensor in tensors.values()}:
    _, block_bytes = library.GGML_QUANT_SIZES[kind]
    try:
      library.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
      refused.add(kind)
  return {
    name: f"of type {tensor.tensor_type.name}, which gguf cannot dequantize"
    for name, tensor in tensors.items()
    if tensor.tensor_type in refused
  }
