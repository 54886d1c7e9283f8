"""Blocks of rows of the tensors in files, and the parts of leaves they fill.

Hosts share the rows of a tensor where their number allows it, and exchange what
their devices need. A host reads no row twice, and those of a bucket ahead of
their use. Knows nothing of the format of a file.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grpo_tpu.models.gemma3 import leaves

# Bytes that are read at once, and most bytes that wait for their use.
_BLOCK_BYTES = 8 << 20
_AHEAD_BYTES = 64 << 20


class Block(NamedTuple):
  """Rows of a tensor in a file."""

  tensor: Any  # Has `row_bytes` and `start_read`, as `huggingface.Tensor`.
  matrix: int  # Of the tensor along the leaf's axis `n`.
  start: int
  stop: int


class Piece:
  """The parts of a leaf, or of its layer, that this host reads."""

  def __init__(
    self, leaf: leaves.Leaf, wanted: jax.ShapeDtypeStruct, tensors: Sequence
  ) -> None:
    """Takes the tensors in the order of the axis `n`, which no rule splits."""
    self._wanted, self._tensors = wanted, tensors
    self._axes = leaf.axes[-len(wanted.shape) :]
    self._sizes = dict(zip(self._axes, wanted.shape, strict=True))
    self._first, *self._others = leaf.file_axes.replace(" ", "")
    # The file may merge axes: a row of our first one is so many of its rows.
    merged = leaf.file_axes.split()[0][1:]
    self._tail = math.prod(self._sizes[axis] for axis in merged)
    self._sharding = _share_rows(wanted, self._axes.index(self._first))
    indices = self._sharding.addressable_devices_indices_map(wanted.shape)
    self._parts = dict.fromkeys(map(self._slices, indices.values()))

  def blocks(self) -> Iterator[Block]:
    """The blocks that hold the parts, in order."""
    at, tail = self._axes.index(self._first), self._tail
    for matrix, tensor in enumerate(self._tensors):
      step = max(1, _BLOCK_BYTES // (tail * tensor.row_bytes))
      for rows in dict.fromkeys(part[at] for part in self._parts):
        for start in range(rows.start, rows.stop, step):
          stop = min(start + step, rows.stop)
          yield Block(tensor, matrix, start * tail, stop * tail)

  def make(self, read: Callable[[Block], np.ndarray]) -> jax.Array:
    """Puts the parts on devices; `read` gets the blocks in order."""
    dtype, axes = np.dtype(self._wanted.dtype), self._axes.removeprefix("n")
    order = [axes.index(axis) for axis in (self._first, *self._others)]
    outs = {
      part: _aligned_empty(tuple(x.stop - x.start for x in part), dtype)
      for part in self._parts
    }
    for block in self.blocks():
      rows = read(block).reshape(-1, *(self._sizes[x] for x in self._others))
      start = block.start // self._tail
      for part, out in outs.items():
        cut = dict(zip(self._axes, part, strict=True))
        if cut[self._first].start <= start < cut[self._first].stop:
          at = start - cut[self._first].start
          matrix = out[block.matrix] if "n" in cut else out
          matrix.transpose(order)[at : at + len(rows)] = rows[
            :, *(cut[axis] for axis in self._others)
          ]
    return jax.make_array_from_callback(
      self._wanted.shape,
      self._sharding,
      lambda index: outs[self._slices(index)],
    )

  def _slices(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
    pairs = zip(index, self._wanted.shape, strict=True)
    return tuple(slice(*x.indices(size)[:2]) for x, size in pairs)


def read_ahead(blocks: Iterable[Block]) -> Iterator[np.ndarray]:
  """Reads blocks in order; of files in a bucket, several at once."""
  waiting = collections.deque()
  ahead = 0
  for block in blocks:
    size = (block.stop - block.start) * block.tensor.row_bytes
    while waiting and ahead + size > _AHEAD_BYTES:
      done, wait = waiting.popleft()
      ahead -= done
      yield wait()
    waiting.append((size, block.tensor.start_read(block.start, block.stop)))
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
