"""Weights of the text sizes out of a GGUF file, as llama.cpp reads it.

Tensors are dequantized one by one. A file with anything that the decoder here
does not do is refused by the name of its key or tensor.

References:
  The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
  What its keys mean for Gemma 3: `llm_build_gemma3` of llama.cpp.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3.convert import assembly

_RMS_EPSILON = 1e-6
_LAYERS_OF_27B = 62
# Keys that say nothing of the arithmetic.
_FREE_KEYS = ("context_length", "vocab_size", "rope.scaling.finetuned")
_FREE_KEYS += ("rope.scaling.original_context_length",)
# The file's tensors of a layer that make one of ours.
_OF_LAYER = {
  "layers/pre_attention_norm/scale": ("attn_norm",),
  "layers/attn/q_einsum": ("attn_q",),
  "layers/attn/kv_einsum": ("attn_k", "attn_v"),
  "layers/attn/query_norm/scale": ("attn_q_norm",),
  "layers/attn/key_norm/scale": ("attn_k_norm",),
  "layers/attn/attn_vec_einsum": ("attn_output",),
  "layers/post_attention_norm/scale": ("post_attention_norm",),
  "layers/pre_ffw_norm/scale": ("ffn_norm",),
  "layers/mlp/gating_einsum": ("ffn_gate", "ffn_up"),
  "layers/mlp/linear": ("ffn_down",),
  "layers/post_ffw_norm/scale": ("post_ffw_norm",),
}
_OUTSIDE = {
  "embedder/input_embedding": "token_embd.weight",
  "final_norm/scale": "output_norm.weight",
}
# Elements dequantized at a time.
_BLOCK = 1 << 24


class File:
  """A GGUF file whose metadata and tensors have been checked.

  Attributes:
    config: The sizes of the model that it holds.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    config: gemma3_config.ModelConfig | None,
  ):
    """Reads the metadata; tensors stay on disk.

    Args:
      path: The file, on this machine.
      config: What the file must hold; None takes what it says.

    Raises:
      ValueError: The `gguf` package is missing, or the file is not one of a
        Gemma 3 that this model computes, or not of `config`; the message lists
        every tensor that is missing, extra, misshaped or unreadable.
    """
    source = f"GGUF file {os.fspath(path)}"
    self._library, file = _opened(path)
    self._tensors = {tensor.name: tensor for tensor in file.tensors}
    fields = {name: field.contents for name, field in file.fields.items()}
    shapes = {
      name: tuple(map(int, reversed(tensor.shape)))
      for name, tensor in self._tensors.items()
    }
    self.config = _config(fields, shapes, source)
    if config is not None:
      assembly.check_config(self.config, config, source)
      self.config = config
    assembly.check_tensors(
      shapes,
      _wanted(self.config),
      source,
      unreadable=_unreadable(self._library, self._tensors),
    )

  def read(
    self, layer: int | None, pieces: dict[str, jax.ShapeDtypeStruct]
  ) -> Iterator[tuple[str, np.ndarray]]:
    """The pieces asked for, as `assembly.assembled` wants them."""
    for path, piece in pieces.items():
      yield path, self._piece(layer, path, piece)

  def _piece(self, layer, path: str, piece) -> np.ndarray:
    names = _names(path, layer)
    if path.endswith("/scale"):
      # Files hold the whole factor, the tree what is added to one.
      return self._dequantized(names[0], np.dtype(np.float32)) - 1
    parts = [self._dequantized(name, piece.dtype) for name in names]
    match path.rsplit("/", 1)[-1]:
      case "q_einsum":  # [Q * H, D] to [Q, D, H]
        return _heads_first(parts[0], piece.shape)
      case "kv_einsum":  # Twice [K * H, D] to [2, K, D, H]
        return np.stack([_heads_first(x, piece.shape[1:]) for x in parts])
      case "attn_vec_einsum":  # [D, Q * H] to [Q, H, D]
        return parts[0].T.reshape(piece.shape)
      case "gating_einsum":  # Twice [F, D] to [2, F, D]
        return np.stack(parts)
      case "linear":  # [D, F] to [F, D]
        return parts[0].T
    return parts[0]  # The embedding, [V, D].

  def _dequantized(self, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor as numbers, made a block of rows at a time."""
    tensor = self._tensors[name]
    shape = tuple(map(int, reversed(tensor.shape)))
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    out = np.empty((rows.shape[0], shape[-1]), dtype)
    step = max(1, _BLOCK // shape[-1])
    for start in range(0, rows.shape[0], step):
      block = rows[start : start + step]
      out[start : start + step] = self._library.dequantize(
        block, tensor.tensor_type
      )
    return out.reshape(shape)


def _opened(path: str | os.PathLike[str]) -> tuple[Any, Any]:
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
  # Whatever a file of noise, or one cut short, makes of its reader.
  except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
    raise ValueError(
      f"GGUF file {os.fspath(path)} must be a whole GGUF file on this machine, "
      f"but cannot be read: {error}; name another, or fetch it again."
    ) from error


def _names(path: str, layer: int | None) -> list[str]:
  """The file's tensors that make one piece of ours."""
  if path in _OUTSIDE:
    return [_OUTSIDE[path]]
  return [f"blk.{layer}.{name}.weight" for name in _OF_LAYER[path]]


def _heads_first(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  heads, width, size = shape
  return x.reshape(heads, size, width).transpose(0, 2, 1)


def _config(
  fields: Mapping[str, Callable[[], Any]],
  shapes: Mapping[str, tuple[int, ...]],
  source: str,
) -> gemma3_config.ModelConfig:
  """The sizes that the metadata give.

  Raises:
    ValueError: A key is missing, or asks for what the decoder does not do.
  """
  read = {name for name in fields if not name.startswith("gemma3.")}

  def value(key: str, default: Any = None) -> Any:
    name = f"gemma3.{key}"
    read.add(name)
    if name in fields:
      return fields[name]()
    if default is None:
      raise ValueError(
        f"{source} must say {name}, and does not; convert the model again."
      )
    return default

  def require(key: str, holds: bool, given: Any, rule: str) -> None:
    if not holds:
      raise ValueError(
        f"{source} has {key} {given!r}, which must be {rule}; this model does "
        "nothing else, so give the file of a released Gemma 3."
      )

  architecture = fields.get("general.architecture", lambda: None)()
  require(
    "general.architecture", architecture == "gemma3", architecture, "'gemma3'"
  )
  for key in _FREE_KEYS:
    value(key, 0)
  num_layers, embed_dim = value("block_count"), value("embedding_length")
  num_heads = value("attention.head_count")
  head_dim = value("attention.key_length", embed_dim // num_heads)
  kind = value("rope.scaling.type", "none")
  factor = float(value("rope.scaling.factor", 1.0))
  for key, default, fixed in (
    ("attention.value_length", head_dim, head_dim),
    ("rope.dimension_count", head_dim, head_dim),
    (
      "attention.sliding_window_pattern",
      gemma3_config.PERIOD,
      gemma3_config.PERIOD,
    ),
    ("attention.causal", True, True),
    ("attn_logit_softcapping", 0.0, 0.0),
    ("final_logit_softcapping", 0.0, 0.0),
  ):
    given = value(key, default)
    require(f"gemma3.{key}", given == fixed, given, f"{fixed!r}")
  epsilon = value("attention.layer_norm_rms_epsilon")
  require(
    "gemma3.attention.layer_norm_rms_epsilon",
    abs(epsilon - _RMS_EPSILON) < 1e-3 * _RMS_EPSILON,
    epsilon,
    f"{_RMS_EPSILON}",
  )
  require(
    "gemma3.rope.scaling.type",
    kind == "linear" or (kind == "none" and factor == 1),
    kind,
    "'linear', or 'none' with a gemma3.rope.scaling.factor of 1",
  )
  # As llama.cpp has it: 27B alone scales by its width per head.
  per_head = embed_dim / num_heads if num_layers == _LAYERS_OF_27B else head_dim
  config = gemma3_config.ModelConfig(
    vocab_size=shapes.get("token_embd.weight", (0,))[0],
    num_layers=num_layers,
    embed_dim=embed_dim,
    hidden_dim=value("feed_forward_length"),
    num_heads=num_heads,
    num_kv_heads=value("attention.head_count_kv"),
    head_dim=head_dim,
    sliding_window=value("attention.sliding_window"),
    query_scale=float(value("attention.scale", per_head**-0.5)),
    local_rope_base=float(value("rope.freq_base_swa", 10_000.0)),
    global_rope_base=float(value("rope.freq_base")),
    global_rope_factor=factor,
    vision=None,
  )
  unknown = sorted(fields.keys() - read)
  require(
    ", ".join(unknown),
    not unknown,
    [fields[name]() for name in unknown],
    "absent, for what it asks for is not known here",
  )
  return config


def _wanted(config: gemma3_config.ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of each tensor of a file of such a model."""
  d, f, h = config.embed_dim, config.hidden_dim, config.head_dim
  q, k = config.num_heads * h, config.num_kv_heads * h
  layer = {
    **dict.fromkeys(("attn_norm", "post_attention_norm"), (d,)),
    **dict.fromkeys(("ffn_norm", "post_ffw_norm"), (d,)),
    **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (h,)),
    **{"attn_q": (q, d), "attn_k": (k, d), "attn_v": (k, d)},
    **{"attn_output": (d, q), "ffn_down": (d, f)},
    **dict.fromkeys(("ffn_gate", "ffn_up"), (f, d)),
  }
  return {
    "token_embd.weight": (config.vocab_size, d),
    "output_norm.weight": (d,),
  } | {
    f"blk.{i}.{name}.weight": shape
    for i in range(config.num_layers)
    for name, shape in layer.items()
  }


def _unreadable(library: Any, tensors: Mapping[str, Any]) -> dict[str, str]:
  """The tensors of a type that the package cannot dequantize."""
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
