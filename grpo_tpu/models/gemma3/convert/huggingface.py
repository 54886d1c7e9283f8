"""Loads the parameter tree from Hugging Face safetensors, and saves it.

Loading reads one tensor at a time, and only the slices that this host's devices
hold. `huggingface_config` knows the sizes, `huggingface_layout` the tensor of
each leaf.

References:
  safetensors, https://huggingface.co/docs/safetensors
"""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from jax.experimental import multihost_utils

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3.convert import assembly, huggingface_config
from grpo_tpu.models.gemma3.convert import huggingface_layout as layouts

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CONFIG = "config.json"
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
# Bytes of a file in host memory at a time, and of a file that is written.
_CHUNK_BYTES = 64 << 20
_SHARD_BYTES = 2 << 30
# Files that are copied beside the weights.
_TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "preprocessor_config.json",
  "processor_config.json",
)


class _Tensor(NamedTuple):
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
    self, directory: str | os.PathLike[str], abstract_params: Any
  ) -> None:
    """Checks every header; reads no tensor but a head that must be tied.

    Args:
      directory: A folder with one or more *.safetensors.
      abstract_params: Shapes of the tree. Its embedding may be shorter than the
        file's, as `huggingface_config.differences` allows.

    Raises:
      ValueError: Lists every tensor that is missing, left over, misshaped or of
        a wrong type.
    """
    self._directory = pathlib.Path(directory)
    self._tensors: dict[str, _Tensor] = {}
    faults = self._read_headers()
    faults += self._compare(_file_shapes(abstract_params))
    if faults:
      raise ValueError(
        f"{self._directory} does not hold the tensors of this model:\n"
        + "\n".join(f"  {fault}" for fault in faults)
        + "\nGive a whole checkpoint of the model named."
      )

  @property
  def dtype(self) -> np.dtype:
    """Type of the embedding, and so of the decoder."""
    return np.dtype(_DTYPES[self._tensors[layouts.EMBEDDING].dtype])

  def load(self, abstract_params: Any) -> Any:
    """Loads the tree with these shapes, types and shardings.

    Beyond the parameters themselves, the host holds at most its own devices'
    part of one leaf at a time.
    """
    params = assembly.assemble(abstract_params, self._read)
    logging.info("Read the parameters of %s.", self._directory)
    return params

  def _read(
    self, layer: int | None, wanted: Mapping[str, jax.ShapeDtypeStruct]
  ) -> Iterator[tuple[str, jax.Array]]:
    """Reads the given pieces of a layer."""
    for path, piece in wanted.items():
      yield path, self._piece(path, layer, piece)

  def _piece(
    self, path: str, layer: int | None, wanted: jax.ShapeDtypeStruct
  ) -> jax.Array:
    layout = layouts.LAYOUTS[path]
    axes = layout.ours if layer is None else layout.ours.removeprefix("l")
    stacked = () if layer is None else (layer,)
    sizes = dict(zip(axes, wanted.shape, strict=True))
    # Devices that hold the same slice share what was read once.
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      key = str(index)
      if key not in parts:
        bounds = {
          axis: slice(*x.indices(sizes[axis])[:2])
          for axis, x in zip(axes, index, strict=True)
        }
        parts[key] = self._slices(layout, stacked, sizes, bounds, wanted.dtype)
      return parts[key]

    return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)

  def _slices(
    self,
    layout: layouts.Layout,
    stacked: tuple[int, ...],
    sizes: Mapping[str, int],
    bounds: dict[str, slice],
    dtype: np.dtype,
  ) -> np.ndarray:
    """Reads slices of a piece from the tensors that hold its parts."""
    shape = tuple(x.stop - x.start for x in bounds.values())
    out = _aligned_empty(shape, np.dtype(dtype))
    if "p" not in bounds:
      _copy(self._tensors[layout.tensor(stacked)], layout, sizes, bounds, out)
      return out
    parts = bounds.pop("p")
    for values, part in zip(out, range(parts.start, parts.stop), strict=True):
      tensor = self._tensors[layout.tensor((*stacked, part))]
      _copy(tensor, layout, sizes, bounds, values)
    return out

  def _read_headers(self) -> list[str]:
    """Fills in the tensors of all files; returns faults."""
    faults = []
    for path in _files(self._directory):
      try:
        with safetensors.safe_open(path, framework="numpy") as file:
          for name in file.keys():  # noqa: SIM118, it is no dict.
            part = file.get_slice(name)
            tensor = _Tensor(
              path, name, tuple(part.get_shape()), part.get_dtype()
            )
            common = layouts.common_name(name)
            if common in self._tensors:
              faults.append(f"{name}: there twice")
            elif not layouts.UNUSED.match(common):
              self._tensors[common] = tensor
      except (OSError, safetensors.SafetensorError) as error:
        faults.append(f"{path.name}: cannot be read ({error})")
    return faults

  def _compare(self, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The faults of the tensors."""
    faults = []
    for name in sorted(wanted.keys() | self._tensors.keys() - {layouts.HEAD}):
      tensor, shape = self._tensors.get(name), wanted.get(name)
      if tensor is None:
        faults.append(f"{layouts.released_name(name)}: missing, wanted {shape}")
      elif shape is None:
        faults.append(f"{tensor.name}: left over, {tensor.shape}")
      elif tensor.shape != shape and not _is_longer(name, tensor.shape, shape):
        faults.append(f"{tensor.name}: {tensor.shape}, wanted {shape}")
      elif tensor.dtype not in _DTYPES:
        faults.append(
          f"{tensor.name}: of type {tensor.dtype}, wanted {', '.join(_DTYPES)}"
        )
    head, embedding = (
      self._tensors.get(layouts.HEAD),
      self._tensors.get(layouts.EMBEDDING),
    )
    if head and embedding and not _are_equal(head, embedding):
      faults.append(
        f"{head.name}: differs from the embedding, to which it must be tied"
      )
    return faults


def save(
  config: gemma3_config.ModelConfig,
  params: Any,
  directory: str | os.PathLike[str],
  *,
  dtype: Any = None,
  tokenizer_dir: str | os.PathLike[str] | None = None,
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Saves a checkpoint that transformers loads and that gives the same logits.

  Every process takes part, because each may hold a part of the parameters; the
  first one writes. config.json comes last.

  Args:
    config: Sizes of the network.
    params: The tree, on any devices.
    directory: A folder without a checkpoint; it is created if missing.
    dtype: Type of all tensors; None keeps the type of each.
    tokenizer_dir: Folder of the tokenizer and processor files to copy, if any.
    shard_bytes: Most bytes of tensors in a file, unless one tensor is larger.

  Raises:
    ValueError: If `directory` holds a checkpoint.
  """
  directory = pathlib.Path(directory)
  check_no_checkpoint(directory)
  is_writer = jax.process_index() == 0
  unfinished = directory / ".unfinished"
  if is_writer:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
  kind = np.dtype(dtype or params["embedder"]["input_embedding"].dtype)
  shards = list(_shards(params, config, dtype, shard_bytes))
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
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(unfinished / _INDEX, index)
  values = huggingface_config.to_json(config, kind.name)
  _write_companions(unfinished, values, tokenizer_dir)
  for path in sorted(unfinished.iterdir(), key=lambda x: x.name == _CONFIG):
    os.replace(path, directory / path.name)
  unfinished.rmdir()
  logging.info("Wrote %d bytes of parameters to %s.", total, directory)


def _write_companions(
  folder: pathlib.Path,
  values: dict[str, Any],
  tokenizer_dir: str | os.PathLike[str] | None,
) -> None:
  """Writes config.json and the other files beside the weights."""
  _write_json(folder / _CONFIG, values)
  text = values.get("text_config", values)
  ids = ("bos_token_id", "eos_token_id", "pad_token_id")
  _write_json(
    folder / "generation_config.json", {name: text[name] for name in ids}
  )
  for name in _TOKENIZER_FILES if tokenizer_dir else ():
    if (path := pathlib.Path(tokenizer_dir or "") / name).is_file():
      shutil.copy(path, folder / name)


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


def _leaves(tree: Any) -> Iterator[tuple[layouts.Layout, Any]]:
  """Each leaf with its layout, in the order of the tree."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield layouts.layout_of(path), leaf


def _file_shapes(abstract_params: Any) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor of the tree, by its name in files."""
  return {
    layout.tensor(index): layout.file_shape(leaf.shape)
    for layout, leaf in _leaves(abstract_params)
    for index in np.ndindex(*leaf.shape[: layout.num_stacked])
  }


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The files with the tensors of a folder."""
  if not (directory / _INDEX).is_file():
    return [directory / _SINGLE]
  index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
  return [
    directory / name for name in sorted(set(index["weight_map"].values()))
  ]


def _is_longer(
  name: str, there: tuple[int, ...], here: tuple[int, ...]
) -> bool:
  """True if the tensor is an embedding with more rows than needed."""
  return (
    name == layouts.EMBEDDING and there[0] > here[0] and there[1:] == here[1:]
  )


def _are_equal(a: _Tensor, b: _Tensor) -> bool:
  """Compares two tensors, a chunk at a time."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  rows = max(1, _CHUNK_BYTES // (4 * math.prod(a.shape[1:])))
  starts = range(0, a.shape[0], rows)
  parts = [(slice(i, min(i + rows, a.shape[0])),) for i in starts]
  return all(np.array_equal(a.read(part), b.read(part)) for part in parts)


def _copy(
  tensor: _Tensor,
  layout: layouts.Layout,
  sizes: Mapping[str, int],
  bounds: Mapping[str, slice],
  out: np.ndarray,
) -> None:
  """Fills `out` with a part of a tensor, with the axes and type of `out`.

  Args:
    tensor: The tensor in its file, where one axis may merge several of ours.
    layout: The layout of the leaf.
    sizes: Length of each of our axes.
    bounds: Slice of each of our axes, in the order of `out`.
    out: The array to fill.
  """
  axes, groups = [*bounds], layout.file.split()
  order = [axis for group in groups for axis in group]
  # A view with the axes in the order of the file.
  by_file = out.transpose([axes.index(axis) for axis in order])
  # Reads a slice of the first of merged axes, and slices the others after.
  tails = [math.prod(sizes[axis] for axis in group[1:]) for group in groups]
  firsts = [bounds[group[0]] for group in groups]
  cuts = [
    slice(first.start * tail, first.stop * tail)
    for first, tail in zip(firsts, tails, strict=True)
  ]
  split = [
    n
    for first, group in zip(firsts, groups, strict=True)
    for n in (first.stop - first.start, *(sizes[a] for a in group[1:]))
  ]
  inner = tuple(
    slice(None) if axis in {group[0] for group in groups} else bounds[axis]
    for axis in order
  )
  row_bytes = 4 * tails[0] * math.prod(cut.stop - cut.start for cut in cuts[1:])
  rows = max(1, _CHUNK_BYTES // max(row_bytes, 1))
  first, tail = firsts[0], tails[0]
  for start in range(first.start, first.stop, rows):
    stop = min(start + rows, first.stop)
    block = tensor.read((slice(start * tail, stop * tail), *cuts[1:]))
    block = block.reshape(stop - start, *split[1:])[inner]
    by_file[start - first.start : stop - first.start] = block


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An empty array, aligned so that a CPU device can use it without a copy."""
  num_bytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(num_bytes + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _shards(
  params: Any,
  config: gemma3_config.ModelConfig,
  dtype: np.dtype | None,
  shard_bytes: int,
) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
  """For each file, functions that make its tensors, by name."""
  shard, size = {}, 0
  for layout, leaf in _leaves(params):
    kind = np.dtype(dtype or leaf.dtype)
    num_bytes = math.prod(layout.file_shape(leaf.shape)) * kind.itemsize
    for index in np.ndindex(*leaf.shape[: layout.num_stacked]):
      if shard and size + num_bytes > shard_bytes:
        yield shard
        shard, size = {}, 0
      name = layout.tensor(index)
      rows = (
        huggingface_config.num_rows(config)
        if name == layouts.EMBEDDING
        else None
      )
      shard[_exported_name(name, config)] = functools.partial(
        _tensor, layout, leaf, index, kind, rows
      )
      size += num_bytes
  yield shard


def _exported_name(name: str, config: gemma3_config.ModelConfig) -> str:
  if config.vision:
    return layouts.released_name(name)
  return name.replace("text.", "model.", 1)


def _tensor(
  layout: layouts.Layout,
  leaf: Any,
  index: tuple[int, ...],
  dtype: np.dtype,
  rows: int | None,
) -> np.ndarray:
  """A tensor of a file, made from its leaf."""
  axes = layout.ours[layout.num_stacked :]
  order = [axis for group in layout.file.split() for axis in group]
  piece = _on_host(leaf[index] if index else leaf)
  piece = piece.transpose([axes.index(axis) for axis in order])
  tensor = piece.reshape(layout.file_shape(leaf.shape)).astype(dtype)
  if rows is not None and rows > len(tensor):
    # Never learned; their mean gives them the mean likelihood, as released.
    mean = piece.astype(np.float32).mean(axis=0, keepdims=True)
    spare = np.broadcast_to(mean, (rows - len(tensor), tensor.shape[1]))
    tensor = np.concatenate([tensor, spare.astype(dtype)])
  return np.ascontiguousarray(tensor)


def _on_host(x: Any) -> np.ndarray:
  """The whole array, even if other processes hold parts of it."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def _write_json(path: pathlib.Path, values: Any) -> None:
  path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
