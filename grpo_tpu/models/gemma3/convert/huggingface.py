"""Loads the parameter tree from Hugging Face safetensors, and saves it.

`huggingface_config` knows the sizes, `leaves` the tensors of each leaf.
"""

import functools
import itertools
import json
import math
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from data_pipelines.storage import objects, paths
from data_pipelines.text import untrusted
from data_pipelines.validation import printable
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3.convert import (
  assembly,
  blocks,
  huggingface_config,
  remote,
)
from grpo_tpu.models.gemma3.convert import huggingface_names as names

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CONFIG = "config.json"
_LAST = {_CONFIG, "adapter_config.json"}
GENERATION_CONFIG = "generation_config.json"
_SUFFIX = ".safetensors"
_MAX_LISTED = 10
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
# Bytes of a file in host memory at a time, and most bytes of tensors in a file
# that is written, unless one tensor is larger.
_CHUNK_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100_000_000  # As the library of safetensors has it.
_SHARD_BYTES = 2 << 30


class Tensor(NamedTuple):
  """A tensor in a file, with the header's description."""

  path: epath.Path
  name: str
  shape: tuple[int, ...]
  dtype: str
  file: remote.File | None = None  # The file, if it is in a bucket,
  start: int = 0  # and the tensor's first byte in it.

  @property
  def row_bytes(self) -> int:
    """Bytes of a row of the first axis."""
    return math.prod(self.shape[1:]) * np.dtype(_DTYPES[self.dtype]).itemsize

  def start_read(
    self, start: int = 0, stop: int | None = None
  ) -> Callable[[], np.ndarray]:
    """Starts to read rows; returns a function that waits for them."""
    stop = self.shape[0] if stop is None else stop
    if self.file is None:
      return lambda: self._read_local(start, stop)
    part = (self.start + row * self.row_bytes for row in (start, stop))
    read = self.file.start_read(*part)
    dtype, shape = _DTYPES[self.dtype], (-1, *self.shape[1:])
    return lambda: np.frombuffer(read(), dtype).reshape(shape)

  def _read_local(self, start: int, stop: int) -> np.ndarray:
    """Opens the file each time, which frees mapped pages."""
    with safetensors.safe_open(self.path, framework="numpy") as file:
      return file.get_slice(self.name)[start:stop]


