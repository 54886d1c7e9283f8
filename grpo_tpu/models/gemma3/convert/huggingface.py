"""Loads the parameter tree from Hugging Face safetensors, and saves it.

Loading reads one tensor at a time, and only the slices that this host's devices
hold. `huggingface_config` knows the sizes, `leaves` the tensors of each leaf.

References:
  safetensors, https://huggingface.co/docs/safetensors
"""

import functools
import json
import math
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from jax.experimental import multihost_utils

from data_pipelines.text import untrusted
from data_pipelines.validation import printable
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3.convert import assembly, huggingface_config
from grpo_tpu.models.gemma3.convert import huggingface_names as names

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_SUFFIX = ".safetensors"
_MAX_LISTED = 10
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
# Bytes of a file in host memory at a time, and most bytes of tensors in a file
# that is written, unless one tensor is larger.
_CHUNK_BYTES = 64 << 20
_SHARD_BYTES = 2 << 30


class Tensor(NamedTuple):
  """A tensor in a file, with the header's description."""

  path: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str

  def read(self, slices: tuple[slice, ...]) -> np.ndarray:
    """Reads a part. Opens the file each time, which frees mapped pages."""
    with safetensors.safe_open(self.path, framework="numpy") as file:
      return file.get_slice(self.name)[slices]


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
      ValueError: Lists every size that is not that of `config`, or every tensor
        that is missing, extra, misshaped or of a wrong type.
    """
    huggingface_config.check(directory, config)
    self._directory = pathlib.Path(directory)
    self._tensors: dict[str, Tensor] = {}
    faults = self._read_headers()
    wanted = leaves.file_shapes(abstract_params, "huggingface")
    self._check_tensors(wanted, faults)

  def load(self, abstract_params: Any) -> Any:
    """Loads the tree with these shapes, types and shardings.

    Beyond the parameters themselves, the host holds at most its own devices'
    part of one leaf at a time.
    """
    params = assembly.assemble(
      abstract_params, assembly.one_by_one(self._piece)
    )
    logging.info("Read the parameters of %s.", self._directory)
    return params

  def _piece(
    self, layer: int | None, path: str, wanted: jax.ShapeDtypeStruct
  ) -> jax.Array:
    leaf = leaves.LEAVES[path]
    axes = leaf.axes if layer is None else leaf.axes.removeprefix("l")
    stacked = () if layer is None else (layer,)
    sizes = dict(zip(axes, wanted.shape, strict=True))

    @functools.cache  # Devices that hold the same slice read it once.
    def part(index: tuple[slice, ...]) -> np.ndarray:
      bounds = {
        axis: slice(*x.indices(sizes[axis])[:2])
        for axis, x in zip(axes, index, strict=True)
      }
      shape = tuple(x.stop - x.start for x in bounds.values())
      out = _aligned_empty(shape, np.dtype(wanted.dtype))
      matrices, matrix = bounds.pop("n", None), stacked
      for i in np.ndindex(shape[: matrices is not None]):
        if matrices:
          matrix = (*stacked, matrices.start + i[0])
        tensor = self._tensors[leaf.tensor("huggingface", matrix)]
        _copy(tensor, leaf, sizes, bounds, out[i])
      return out

    return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)

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
      wanted[names.EMBEDDING] = (rows, *width)
      # One that has another shape or type is refused below.
      is_readable = (
        embedding.shape == wanted[names.EMBEDDING]
        and embedding.dtype in _DTYPES
      )
      if head and is_readable and not _are_equal(head, embedding):
        faults[head.name] = (
          "differs from the embedding, to which it must be tied"
        )
    faults |= {
      self._tensors[common].name: fault
      for common, fault in type_faults(self._tensors).items()
    }
    in_files = {common: x.name for common, x in self._tensors.items()}
    assembly.check_tensors(
      {x.name: x.shape for x in self._tensors.values()},
      {in_files.get(k, names.released_name(k)): v for k, v in wanted.items()},
      f"checkpoint {self._directory}",
      faults=faults,
    )


def read_headers(path: pathlib.Path) -> list[Tensor]:
  """The tensors of a safetensors file; raises an OSError if it is damaged."""
  if path.exists() and not path.is_file():
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
  first one writes. config.json comes last.

  Args:
    config: Sizes of the network.
    params: The tree, on any devices.
    directory: A folder without a checkpoint; it is created if missing.
    dtype: Type of all tensors.
    files: Files beside the weights by name, as bytes or as values for JSON.
      The generation settings get our special ids.

  Raises:
    ValueError: If `directory` holds a checkpoint.
  """
  directory = pathlib.Path(directory)
  check_no_checkpoint(directory)
  is_writer = jax.process_index() == 0
  unfinished = make_unfinished(directory) if is_writer else directory
  kind = np.dtype(dtype)
  shards = list(_shards(params, config, kind))
  weight_map, total = {}, 0
  for number, shard in enumerate(shards, start=1):
    name = f"model-{number:05}-of-{len(shards):05}.safetensors"
    name = _SINGLE if len(shards) == 1 else name
    tensors = {tensor: make() for tensor, make in shard.items()}
    weight_map |= dict.fromkeys(tensors, name)
    total += sum(tensor.nbytes for tensor in tensors.values())
    if is_writer:
      safetensors.numpy.save_file(
        tensors, unfinished / name, metadata={"format": "pt"}
      )
  if not is_writer:
    return
  values = huggingface_config.to_json(config, kind.name)
  ids = ("bos_token_id", "eos_token_id", "pad_token_id")
  text = values.get("text_config", values)
  generation = files.get(GENERATION_CONFIG, {}) | {x: text[x] for x in ids}
  written = {**files, GENERATION_CONFIG: generation, _CONFIG: values}
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    written[_INDEX] = index
  finish(unfinished, written)
  logging.info("Wrote %d bytes of parameters to %s.", total, directory)


