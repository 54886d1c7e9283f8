"""What all processes of a run take to be so, where each saw but its own part.

Every function is called by all processes, in the same order, from the main
thread. A program that is one process agrees with itself at no cost.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

_BLOCK = 4096  # Bytes sent at a time, so that few sizes are ever compiled.


def num_processes() -> int:
  """How many there are; unlike jax's own, it starts no device."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first_process() -> bool:
  """Whether this process is the one that decides and writes."""
  return num_processes() == 1 or jax.process_index() == 0


def gather_bytes(data: bytes) -> list[bytes]:
  """What each process has, of any length, in the order of their indices."""
  if num_processes() == 1:
    return [data]
  sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))
  sizes = np.ravel(sizes).tolist()
  # Doubled from a block on, so that few sizes are ever compiled.
  width = _BLOCK << max(0, -(-max(sizes) // _BLOCK) - 1).bit_length()
  rows = multihost_utils.process_allgather(_bytes(data, width))
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def broadcast_string(words: str) -> str:
  """What the first process says; the words of the others are of no matter."""
  if num_processes() == 1:
    return words
  encoded = words.encode()
  size = multihost_utils.broadcast_one_to_all(np.int32(len(encoded)))
  width = -(-int(size) // _BLOCK) * _BLOCK
  # Cut too, for on the others it may be longer.
  row = _bytes(encoded[:width], width)
  return _text(multihost_utils.broadcast_one_to_all(row))


def first_error(words: str) -> str:
  """What the first process that has one complains of; "" if none has.

  It says which process that is, where there are several.
  """
  for index, complaint in enumerate(gather_bytes(words.encode())):
    if complaint:
      said = complaint.decode()
      return said if num_processes() == 1 else f"{said} (process {index})"
  return ""


def _bytes(encoded: bytes, width: int) -> np.ndarray:
  return np.frombuffer(encoded.ljust(width, b"\0"), np.uint8)


def _text(row: np.ndarray) -> str:
  return np.asarray(row).tobytes().rstrip(b"\0").decode(errors="ignore")
