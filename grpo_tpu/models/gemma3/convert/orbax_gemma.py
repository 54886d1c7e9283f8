"""Reads checkpoints of the `gemma` library, as Google releases them.

They are Orbax checkpoints whose tensors have the names of the library's
modules, either nested as its models are or flat under `transformer/` and
`SigLiPFromPatches_0/`, with one tensor per layer. Orbax alone reads them,
because the library would import TensorFlow.

References:
  `gm.ckpts` of https://github.com/google-deepmind/gemma
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import traverse_util

from data_pipelines.storage import objects, paths
from data_pipelines.text import untrusted
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3.convert import assembly

# Parts of names in the flat layout, and what the nested one has instead.
_FLAT = (
  (r"^transformer/", ""),
  (r"^SigLiPFromPatches_0/", "vision_encoder/"),
  (r"(/mlp/\w+)/w$", r"\1"),
)


class Checkpoint:
  """A checkpoint of the library whose tensors have been checked."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    config: gemma3_config.ModelConfig,
    abstract_params: dict,
  ):
    """Checks names and shapes; needs no device and reads no tensor.

    The folder may be local or on gs://.

    Raises:
      ValueError: If there is no checkpoint or it is of another size; or lists
        every tensor that is missing, extra or misshaped.
    """
    self._path = paths.absolute(path)
    source = f"checkpoint {self._path}"
    self._keys, shapes = _tensors(self._path, source)
    _check_size(shapes, config, source)
    wanted = {}
    for path, leaf in leaves.by_path(abstract_params).items():
      names = leaves.LEAVES[path]
      for index in np.ndindex(leaf.shape[: names.axes.startswith("l")]):
        wanted[names.gemma.format(*index)] = leaf.shape[len(index) :]
    assembly.check_tensors(shapes, wanted, source, faults={})

  def load(self, abstract_params: dict) -> dict:
    """Loads the tree with these shapes, types and shardings."""
    return assembly.assemble(abstract_params, self._read)

  def _read(
    self, layer: int | None, pieces: dict[str, jax.ShapeDtypeStruct]
  ) -> list[tuple[str, Any]]:
    """Reads the given pieces of a layer to their devices, all at once."""
    keys = {
      path: self._keys[leaves.LEAVES[path].gemma.format(layer)]
      for path in pieces
    }
    wanted = traverse_util.unflatten_dict(
      {keys[path]: piece for path, piece in pieces.items()}
    )
    args = ocp.args.PyTreeRestore(
      wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.restore(self._path, args=args)
    found = traverse_util.flatten_dict(tree)
    return [(path, found[keys[path]]) for path in pieces]


def _tensors(
  path: epath.Path, source: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[int, ...]]]:
  """The key and the shape of each tensor of the checkpoint, by nested name.

  Parses the files, because Orbax would start the devices to list them.
  """
  try:
    record = untrusted.read_json(path / "_METADATA", source="_METADATA")
    entries = untrusted.get_field(record, "tree_metadata", dict, "_METADATA")
    found = [_key(entry) for entry in entries.values()]
    stored = _shapes(path, found)
  except (OSError, ValueError) as error:
    reason = str(error).removesuffix(".")
    raise ValueError(
      f"{source} must be the folder of an Orbax checkpoint of the gemma "
      f"library, but there is none: {reason}. Give the folder that holds "
      "_METADATA."
    ) from error
  keys, shapes = {}, {}
  for key in found:
    name = "/".join(key)
    for pattern, replacement in _FLAT:
      name = re.sub(pattern, replacement, name)
    # A tensor that is named but not stored is missing.
    if key in stored:
      keys[name], shapes[name] = key, stored[key]
  return keys, shapes


def _key(entry: Any) -> tuple[str, ...]:
  """The names on the way to a tensor, from an entry of the metadata."""
  untrusted.check_kind(entry, dict, "an entry of tree_metadata")
  parts = untrusted.get_field(entry, "key_metadata", list, "an entry")
  untrusted.check_items(parts, dict, "key_metadata")
  names = [part.get("key") for part in parts]
  # Items of a list have numbers for names.
  if not all(type(name) in (str, int) for name in names):
    raise ValueError(f"{untrusted.shorten(names)} must be names of a tensor.")
  key = tuple(map(str, names))
  path = "/".join(key)
  if ".." in path.split("/") or not path.isprintable():
    raise ValueError(f"{untrusted.shorten(key)} must lie in the checkpoint.")
  return key


def _shapes(
  path: epath.Path, keys: Iterable[tuple[str, ...]]
) -> dict[tuple[str, ...], tuple[int, ...]]:
  """The shape of each stored array, from Zarr metadata of either version."""
  url = os.fspath(path) if paths.is_remote(path) else f"file://{path}"
  is_one_store = objects.exists(path / "manifest.ocdbt", what="model.weights")
  store = tensorstore.KvStore.open(
    {"driver": "ocdbt", "base": f"{url}/"} if is_one_store else f"{url}/"
  ).result()
  reads = {
    key: [
      store.read(f"{'.'.join(key)}/{name}") for name in (".zarray", "zarr.json")
    ]
    for key in keys
  }
  shapes = {}
  for key, pair in reads.items():
    if text := b"".join(read.result().value for read in pair):
      name = f"the header of {'.'.join(key)}"
      header = untrusted.parse_json(text, name)
      shape = untrusted.get_field(header, "shape", list, name)
      untrusted.check_items(shape, int, f"the shape in {name}")
      shapes[key] = tuple(shape)
  return shapes


def _check_size(
  shapes: Mapping[str, tuple[int, ...]],
  config: gemma3_config.ModelConfig,
  source: str,
) -> None:
  """Checks the sizes that tell the released models apart."""
  layers = {name.split("/")[0] for name in shapes if name.startswith("layer_")}
  rows, width, *_ = (*shapes.get("embedder/input_embedding", ()), 0, 0)
  has_tower = any(name.startswith("vision_encoder/") for name in shapes)
  words = "{} layers, {} embeddings of width {} and {} image tower"
  ours = config.num_layers, config.vocab_size, config.embed_dim
  found = words.format(len(layers), rows, width, "an" if has_tower else "no")
  wanted = words.format(*ours, "an" if config.vision else "no")
  if found != wanted:
    raise ValueError(
      f"{source} has {found}, but must have those of model.name ({wanted}); "
      "set model.name to the size that was released."
    )
