"""Loads the tensors of files by blocks of rows.

Hosts share the rows of a tensor where their number allows it, and exchange what
their devices need. A host reads no row twice, and those of a bucket ahead of
their use. Knows nothing of the format of a file.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3.convert import assembly

# Bytes that are read at once, and most bytes that wait for their use.
_BLOCK_BYTES = 4 << 20
_AHEAD_BYTES = 32 << 20
# A tensor, its index along the leaf's axis `n`, its first row and its last.
_Block = tuple[Any, int, int, int]


def load(
  abstract_params: dict, find: Callable[[leaves.Leaf, int | None], Sequence]
) -> dict:
  """Loads a tree; `find` gives a leaf's tensors in a layer, None for no layer.

  They have `row_bytes`, and `start_read` of a start and a stop, which returns a
  function that waits for these rows.
  """

  def piece(layer: int | None, path: str, shape: Any) -> _Piece:
    leaf = leaves.LEAVES[path]
    return _Piece(leaf, shape, find(leaf, layer))

  rows = _read_ahead(
    block
    for layer, wanted in assembly.pieces(abstract_params)
    for path, shape in wanted.items()
    for block in piece(layer, path, shape).blocks()
  )
  memory = {}  # Of the layers: it costs more to get it than to fill it.

  def read(layer: int | None, wanted: dict[str, Any]):
    for path, shape in wanted.items():
      again = {} if layer is None else memory
      yield path, piece(layer, path, shape).make(rows, again)

  return assembly.assemble(abstract_params, read)


class _Piece:
  """The parts of a leaf, or of its layer, that this host reads."""

  def __init__(
    self, leaf: leaves.Leaf, wanted: jax.ShapeDtypeStruct, tensors: Sequence
  ) -> None:
    """Takes the tensors in the order of the axis `n`, which no rule splits."""
    self._wanted, self._tensors = wanted, tensors
    self._axes = leaf.axes[-len(wanted.shape) :]
    sizes = dict(zip(self._axes, wanted.shape, strict=True))
    self._first, *self._others = leaf.file_axes.replace(" ", "")
    self._shape = -1, *(sizes[axis] for axis in self._others)
    # The file may merge axes: a row of our first one is so many of its rows.
    merged = leaf.file_axes.split()[0][1:]
    self._tail = math.prod(sizes[axis] for axis in merged)
    self._sharding = _share_rows(wanted, self._axes.index(self._first))
    indices = self._sharding.addressable_devices_indices_map(wanted.shape)
    self._parts = dict.fromkeys(map(self._slices, indices.values()))

  def blocks(self) -> Iterator[_Block]:
    """The blocks that hold the parts, in order."""
    at, tail = self._axes.index(self._first), self._tail
    for matrix, tensor in enumerate(self._tensors):
      step = max(1, _BLOCK_BYTES // (tail * tensor.row_bytes))
      for rows in dict.fromkeys(part[at] for part in self._parts):
        for start in range(rows.start, rows.stop, step):
          stop = min(start + step, rows.stop)
          yield tensor, matrix, start * tail, stop * tail

  def make(self, data: Iterator[np.ndarray], memory: dict) -> jax.Array:
    """Puts the parts on devices; `data` are the blocks' rows in order.

    `memory` has arrays to use again, by part and size; it gets those it lacks.
    """
    outs = {}
    for number, part in enumerate(self._parts):
      shape = tuple(x.stop - x.start for x in part)
      key = number, self._wanted.dtype, shape
      if key not in memory:
        memory[key] = _aligned_empty(shape, np.dtype(self._wanted.dtype))
      outs[part] = memory[key]
    axes = self._axes.removeprefix("n")
    order = [axes.index(axis) for axis in (self._first, *self._others)]
    for _, matrix, first, _ in self.blocks():
      rows, start = next(data).reshape(self._shape), first // self._tail
      for part, out in outs.items():
        cut = dict(zip(self._axes, part, strict=True))
        mine = cut[self._first]
        if mine.start <= start < mine.stop:
          out = (out[matrix] if "n" in cut else out).transpose(order)
          out = out[start - mine.start :][: len(rows)]
          out[...] = rows[:, *(cut[axis] for axis in self._others)]
    return jax.make_array_from_callback(
      self._wanted.shape, self._sharding, lambda x: outs[self._slices(x)]
    )

  def _slices(self, index: Any) -> tuple[slice, ...]:
    pairs = zip(index, self._wanted.shape, strict=True)
    return tuple(slice(*x.indices(size)[:2]) for x, size in pairs)


def _read_ahead(blocks: Iterable[_Block]) -> Iterator[np.ndarray]:
  """Reads blocks in order; of files in a bucket, several at once."""
  waiting, ahead = collections.deque(), 0
  for tensor, _, start, stop in blocks:
    size = (stop - start) * tensor.row_bytes
    while waiting and ahead + size > _AHEAD_BYTES:
      done, wait = waiting.popleft()
      ahead -= done
      yield wait()
    waiting.append((size, tensor.start_read(start, stop)))
    ahead += size
  for _, wait in waiting:
    yield wait()


def _share_rows(wanted: jax.ShapeDtypeStruct, axis: int) -> NamedSharding:
  """Shards a file's rows over all devices, if several hosts can share them."""
  mesh = wanted.sharding.mesh
  if jax.process_count() == 1 or wanted.shape[axis] % mesh.size:
    return wanted.sharding
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An empty array, aligned so that a CPU device can use it without a copy."""
  num_bytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(num_bytes + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + num_bytes].view(dtype).reshape(shape)
