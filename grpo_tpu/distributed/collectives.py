"""Exchange of strings and bytes between the processes of a run.

All processes call these functions, in the same order, from the main thread.
With a single process nothing is sent.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines.validation import run_errors

_BLOCK = 4096  # Messages are padded to blocks, so that few sizes are compiled.


def num_processes() -> int:
  """The number of processes; unlike `jax.process_count`, starts no device."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first_process() -> bool:
  """True on process 0, which decides and writes."""
  return num_processes() == 1 or jax.process_index() == 0


def gather_bytes(data: bytes) -> list[bytes]:
  """The bytes of every process, of any length, by process index.

  Raises:
    RuntimeError: Another process is lost.
  """
  if num_processes() == 1:
    return [data]
  with run_errors("exchange data with the other processes"):
    return _gather(data)


def _gather(data: bytes) -> list[bytes]:
  sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))
  sizes = np.ravel(sizes).tolist()
  # A power of two of blocks.
  width = _BLOCK << max(0, -(-max(sizes) // _BLOCK) - 1).bit_length()
  row = np.frombuffer(data.ljust(width, b"\0"), np.uint8)
  rows = multihost_utils.process_allgather(row)
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def broadcast_string(text: str) -> str:
  """The string of process 0; the strings of the others are ignored."""
  return gather_bytes(text.encode())[0].decode()


def first_error(error: str) -> str:
  """The error of the first process that has one; "" if none has.

  With several processes, the index of that process follows in parentheses.
  """
  for index, encoded in enumerate(gather_bytes(error.encode())):
    if encoded:
      suffix = f" (process {index})" if num_processes() > 1 else ""
      return encoded.decode() + suffix
  return ""