class Checkpoint:
  """The checked tensors of a folder."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: gemma3_config.ModelConfig,
    abstract_params: dict,
  ) -> None:
    """Checks every header; reads no tensor but a head that must be tied.

    Rows of the embedding from the image placeholder's on, which transformers
    adds, are never loaded.

    Raises:
      ValueError: Lists the sizes that differ, or the tensors.
    """
    huggingface_config.check(directory, config)
    self._directory = epath.Path(directory)
    self._tensors: dict[str, Tensor] = {}
    faults = self._read_headers()
    wanted = leaves.file_shapes(abstract_params, "huggingface")
    self._check_tensors(wanted, faults)

  def load(self, abstract_params: Any) -> Any:
    """Loads the tree with these shapes, types and shardings.

    Besides, the host holds its devices' part of a leaf, and a few blocks.
    """

    def find(leaf: leaves.Leaf, layer: int | None) -> list[Tensor]:
      return [self._tensors[name.format(layer)] for name in leaf.huggingface]

    params = blocks.load(abstract_params, find)
    logging.info("Read the parameters of %s.", self._directory)
    return params

  def _read_headers(self) -> dict[str, str]:
    """Fills in the tensors of all files; returns faults by name."""
    faults, unreadable = {}, []
    for path in _files(self._directory):
      try:
        for tensor in read_headers(path):
          common = names.common_name(tensor.name)
          if common in self._tensors:
            faults[tensor.name] = "there twice"
          elif not names.UNUSED.match(common):
            self._tensors[common] = tensor
      except OSError as error:
        unreadable.append(f"{printable(path.name)}: cannot be read ({error})")
    if unreadable:
      listed = "; ".join(unreadable[:_MAX_LISTED])
      raise ValueError(
        f"checkpoint {self._directory} must hold whole safetensors files, but "
        f"{len(unreadable)} are not: {listed}. Fetch the checkpoint again."
      )
    return faults

  def _check_tensors(
    self, wanted: dict[str, tuple[int, ...]], faults: dict[str, str]
  ) -> None:
    """Checks the tensors; messages have their names in the files."""
    head = self._tensors.pop(names.HEAD, None)
    embedding = self._tensors.get(names.EMBEDDING)
    if embedding:
      rows, *width = wanted[names.EMBEDDING]
      rows = max((rows, *embedding.shape[:1]))  # It may have more than needed.
      wanted[names.EMBEDDING] = shape = (rows, *width)
      # One that has another shape or type is refused below.
      is_readable = embedding.shape == shape and embedding.dtype in _DTYPES
      if head and is_readable and not _are_equal(head, embedding):
        tie = "differs from the embedding, to which it must be tied"
        faults[head.name] = tie
    in_files = {common: x.name for common, x in self._tensors.items()}
    tensors = {x.name: x for x in self._tensors.values()}
    assembly.check_tensors(
      {name: x.shape for name, x in tensors.items()},
      {in_files.get(k, names.released_name(k)): v for k, v in wanted.items()},
      f"checkpoint {self._directory}",
      faults=faults | type_faults(tensors),
    )


def read_headers(path: epath.Path) -> list[Tensor]:
  """The tensors of a safetensors file; raises an OSError if it is damaged."""
  if paths.is_remote(path):
    return _read_remote_headers(path)
  # That of `epath` takes a pipe for a file.
  if path.exists() and not pathlib.Path(path).is_file():
    raise OSError("it must be a regular file")
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return [
        Tensor(path, name, tuple(part.get_shape()), part.get_dtype())
        for name in file.keys()  # noqa: SIM118, it is no dict.
        for part in [file.get_slice(name)]
      ]
  except safetensors.SafetensorError as error:
    raise OSError(str(error)) from error


def _read_remote_headers(path: epath.Path) -> list[Tensor]:
  file = remote.File(path)
  head = file.start_read(0, min(8, file.size))()
  length = int.from_bytes(head, "little")
  if 0 < length <= min(_MAX_HEADER_BYTES, file.size - 8):
    head += file.start_read(8, 8 + length)()
  # The library checks a local file without data: a hole, which takes no space.
  with tempfile.NamedTemporaryFile() as copy:
    copy.write(head)
    copy.truncate(file.size)
    copy.flush()
    tensors = read_headers(epath.Path(copy.name))
  entries = json.loads(head[8:])
  starts = {x.name: entries[x.name]["data_offsets"][0] for x in tensors}
  return [
    x._replace(path=path, file=file, start=len(head) + starts[x.name])
    for x in tensors
  ]


def type_faults(tensors: Mapping[str, Tensor]) -> dict[str, str]:
  """Those of the tensors whose type cannot be read, with the reason."""
  return {
    name: f"of type {x.dtype}, wanted {', '.join(_DTYPES)}"
    for name, x in tensors.items()
    if x.dtype not in _DTYPES
  }


def save(
  config: gemma3_config.ModelConfig,
  params: Any,
  directory: str | os.PathLike[str],
  *,
  dtype: Any = jnp.float32,
  files: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
  """Saves a checkpoint that transformers loads and that gives the same logits.

  Every process takes part, because each may hold a part of the parameters; the
  first one writes. `files` are those beside the weights by name, as bytes or as
  values for JSON; the generation settings among them get our special ids.

  Raises:
    ValueError: If `directory` holds a checkpoint.
  """
  check_no_checkpoint(directory)
  is_writer = jax.process_index() == 0
  unfinished = make_unfinished(directory) if is_writer else None
  kind = np.dtype(dtype)
  shards = list(_shards(params, config, kind))
  weight_map, total = {}, 0
  for number, shard in enumerate(shards, start=1):
    name = f"model-{number:05}-of-{len(shards):05}.safetensors"
    name = _SINGLE if len(shards) == 1 else name
    tensors = {tensor: make() for tensor, make in shard.items()}
    weight_map |= dict.fromkeys(tensors, name)
    total += sum(tensor.nbytes for tensor in tensors.values())
    if unfinished:
      write_tensors(tensors, unfinished / name)
  if not unfinished:
    return
  values = huggingface_config.to_json(config, kind.name)
  ids = ("bos_token_id", "eos_token_id", "pad_token_id")
  text = values.get("text_config", values)
  generation = files.get(GENERATION_CONFIG, {}) | {x: text[x] for x in ids}
  written = {**files, GENERATION_CONFIG: generation, _CONFIG: values}
  if config.has_score:  # It generates nothing.
    del written[GENERATION_CONFIG]
  if len(shards) > 1:
    size = {"total_size": total}
    written[_INDEX] = {"metadata": size, "weight_map": weight_map}
  finish(unfinished, written)
  logging.info("Wrote %d bytes of parameters to %s.", total, directory)


def make_unfinished(directory: str | os.PathLike[str]) -> epath.Path:
  """An empty folder inside, to write to; in a bucket `directory` itself."""
  if paths.is_remote(directory):
    return epath.Path(directory)
  unfinished = pathlib.Path(directory) / ".unfinished"
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir(parents=True)
  return epath.Path(unfinished)


def write_tensors(tensors: dict[str, np.ndarray], path: epath.Path) -> None:
  """Writes a file of an unfinished folder."""
  metadata = {"format": "pt"}
  if paths.is_remote(path):
    paths.write_whole(path, safetensors.numpy.save(tensors, metadata))
  else:
    safetensors.numpy.save_file(tensors, path, metadata)


def finish(unfinished: epath.Path, files: Mapping[str, Any]) -> None:
  """Adds files to an unfinished folder and moves all up, config.json last.

  All get the permissions of a new file, which safetensors does not give.
  """
  for name in sorted(files, key=lambda x: x == _CONFIG):
    content = files[name]
    if not isinstance(content, bytes):
      text = json.dumps(content, indent=2, sort_keys=True) + "\n"
      content = text.encode()
    paths.write_whole(unfinished / name, content)
  if paths.is_remote(unfinished):
    return
  folder = pathlib.Path(unfinished)
  mode = (folder / next(iter(files))).stat().st_mode & 0o777
  for path in sorted(folder.iterdir(), key=lambda x: x.name == _CONFIG):
    path.chmod(mode)
    path.replace(folder.parent / path.name)
  folder.rmdir()


def check_no_checkpoint(directory: str | os.PathLike[str]) -> None:
  """Raises a ValueError if a folder already holds a checkpoint.

  In a bucket the file of settings comes last: without one it is unfinished, and
  is written again.
  """
  if paths.is_remote(directory):
    found = objects.list_objects(directory, what="--workdir").keys() & _LAST
  else:
    folder = pathlib.Path(directory)
    if folder.exists() and not folder.is_dir():
      raise ValueError(f"{folder} must be a folder; move the file away.")
    files = *folder.glob("*.safetensors"), *folder.glob(_CONFIG)
    found = [x.name for x in files]
  if found:
    raise ValueError(
      f"{directory} must not hold a checkpoint yet, and has {min(found)}; move "
      "it away or delete it."
    )


def _files(directory: epath.Path) -> list[epath.Path]:
  """The files with the tensors of a folder."""
  path = directory / _INDEX
  try:
    index = untrusted.read_json(path)
  except FileNotFoundError:
    return [directory / _SINGLE]
  files = untrusted.get_field(index, "weight_map", dict, str(path)).values()
  untrusted.check_items(files, str, f"the weight_map of {path}")
  for name in files:
    if pathlib.PurePath(name).name != name or not name.endswith(_SUFFIX):
      raise ValueError(
        f"{path} must name files beside it, not "
        f"{untrusted.shorten(name)}; give the index of the checkpoint."
      )
  if not files:
    raise ValueError(f"{path} must name the files of tensors.")
  return [directory / name for name in sorted(set(files))]


def _are_equal(a: Tensor, b: Tensor) -> bool:
  """Compares two tensors, a chunk at a time."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  rows, step = a.shape[0], max(1, _CHUNK_BYTES // a.row_bytes)
  chunks = ((i, min(i + step, rows)) for i in range(0, rows, step))
  pairs = ((a.start_read(*x)(), b.start_read(*x)()) for x in chunks)
  return all(itertools.starmap(np.array_equal, pairs))


