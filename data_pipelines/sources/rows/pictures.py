"""Reads the pictures of a row, and puts their marks where the text has them."""

import base64
import binascii
import contextlib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.records import IMAGE_MARK, BadRecord
from data_pipelines.sources.rows import gold
from data_pipelines.text import tables, untrusted

_SUFFIXES = frozenset(
  ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .jp2 .ico".split()
)
_RE = tables.patterns("pictures", "data_pipelines.sources.rows")
# What a struct of a picture may have, the picture itself first.
_KEYS = "bytes path image url image_url image_path file_name".split()
_URL_SAFE = str.maketrans("-_", "+/")


def read(
  value: Any, column: str, read_file: Callable[[str], bytes]
) -> list[bytes]:
  """The pictures in a value: bytes, a struct, a path, base64, or a list.

  Nulls hold none. `read_file` gives the bytes of a file that the row names.
  """
  value = gold.plain(value)
  if gold.is_missing(value):
    return []
  if isinstance(value, str) and value.lstrip()[:1] == "[":
    with contextlib.suppress(ValueError):
      value = untrusted.parse_json(value.replace("'", '"'), column, list)
  if isinstance(value, list | tuple):
    return [x for each in value for x in read(each, column, read_file)]
  if isinstance(value, Mapping):
    found = (value[x] for x in _KEYS if not gold.is_missing(value.get(x)))
    return read(next(found, None), column, read_file)
  if isinstance(value, bytes) and value:
    return [value]
  if not isinstance(value, str):
    raise BadRecord(
      "missing_image",
      f"{column} holds {untrusted.shorten(value)}, which is no picture; name "
      "another column: --columns=images=NAME, or none: --columns=images=",
    )
  return [_from_text(value.strip(), column, read_file)]


def _from_text(
  text: str, column: str, read_file: Callable[[str], bytes]
) -> bytes:
  """The picture of a data URL, of base64, or of a named file."""
  match = _RE.data_url.match(text)
  if match or _RE.base64.fullmatch(text):
    code = text[match.end() if match else 0 :]
    try:
      return base64.b64decode(code.translate(_URL_SAFE), validate=False)
    except (binascii.Error, ValueError) as error:
      detail = f"{column} holds damaged base64: {error}"
      raise BadRecord("missing_image", detail) from error
  named = text.replace("\\", "/").removeprefix("file://")
  # Files that were made elsewhere may name that machine's folders.
  parts = pathlib.PurePosixPath(named).parts
  tails = [str(pathlib.PurePosixPath(*parts[-n:])) for n in (3, 2, 1)]
  first = None
  is_absolute = re.match("/|[A-Za-z]:/", named)
  for candidate in [named, *(tails if is_absolute else ())]:
    try:
      return read_file(candidate)
    except BadRecord as error:
      first = first or error
  detail = f"{column}: {first.detail}" if first else column
  raise BadRecord("missing_image", detail)


def path_of(value: Any) -> str:
  """The path of the first picture in a value, if it names one; else ""."""
  while isinstance(value, list | tuple) and value:
    value = gold.plain(value[0])
  if isinstance(value, Mapping):
    value = value.get("path")
  return value if isinstance(value, str) and len(value) < 200 else ""


def is_picture_text(value: Any) -> bool:
  """True for a text that can be nothing but a picture or a picture's name."""
  if not isinstance(value, str) or not value.strip():
    return False
  if _RE.data_url.match(value) or _RE.base64.fullmatch(value.strip()):
    return True
  return pathlib.PurePosixPath(value[-300:]).suffix.lower() in _SUFFIXES


def place_marks(
  question: str, options: Sequence[str], count: int, *, is_merged: bool
) -> tuple[str, tuple[str, ...], list[int]]:
  """Gives the question an `IMAGE_MARK` for each picture, or none at all.

  Options have no marks, because they may be shuffled: they name their picture,
  "image 2", whose mark then follows the question with the same name. If
  `is_merged`, one picture may hold all that numbered marks name. Returns
  question, options, and the order of the pictures in the question.
  """
  marks = [m for text in (question, *options) for m in _RE.mark.finditer(text)]
  if not marks:
    return question, tuple(options), list(range(count))
  is_numbered = any(mark["number"] for mark in marks)
  numbers = [int(mark["number"] or 1) for mark in marks]
  if not is_numbered:
    numbers = list(range(1, len(marks) + 1))
  elif 0 in numbers:  # As Python counts.
    numbers = [number + 1 for number in numbers]
  if is_numbered and is_merged and count == 1 and max(numbers) > 1:
    question, *options = (
      _RE.mark.sub(lambda mark: f"image {mark['number'] or 1}", text)
      for text in (question, *options)
    )
    return question, tuple(options), [0]
  is_short = not is_numbered and len(numbers) < count
  if not count or max(numbers) > count or is_short:
    raise BadRecord(
      "image_count" if count else "missing_image",
      f"the text has {len(marks)} marks such as {marks[0][0][:20]} for {count} "
      "pictures; give one mark per picture or none, or name the pictures' "
      "column: --columns=images=NAME",
    )
  remaining = iter(numbers)
  order: list[int] = []

  def place(mark: re.Match[str]) -> str:
    number = next(remaining)
    if number - 1 in order:
      return f"image {number}"
    order.append(number - 1)
    return IMAGE_MARK

  question = _RE.mark.sub(place, question)
  options = [
    _RE.mark.sub(lambda _: f"image {next(remaining)}", x) for x in options
  ]
  for missing in [i for i in range(count) if i not in order]:
    order.append(missing)
    question = f"{question}\nimage {missing + 1}: {IMAGE_MARK}"
  return question, tuple(options), order
