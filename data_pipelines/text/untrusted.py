"""Files from elsewhere: read within limits, and refused in words.

Whatever such a file holds, the readers here raise a ValueError that names the
file, the field and the rule, or an OSError. Imports the standard library alone.
"""

import json
import os
import reprlib
import stat
import sys
from collections.abc import Iterable
from typing import Any

from data_pipelines.validation import printable

# Ample for any index, configuration or manifest.
MAX_JSON_BYTES = 256 * 2**20

_KINDS = {
  dict: "an object",
  list: "a list",
  str: "a string",
  int: "an integer",
  float: "a finite number",
  bool: "true or false",
}


def size_of(path: str | os.PathLike) -> int:
  """The bytes of a regular file; a device, a pipe or a folder is refused."""
  if "://" in os.fspath(path):
    from data_pipelines.storage import objects

    return objects.size_of(path)
  status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):
    raise ValueError(f"{printable(os.fspath(path))} must be a regular file.")
  return status.st_size


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
  """The content of a regular file of at most `max_bytes` bytes."""
  size = size_of(path)
  if size > max_bytes:
    raise ValueError(
      f"{printable(os.fspath(path))} has {size} bytes, which must be at most "
      f"{max_bytes}."
    )
  from data_pipelines.storage import objects

  with objects.open_file(path) as file:
    # By its size: Python allocates what it is asked to read.
    return file.read(size)


def read_json(path: str | os.PathLike, *, source: str = "") -> Any:
  """The JSON object in a file; see `read_bytes` and `parse_json`."""
  content = read_bytes(path, MAX_JSON_BYTES)
  return parse_json(content, source or os.fspath(path))


def parse_json(text: str | bytes, source: str, kind: type = dict) -> Any:
  """The JSON document in a text, of type `kind`; errors call it `source`."""
  try:
    document = json.loads(text)
  except RecursionError:
    raise ValueError(f"{printable(source)} nests too deeply.") from None
  except ValueError as error:
    raise ValueError(f"{printable(source)} is not JSON: {error}.") from None
  return check_kind(document, kind, source)


def get_field(document: dict, name: str, kind: type, source: str) -> Any:
  """The value of a field that a JSON object must have, of type `kind`."""
  if name not in document:
    raise ValueError(f"{printable(source)} must have a field {name!r}.")
  return check_kind(document[name], kind, f"{name!r} in {source}")


def check_kind(value: Any, kind: type, source: str) -> Any:
  """The value, if its JSON type is `kind`; an integer is also a float."""
  kinds = (int, float) if kind is float else kind
  holds = isinstance(value, kinds) and (type(value) is not bool or kind is bool)
  if holds and kind is float:  # No NaN, and no integer that is too large.
    holds = abs(value) <= sys.float_info.max
  if not holds:
    raise ValueError(
      f"{printable(source)} must be {_KINDS[kind]}, not {shorten(value)}."
    )
  return value


def check_items(values: Iterable[Any], kind: type, source: str) -> None:
  """Checks the type of each value; an error names the first other one."""
  for index, value in enumerate(values):
    check_kind(value, kind, f"item {index} of {source}")


class _Short(reprlib.Repr):
  """As Python writes a value, but for the content of bytes."""

  def repr_bytes(self, value: bytes, level: int) -> str:
    del level
    return f"<{len(value)} bytes>"


_SHORT = _Short(maxstring=1000, maxother=1000, maxlong=1000)


def shorten(value: Any, length: int = 60) -> str:
  """A value for an error: as Python writes it, cut, printable, no picture."""
  try:
    text = _SHORT.repr(value)
  except Exception:  # Thousands of digits; and `repr` runs code of any type.
    text = f"a {type(value).__name__}"
  return printable(text if len(text) <= length else f"{text[: length - 3]}...")