def _shards(
  params: Any, config: gemma3_config.ModelConfig, dtype: np.dtype
) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
  """For each file, functions that make its tensors, by name."""
  shard, size = {}, 0
  for path, x in leaves.by_path(params).items():
    leaf = leaves.LEAVES[path]
    num_bytes = math.prod(x.shape[leaf.num_stacked :]) * dtype.itemsize
    for index in np.ndindex(*x.shape[: leaf.num_stacked]):
      if shard and size + num_bytes > _SHARD_BYTES:
        yield shard
        shard, size = {}, 0
      name = leaf.tensor("huggingface", index)
      is_embedding = name == names.EMBEDDING
      rows = huggingface_config.num_rows(config) if is_embedding else 0
      exported = name.replace("text.", "model.", 1)
      exported = names.released_name(name) if config.vision else exported
      shard[exported] = functools.partial(_tensor, leaf, x, index, dtype, rows)
      size += num_bytes
  yield shard


def _tensor(
  leaf: leaves.Leaf,
  x: Any,
  index: tuple[int, ...],
  dtype: np.dtype,
  rows: int,
) -> np.ndarray:
  """A tensor of a file, made from its leaf."""
  axes = leaf.axes[leaf.num_stacked :]
  order = [axes.index(axis) for axis in leaf.file_axes.replace(" ", "")]
  piece = on_host(x[index] if index else x).transpose(order)
  tensor = piece.reshape(leaf.file_shape(leaf.sizes(x.shape))).astype(dtype)
  if rows > len(tensor):
    # Never learned; their mean gives them the mean likelihood, as released.
    mean = piece.astype(np.float32).mean(axis=0, keepdims=True)
    spare = np.broadcast_to(mean, (rows - len(tensor), tensor.shape[1]))
    tensor = np.concatenate([tensor, spare.astype(dtype)])
  return np.ascontiguousarray(tensor)


def on_host(x: Any) -> np.ndarray:
  """The whole array, even if other processes hold parts of it."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)
