"""Reads weights of the text sizes from a GGUF file of llama.cpp.

Tensors are dequantized one by one. A file that asks for arithmetic other than
ours is refused by the name of the key or tensor.

References:
  The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
  The meaning of its keys for Gemma 3: `llm_build_gemma3` of llama.cpp.
"""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.storage.host_copy import host_copy
from data_pipelines.text import gguf_header, untrusted
from data_pipelines.validation import printable
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3.convert import assembly, blocks

_RMS_EPSILON = 1e-6
_LAYERS_OF_27B = 62
# Keys that do not affect the arithmetic.
_IGNORED_KEYS = (
  "context_length",
  "vocab_size",
  "rope.scaling.finetuned",
  "rope.scaling.original_context_length",
)


class File:
  """A GGUF file whose metadata and tensors have been checked."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    config: gemma3_config.ModelConfig,
    abstract_params: dict,
  ):
    """Checks the metadata of a file, copied from a bucket; reads no tensor.

    Raises:
      ValueError: If `gguf` is missing, or the file holds another model or other
        arithmetic; or lists the tensors that differ or cannot be read.
    """
    source = f"GGUF file {os.fspath(path)}"
    self._path = host_copy(path, what="model.weights")
    self._library, header = _open(self._path, source)
    self._tensors = header.tensors
    shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
    found = _read_config(header.metadata, shapes, source)
    assembly.check_sizes(found, config, source)
    assembly.check_tensors(
      shapes,
      leaves.file_shapes(abstract_params, "gguf"),
      source,
      faults=_find_faults(self._library, header),
    )

  def load(self, abstract_params: dict) -> dict:
    """Loads the tree with these shapes, types and shardings."""

    def find(leaf: leaves.Leaf, layer: int | None) -> list[_Tensor]:
      names = [name.format(layer) for name in leaf.gguf]
      tensors = (self._tensors[name] for name in names)
      return [_Tensor(self._path, self._library, *each) for each in tensors]

    return blocks.load(abstract_params, find)


class _Tensor(NamedTuple):
  """A tensor, which is dequantized a block of rows at a time."""

  path: pathlib.Path
  library: Any
  kind: int
  shape: tuple[int, ...]
  start: int

  @property
  def row_bytes(self) -> int:
    """Bytes of a row in float32."""
    return 4 * math.prod(self.shape[1:])

  def start_read(self, start: int, stop: int) -> Callable[[], np.ndarray]:
    """A function that dequantizes these rows."""

    def read() -> np.ndarray:
      kind = self.library.GGMLQuantizationType(self.kind)
      *rows, width = self.shape
      shape = math.prod(rows), _row_bytes(self.library, kind, width)
      data = np.memmap(self.path, mode="r", offset=self.start, shape=shape)
      if rows:
        return self.library.dequantize(data[start:stop], kind)
      # A scale. Files hold the whole factor; the tree its deviation from one.
      return self.library.dequantize(data, kind)[0, start:stop] - 1

    return read


def _open(
  path: str | os.PathLike[str], source: str
) -> tuple[Any, gguf_header.Header]:
  """The `gguf` package, and the header of the file."""
  try:
    import gguf
  except ImportError as error:
    raise ValueError(
      f"{source} must be read with the gguf package, which is not installed; "
      'run pip install "grpo_tpu[export]".'
    ) from error
  try:
    return gguf, gguf_header.read(path, "it")
  except (OSError, ValueError) as error:
    reason = str(error).removesuffix(".")
    raise ValueError(
      f"{source} must be a whole GGUF file on this machine, but cannot be "
      f"read: {reason}. Name another, or fetch it again."
    ) from error


def _row_bytes(library: Any, kind: int, width: int) -> int:
  """Bytes of the last axis of a tensor, rounded up to whole blocks."""
  block, block_bytes = library.GGML_QUANT_SIZES[kind]
  return -(-width // block) * block_bytes


class _Metadata:
  """The keys of a file under `gemma3.`, which `take` removes one by one."""

  def __init__(self, fields: Mapping[str, Any], source: str):
    self._source, start = source, "gemma3."
    names = (name for name in fields if name.startswith(start))
    self.rest = {name.removeprefix(start): fields[name] for name in names}

  def take(self, key: str, kind: type, default: Any = None) -> Any:
    """Removes a key and returns its value, a size (int) or a factor."""
    value = self.rest.pop(key, default)
    if value is None:
      raise ValueError(
        f"{self._source} must say gemma3.{key}, and does not; convert the "
        "model again."
      )
    holds, rule = type(value) is int and value >= 1, "an integer of at least 1"
    if kind is float:
      holds = isinstance(value, int | float) and 0 < value < math.inf
      rule = "a finite number above 0"
    self.require(holds, f"gemma3.{key}", value, rule)
    return kind(value)

  def require(self, holds: bool, name: str, value: Any, rule: str) -> None:
    """Raises a ValueError unless a rule holds."""
    if not holds:
      raise ValueError(
        f"{self._source} has {printable(name)} {untrusted.shorten(value)}, "
        f"which must be {rule}; this program computes nothing else, so give "
        "the file of a released Gemma 3."
      )


def _read_config(
  fields: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], source: str
) -> gemma3_config.ModelConfig:
  """The sizes in the metadata, which must ask for our arithmetic."""
  metadata = _Metadata(fields, source)
  take, name = metadata.take, "general.architecture"
  architecture = fields.get(name)
  metadata.require(architecture == "gemma3", name, architecture, "'gemma3'")
  num_layers = take("block_count", int)
  embed_dim = take("embedding_length", int)
  num_heads = take("attention.head_count", int)
  head_dim = take("attention.key_length", int, embed_dim // num_heads)
  num_kv_heads = take("attention.head_count_kv", int)
  holds, name = num_heads % num_kv_heads == 0, "gemma3.attention.head_count_kv"
  rule = f"a divisor of the head_count of {num_heads}"
  metadata.require(holds, name, num_kv_heads, rule)
  # As in llama.cpp: 27B alone scales by its width per head.
  per_head = embed_dim / num_heads if num_layers == _LAYERS_OF_27B else head_dim
  config = gemma3_config.ModelConfig(
    vocab_size=shapes.get("token_embd.weight", (0,))[0],
    num_layers=num_layers,
    embed_dim=embed_dim,
    hidden_dim=take("feed_forward_length", int),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    sliding_window=take("attention.sliding_window", int),
    query_scale=take("attention.scale", float, per_head**-0.5),
    local_rope_base=take("rope.freq_base_swa", float, 10_000.0),
    global_rope_base=take("rope.freq_base", float),
    global_rope_factor=take("rope.scaling.factor", float, 1.0),
    vision=None,
  )
  _check_arithmetic(metadata, config)
  return config


def _check_arithmetic(
  metadata: _Metadata, config: gemma3_config.ModelConfig
) -> None:
  """Checks all other keys, which must ask for the only arithmetic there is."""
  rest, require = metadata.rest, metadata.require
  kind = rest.pop("rope.scaling.type", "none")
  holds = kind == "linear" or kind == "none" and config.global_rope_factor == 1
  rule = "'linear', or 'none' with a gemma3.rope.scaling.factor of 1"
  require(holds, "gemma3.rope.scaling.type", kind, rule)
  key = "attention.layer_norm_rms_epsilon"
  epsilon = metadata.take(key, float)
  is_close = math.isclose(epsilon, _RMS_EPSILON, rel_tol=1e-3)
  require(is_close, f"gemma3.{key}", epsilon, f"{_RMS_EPSILON}")
  only = {
    "attention.value_length": config.head_dim,
    "rope.dimension_count": config.head_dim,
    "attention.sliding_window_pattern": gemma3_config.PERIOD,
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
  }
  for key in sorted(rest.keys() - set(_IGNORED_KEYS)):
    rule = "absent, because this program does not know the key"
    rule = repr(only[key]) if key in only else rule
    holds = key in only and rest[key] == only[key]
    require(holds, f"gemma3.{key}", rest[key], rule)


def _find_faults(library: Any, header: gguf_header.Header) -> dict[str, str]:
  """Tensors that cannot be read, with the reason."""
  names = {kind.value: kind.name for kind in library.GGMLQuantizationType}
  faults = {}
  for name, tensor in header.tensors.items():
    kind = tensor.kind
    if not _is_known(library, kind):
      shown = names.get(kind, kind)
      faults[name] = f"of type {shown}, which gguf cannot dequantize"
      continue
    *rows, width = tensor.shape
    if width % (block := library.GGML_QUANT_SIZES[kind][0]):
      faults[name] = f"rows of {width}, no multiple of {block}"
    end = tensor.start + math.prod(rows) * _row_bytes(library, kind, width)
    if end > header.num_bytes:
      faults[name] = f"ends at byte {end}, and the file has {header.num_bytes}"
  return faults


@functools.cache
def _is_known(library: Any, kind: int) -> bool:
  """True if the package can dequantize a type."""
  try:
    kind = library.GGMLQuantizationType(kind)
    _, block_bytes = library.GGML_QUANT_SIZES[kind]
    library.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
  except (KeyError, NotImplementedError, ValueError):
    return False
  return True
