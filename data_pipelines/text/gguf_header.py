"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

Every count, length and offset is checked against the bytes of the file before
anything is allocated for it.

References:
  GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_pipelines.text import untrusted

_VERSIONS = (2, 3)
# A vocabulary of 256k pieces takes about 6 MiB.
_MAX_HEADER_BYTES = 32 << 20
_MAX_DIMENSIONS = 4
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# The format's numbers of its scalar types, as codes of `struct`.
_SCALARS = {
  **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
  **{10: "Q", 11: "q", 12: "d"},
}


class Tensor(NamedTuple):
  """A tensor's description."""

  kind: int  # The format's number of the element type.
  shape: tuple[int, ...]  # The slowest axis first.
  start: int  # Its first byte in the file.


class Header(NamedTuple):
  """The header of a file."""

  num_bytes: int  # Size of the file.
  metadata: dict[str, Any]  # Numbers, booleans, strings and lists, by key.
  tensors: dict[str, Tensor]  # By name.


def read(path: str | os.PathLike[str], source: str) -> Header:
  """Reads the header of a local file; `source` names the file in errors."""
  if not untrusted.size_of(path):
    raise ValueError(f"{source} is empty.")
  with open(path, "rb") as file:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      return _Parser(content, source).header()


class _Parser:
  """Takes values from the start of a file, each only if it is all there."""

  def __init__(self, content: mmap.mmap, source: str):
    self._content, self._source = content, source
    self._end = min(len(content), _MAX_HEADER_BYTES)
    self._at = 0

  def header(self) -> Header:
    """The whole header."""
    if self._take(4, "its first word") != b"GGUF":
      raise ValueError(f"{self._source} does not begin with the word GGUF.")
    version = self._number("I")  # 2**24 and more if it is of big endian.
    if version not in _VERSIONS:
      raise ValueError(
        f"{self._source} has format version {version}, which must be one of "
        f"{', '.join(map(str, _VERSIONS))}."
      )
    num_tensors, num_keys = self._number("Q"), self._number("Q")
    metadata = self._unique(self._metadata(num_keys), "key")
    found = self._unique(self._tensors(num_tensors), "tensor")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    key = f"'general.alignment' in {self._source}"
    untrusted.check_kind(alignment, int, key)
    if alignment < 1 or alignment & (alignment - 1):
      raise ValueError(f"{key} must be a power of two, not {alignment}.")
    data = -(-self._at // alignment) * alignment
    tensors = {
      name: tensor._replace(start=data + tensor.start)
      for name, tensor in found.items()
    }
    return Header(len(self._content), metadata, tensors)

  def _metadata(self, count: int) -> Iterator[tuple[str, Any]]:
    for index in range(count):
      key = self._string(f"key {index}")
      kind = self._number("I")
      shown = untrusted.shorten(key)
      if kind == _ARRAY:
        kind, length = self._number("I"), self._number("Q")
        yield key, self._values(kind, length, shown)
      else:
        yield key, self._values(kind, 1, shown)[0]

  def _values(self, kind: int, count: int, what: str) -> list[Any]:
    if kind == _STRING:
      self._check_room(8 * count, what)
      return [self._string(what) for _ in range(count)]
    if kind not in _SCALARS:
      raise ValueError(
        f"{what} in {self._source} is of type {kind}, and must be "
        "a number, a boolean, a string or a list of one of these."
      )
    code = f"<{_SCALARS[kind]}"
    text = self._take(struct.calcsize(code) * count, what)
    return [value for (value,) in struct.iter_unpack(code, text)]

  def _tensors(self, count: int) -> Iterator[tuple[str, Tensor]]:
    for index in range(count):
      name = self._string(f"the name of tensor {index}")
      num_axes = self._number("I")
      if not 1 <= num_axes <= _MAX_DIMENSIONS:
        raise ValueError(
          f"tensor {untrusted.shorten(name)} in {self._source} has {num_axes} "
          f"axes, which must be 1 to {_MAX_DIMENSIONS}."
        )
      shape = tuple(self._number("Q") for _ in range(num_axes))
      yield name, Tensor(self._number("I"), shape[::-1], self._number("Q"))

  def _unique(
    self, pairs: Iterator[tuple[str, Any]], what: str
  ) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
      if name in found:
        raise ValueError(
          f"{self._source} has {what} {untrusted.shorten(name)} twice."
        )
      found[name] = value
    return found

  def _string(self, what: str) -> str:
    text = self._take(self._number("Q"), what)
    try:
      return text.decode()
    except UnicodeDecodeError:
      reason = f"{what} in {self._source} must be text in UTF-8."
      raise ValueError(reason) from None

  def _number(self, code: str) -> int:
    text = self._take(struct.calcsize(code), "a number")
    return struct.unpack(f"<{code}", text)[0]

  def _take(self, count: int, what: str) -> bytes:
    self._check_room(count, what)
    self._at += count
    return self._content[self._at - count : self._at]

  def _check_room(self, count: int, what: str) -> None:
    left = self._end - self._at
    if count > left:
      raise ValueError(
        f"{what} in {self._source} takes {count} bytes, and "
        f"{left} of its header are left."
      )
