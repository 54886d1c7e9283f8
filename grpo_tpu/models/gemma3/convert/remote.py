"""Reads parts of a file in a bucket; many requests may be under way at once."""

import os
from collections.abc import Callable

import tensorstore

from data_pipelines.storage import objects
from data_pipelines.validation import printable

_CONTEXT = {"gcs_request_retries": {"max_retries": 8}}  # About two minutes.


class File:
  """One version of an object, of `size` bytes; to read another is an error."""

  def __init__(self, path: str | os.PathLike[str]) -> None:
    self.size = objects.size_of(path)
    self._path = os.fspath(path)
    bucket, self._name = objects.split(path)
    spec = {"driver": "gcs", "bucket": bucket, "context": _CONTEXT}
    self._store = tensorstore.KvStore.open(spec).result()
    self._version = b""  # That of the first bytes that were read.

  def start_read(self, start: int, stop: int) -> Callable[[], bytes]:
    """Starts to read bytes; returns a function that waits for them.

    It raises a RuntimeError if the object has changed or cannot be read.
    """
    future = self._store.read(self._name, byte_range=slice(start, stop))

    def wait() -> bytes:
      try:
        read = future.result()
      except ValueError as error:  # TensorStore has no other class of errors.
        reason = printable(str(error).partition(" [")[0])
        raise RuntimeError(f"{self._path} cannot be read: {reason}") from error
      self._version = self._version or read.stamp.generation
      if read.state != "value" or read.stamp.generation != self._version:
        raise RuntimeError(
          f"{self._path} has changed while it was read; run the same command "
          "again when nothing writes there."
        )
      return read.value

    return wait
