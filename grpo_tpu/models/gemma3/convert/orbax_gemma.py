"""Weights in the layout of the `gemma` library, as Google releases them.

An Orbax checkpoint whose tensors go by the names of the library's modules,
nested as its models are or flat under `transformer/` and
`SigLiPFromPatches_0/`, with one tensor per layer. Read with Orbax alone: the
library would bring TensorFlow.

References:
  `gm.ckpts` of https://github.com/google-deepmind/gemma
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3.convert import assembly

# Parts of our names and what the library calls them, tower first.
_RENAMED = (
  (r"^vision_encoder/layers/", "vision_encoder/encoderblock_{layer}/"),
  (r"^vision_encoder/norm/", "vision_encoder/encoder_norm/"),
  (r"/attention_norm/", "/LayerNorm_0/"),
  (r"/mlp_norm/", "/LayerNorm_1/"),
  (r"/(query|key|value|out)/", r"/MultiHeadDotProductAttention_0/\1/"),
  (r"/mlp_in/", "/MlpBlock_0/Dense_0/"),
  (r"/mlp_out/", "/MlpBlock_0/Dense_1/"),
  (r"/encode", "/Transformer/encode"),
  (r"^vision_encoder/", "vision_encoder/siglip_encoder/"),
  (r"^layers/", "layer_{layer}/"),
  (r"/(query|key)_norm/", r"/_\1_norm/"),
  (r"/(q_einsum|kv_einsum|attn_vec_einsum|mm_input_projection)$", r"/\1/w"),
)
# What the flat layout has before and after the names of the nested one.
_FLAT = (
  (r"^transformer/", ""),
  (r"^SigLiPFromPatches_0/", "vision_encoder/"),
  (r"(/mlp/\w+)/w$", r"\1"),
)


class Checkpoint:
  """A checkpoint of the library's whose tensors have been checked.

  Attributes:
    config: The sizes of the model that it holds.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    config: gemma3_config.ModelConfig | None,
  ):
    """Reads names and shapes, without a device; tensors stay where they are.

    Args:
      path: The checkpoint's folder, here or on gs://.
      config: What it must hold; None finds the released size that it is.

    Raises:
      ValueError: There is no checkpoint, or it is of none of the sizes or not
        of `config`; the message lists every tensor that is missing, extra or
        misshaped.
    """
    self._path = epath.Path(path).resolve()
    source = f"checkpoint {self._path}"
    self._keys, shapes = _tensors(self._path, source)
    self.config = _config(shapes, config, source)
    self._source, self._shapes = source, shapes

  def check(self, abstract: dict) -> None:
    """Compares the tensors with the shapes of the stacked tree.

    Raises:
      ValueError: Listing every tensor that is missing, extra or misshaped.
    """
    wanted = {
      _library_name(path, layer): shape
      for path, layer, shape in assembly.pieces(abstract)
    }
    assembly.check_tensors(self._shapes, wanted, self._source, unreadable={})

  def read(
    self, layer: int | None, pieces: dict[str, jax.ShapeDtypeStruct]
  ) -> list[tuple[str, jax.Array]]:
    """The pieces asked for, on their devices, read at once; nothing else is."""
    keys = {path: self._keys[_library_name(path, layer)] for path in pieces}
    wanted: dict[str, Any] = {}
    for path, piece in pieces.items():
      *parents, leaf = keys[path]
      inner = wanted
      for parent in parents:
        inner = inner.setdefault(parent, {})
      inner[leaf] = piece
    args = ocp.args.PyTreeRestore(
      wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.restore(self._path, args=args)
    return [
      (path, functools.reduce(lambda node, key: node[key], keys[path], tree))
      for path in pieces
    ]


def _tensors(
  path: epath.Path, source: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[int, ...]]]:
  """Where the checkpoint keeps each tensor, and its shape, by nested name.

  By what lies in its files, for Orbax would start the devices to look.
  """
  try:
    record = json.loads((path / "_METADATA").read_text())
    found = [
      tuple(str(key["key"]) for key in entry["key_metadata"])
      for entry in record["tree_metadata"].values()
    ]
    headers = _headers(path, found)
  except (OSError, ValueError, KeyError) as error:
    raise _no_checkpoint(source) from error
  keys, shapes = {}, {}
  for key in found:
    name = "/".join(key)
    for pattern, replacement in _FLAT:
      name = re.sub(pattern, replacement, name)
    # One that is named and not stored is missing.
    if key in headers:
      keys[name], shapes[name] = key, tuple(headers[key]["shape"])
  return keys, shapes


def _headers(
  path: epath.Path, keys: Iterable[tuple[str, ...]]
) -> dict[tuple[str, ...], Mapping[str, Any]]:
  """What Zarr, of either version, says of each array that is stored."""
  url = os.fspath(path) if "://" in os.fspath(path) else f"file://{path}"
  is_one_store = (path / "manifest.ocdbt").exists()
  store = tensorstore.KvStore.open(
    {"driver": "ocdbt", "base": f"{url}/"} if is_one_store else f"{url}/"
  ).result()
  reads = {
    key: [
      store.read(f"{'.'.join(key)}/{name}") for name in (".zarray", "zarr.json")
    ]
    for key in keys
  }
  texts = {
    key: b"".join(read.result().value for read in pair)
    for key, pair in reads.items()
  }
  return {key: json.loads(text) for key, text in texts.items() if text}


def _no_checkpoint(source: str) -> ValueError:
  return ValueError(
    f"{source} must be the folder of an Orbax checkpoint as the gemma library "
    "reads it, and there is none; give the folder that holds _METADATA."
  )


def _library_name(path: str, layer: int | None) -> str:
  """The nested name of the tensor that is one piece of ours."""
  for pattern, replacement in _RENAMED:
    path = re.sub(pattern, replacement, path)
  return path.replace("{layer}", str(layer))


def _config(
  shapes: Mapping[str, tuple[int, ...]],
  config: gemma3_config.ModelConfig | None,
  source: str,
) -> gemma3_config.ModelConfig:
  """The size that a checkpoint is of, by what tells the sizes apart."""
  layers = {name.split("/")[0] for name in shapes if name.startswith("layer_")}
  embedding = (*shapes.get("embedder/input_embedding", ()), 0, 0)
  has_vision = any(name.startswith("vision_encoder/") for name in shapes)
  found = (len(layers), *embedding[:2], has_vision)
  known = gemma3_config.CONFIGS if config is None else {"model.name": config}
  for candidate in known.values():
    if found == _signature(candidate):
      return candidate
  wanted = "; ".join(
    f"{name}: {_described(_signature(size))}" for name, size in known.items()
  )
  raise ValueError(
    f"{source} holds {_described(found)}, which must be those of the model "
    f"({wanted}); set model.name to the size that was released."
  )


def _signature(
  config: gemma3_config.ModelConfig,
) -> tuple[int, int, int, bool]:
  return (
    config.num_layers,
    config.vocab_size,
    config.embed_dim,
    config.vision is not None,
  )


def _described(signature: tuple[int, ...]) -> str:
  num_layers, vocab_size, width, has_vision = signature
  tower = "an" if has_vision else "no"
  return (
    f"{num_layers} layers, {vocab_size} embeddings of width {width} and "
    f"{tower} image tower"
  )