def make_unfinished(directory: str | os.PathLike[str]) -> pathlib.Path:
  """An empty folder inside `directory` to write to; see `finish`."""
  unfinished = pathlib.Path(directory) / ".unfinished"
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir(parents=True)
  return unfinished


def finish(unfinished: pathlib.Path, files: Mapping[str, Any]) -> None:
  """Adds files to an unfinished folder and moves all up, config.json last.

  `files`, at least one, are bytes, or values for JSON, by name. All get the
  permissions of a new file, which safetensors does not give.
  """
  for name, content in files.items():
    if not isinstance(content, bytes):
      text = json.dumps(content, indent=2, sort_keys=True) + "\n"
      content = text.encode()
    (unfinished / name).write_bytes(content)
  mode = (unfinished / next(iter(files))).stat().st_mode & 0o777
  for path in sorted(unfinished.iterdir(), key=lambda x: x.name == _CONFIG):
    path.chmod(mode)
    os.replace(path, unfinished.parent / path.name)
  unfinished.rmdir()


def check_no_checkpoint(directory: str | os.PathLike[str]) -> None:
  """Raises a ValueError if a folder already holds a checkpoint."""
  directory = pathlib.Path(directory)
  if directory.exists() and not directory.is_dir():
    raise ValueError(f"{directory} must be a folder; move the file away.")
  found = [*directory.glob("*.safetensors"), *directory.glob(_CONFIG)]
  if found:
    raise ValueError(
      f"{directory} must not hold a checkpoint yet, and has {found[0].name}; "
      "move it away or delete it."
    )


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The files with the tensors of a folder."""
  if not (directory / _INDEX).is_file():
    return [directory / _SINGLE]
  path = directory / _INDEX
  index = untrusted.read_json(path)
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
  rows = max(1, _CHUNK_BYTES // (4 * math.prod(a.shape[1:])))
  starts = range(0, a.shape[0], rows)
  parts = [(slice(i, min(i + rows, a.shape[0])),) for i in starts]
  return all(np.array_equal(a.read(part), b.read(part)) for part in parts)


def _copy(
  tensor: Tensor,
  leaf: leaves.Leaf,
  sizes: Mapping[str, int],
  bounds: Mapping[str, slice],
  out: np.ndarray,
) -> None:
  """Fills `out` with a part of a tensor, with the axes and type of `out`.

  One axis of the file may merge several of ours, which have these lengths
  (`sizes`) and slices (`bounds`, in the order of `out`).
  """
  # Of merged axes the first is cut when read, and the others after that.
  cuts, shape, inner = [], [], []
  for first, *others in leaf.file_axes.split():
    part, tail = bounds[first], math.prod(sizes[axis] for axis in others)
    cuts.append(slice(part.start * tail, part.stop * tail))
    shape += [part.stop - part.start, *(sizes[axis] for axis in others)]
    inner += [slice(None), *(bounds[axis] for axis in others)]
  # A view with the axes in the order of the file.
  axes = [*bounds]
  order = leaf.file_axes.replace(" ", "")
  by_file = out.transpose([axes.index(axis) for axis in order])
  length, *others = [cut.stop - cut.start for cut in cuts]
  tail = length // max(shape[0], 1)
  rows = max(1, _CHUNK_BYTES // max(4 * tail * math.prod(others), 1))
  for start in range(0, shape[0], rows):
    stop = min(start + rows, shape[0])
    first = cuts[0].start
    read = slice(first + start * tail, first + stop * tail)
    block = tensor.read((read, *cuts[1:]))
    by_file[start:stop] = block.reshape(stop - start, *shape[1:])[tuple(inner)]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An empty array, aligned so that a CPU device can use it without a copy."""
  num_bytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(num_bytes + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _shards(
  params: Any, config: gemma3_config.ModelConfig, dtype: np.dtype
) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
  """For each file, functions that make its tensors, by name."""
  shard, size = {}, 0
  for path, x in leaves.by_path(params).items():
    leaf = leaves.LEAVES[path]
    num_bytes = math.prod(leaf.file_shape(leaf.sizes(x.shape))) * dtype.itemsize
    for index in np.ndindex(*x.shape[: leaf.num_stacked]):
      if shard and size + num_bytes > _SHARD_BYTES:
        yield shard
        shard, size = {}, 0
      name = leaf.tensor("huggingface", index)
      is_embedding = name == names.EMBEDDING
      rows = huggingface_config.num_rows(config) if is_embedding else None
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
  rows: int | None,
) -> np.ndarray:
  """A tensor of a file, made from its leaf."""
  axes = leaf.axes[leaf.num_stacked :]
  order = leaf.file_axes.replace(" ", "")
  piece = on_host(x[index] if index else x)
  piece = piece.transpose([axes.index(axis) for axis in order])
  shape = leaf.file_shape(leaf.sizes(x.shape))
  tensor = piece.reshape(shape).astype(dtype)
  if rows is not None and rows > len(tensor):
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
