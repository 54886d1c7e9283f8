"""Reads the rows of one file of data: parquet, Arrow, JSON, CSV or tar.

A row is what its file holds for one record, by column, in plain Python values.
A damaged row is its own `BadRecord`; a damaged file is a `SettingError`. Files
may be on gs://, and nothing is held whole that can be read in parts.
"""

import contextlib
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from etils import epath

from data_pipelines import records, validation
from data_pipelines.text import untrusted

# The columns of a record, or the reason why it cannot be read.
Values = Mapping[str, Any] | records.BadRecord

# A picture in Base64 is a part of its line.
MAX_LINE = 64 * 2**20
# Few rows at a time: each carries whole pictures.
_BATCH = 16
_BUFFER = 2**20


class _Remote(io.RawIOBase):
  """A file of a bucket's library as Python's own files are."""

  def __init__(self, file: Any):
    self._file = file

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer: Any, /) -> int:
    content = self._file.read(len(buffer))
    buffer[: len(content)] = content
    return len(content)

  def tell(self) -> int:
    return self._file.tell()

  def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
    self._file.seek(offset, whence)
    return self._file.tell()


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[IO[bytes]]:
  """A file that may be on gs://, of which parts are read where they lie."""
  with path.open("rb") as file:
    if "://" in os.fspath(path):
      yield io.BufferedReader(_Remote(file), _BUFFER)
    else:
      yield file


@contextlib.contextmanager
def _whole(path: epath.Path, kind: str) -> Iterator[None]:
  """Refuses a file in which the body finds a fault."""
  try:
    yield
  except validation.SettingError:
    raise
  except Exception as error:  # Damaged bytes raise nearly every kind.
    if validation.is_machine_failure(error):
      raise
    why = validation.printable(f"{type(error).__name__}: {error}"[:300])
    raise validation.SettingError(
      f"source file ({path}) must be a whole {kind} file: {why}; fetch it "
      "again."
    ) from error


def parquet(path: epath.Path, *, binary: bool = True) -> Iterator[Values]:
  """The rows of a parquet file; without `binary` no bytes are read."""
  import pyarrow as pa  # Imported here: ArrayRecord does not need it.
  import pyarrow.parquet as pq

  with _whole(path, "parquet"), _open(path) as opened:
    with pq.ParquetFile(pa.PythonFile(opened), buffer_size=_BUFFER) as file:
      names = _column_names(file.schema_arrow, binary)
      for batch in file.iter_batches(batch_size=_BATCH, columns=names):
        yield from _batch_rows(batch)


def arrow(path: epath.Path, *, binary: bool = True) -> Iterator[Values]:
  """The rows of an Arrow file, in the format for files or for streams."""
  import pyarrow as pa

  with _whole(path, "Arrow"), _open(path) as opened:
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    local = "://" not in os.fspath(path)
    # What is mapped is not copied: a batch may hold a thousand pictures.
    source = pa.memory_map(os.fspath(path)) if local else pa.PythonFile(opened)
    if is_file:
      file = pa.ipc.open_file(source)
      batches = map(file.get_batch, range(file.num_record_batches))
    else:
      file = batches = pa.ipc.open_stream(source)
    names = _column_names(file.schema, binary)
    for batch in batches:
      batch = batch.select(names)
      for start in range(0, batch.num_rows, _BATCH):
        yield from _batch_rows(batch.slice(start, _BATCH))


def _column_names(schema: Any, binary: bool) -> list[str]:
  """The columns to read."""
  if len(set(schema.names)) < len(schema.names):
    raise ValueError("two columns have one name")
  return [
    field.name for field in schema if binary or "binary" not in str(field.type)
  ]


def _batch_rows(batch: Any) -> Iterator[Values]:
  """The rows of an Arrow batch, with a BadRecord for each that is damaged."""
  try:
    yield from _checked_rows(batch)
  except (ArithmeticError, ValueError):  # A text that is no UTF-8, a date.
    for index in range(batch.num_rows):
      try:
        with records.all_faults():
          (row,) = _checked_rows(batch.slice(index, 1))
      except records.BadRecord as error:
        row = error
      yield row


def _checked_rows(batch: Any) -> list[dict[str, Any]]:
  """The rows as plain values; Arrow itself would follow any offset."""
  batch.validate(full=True)
  rows = batch.to_pylist(maps_as_pydicts="strict")
  return [{key: _plain(value) for key, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
  """The value, but dates, decimals and the like as text."""
  if value is None or isinstance(value, str | bytes | bool | int | float):
    return value
  if isinstance(value, Mapping):
    return {str(key): _plain(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(each) for each in value]
  return str(value)


@contextlib.contextmanager
def _open_text(path: epath.Path) -> Iterator[IO[str]]:
  """A text file, unpacked if it is gzip; bytes that are no UTF-8 are kept."""
  with _open(path) as raw, contextlib.ExitStack() as stack:
    opened: Any = raw
    if path.name.lower().endswith(".gz"):
      opened = stack.enter_context(gzip.GzipFile(fileobj=raw))
    start = opened.read(2)
    opened.seek(0)
    # As Excel writes "Unicode text"; "-sig" drops a byte order mark.
    is_wide = start in (b"\xff\xfe", b"\xfe\xff")
    yield io.TextIOWrapper(
      opened,
      encoding="utf-16" if is_wide else "utf-8-sig",
      errors="surrogateescape",
      newline="",
    )


def _lines(text: IO[str]) -> Iterator[str | None]:
  """The lines that are not blank; None for each that is too long."""
  while line := text.readline(MAX_LINE):
    if len(line) == MAX_LINE and not line.endswith("\n"):
      while (rest := text.readline(MAX_LINE)) and not rest.endswith("\n"):
        pass
      yield None
    elif line.strip():
      yield line
    else:
      yield ""


def json_lines(path: epath.Path) -> Iterator[Values]:
  """The objects of a JSONL file, one on each line that is not blank."""
  with _whole(path, "JSONL"), _open_text(path) as text:
    for number, line in enumerate(_lines(text), start=1):
      if line == "":
        continue
      where = f"line {number} of {path.name}"
      try:
        yield _parse_line(line, where)
      except records.BadRecord as error:
        yield error


def _parse_line(line: str | None, where: str) -> Values:
  if line is None:
    detail = f"{where} has more than {MAX_LINE} characters"
    raise records.BadRecord("not_a_record", detail)
  try:
    line.encode()
    row = json.loads(line, object_pairs_hook=_keep_duplicate_keys)
  except (ValueError, RecursionError) as error:
    detail = f"{where} is not JSON in UTF-8: {_why(error)}"
    raise records.BadRecord("not_a_record", detail) from error
  return _require_object(row, where)


def _why(error: Exception) -> str:
  deep = isinstance(error, RecursionError)
  return "it nests too deeply" if deep else str(error)


def _require_object(row: Any, where: str) -> Values:
  if isinstance(row, dict):
    return row
  why = "is no JSON object"
  if isinstance(row, _DuplicateKeys):
    why = f"has the field {untrusted.shorten(row.duplicate)} twice"
  return records.BadRecord("not_a_record", f"{where} {why}")


def json_document(path: epath.Path) -> Iterator[Values]:
  """The records of a JSON file: a list, or an object that holds them.

  The object maps each pid to its record, or has one list of records among its
  fields. A file of JSON lines by the name of `.json` is read as such.
  """
  with _whole(path, "JSON"):
    if _is_lines(path):
      yield from json_lines(path)
      return
    document = _parse_document(path)
    if isinstance(document, list):
      named = None
      items: Iterable[tuple[Any, Any]] = enumerate(document)
    else:
      named, items = _find_records(document)
    for key, row in items:
      if named:
        yield _named_row(key, row)
      else:
        yield _require_object(row, f"record {key} of {path.name}")


def _is_lines(path: epath.Path) -> bool:
  """True for a file whose first line is an object and that goes on."""
  with _open_text(path) as text:
    lines = (line for line in _lines(text) if line != "")
    first, second = next(lines, None), next(lines, None)
  if first is None or second is None or not second.lstrip().startswith("{"):
    return False
  try:
    return isinstance(json.loads(first), dict)
  except (ValueError, RecursionError):
    return False


def _parse_document(path: epath.Path) -> Any:
  limit = untrusted.MAX_JSON_BYTES
  with _open_text(path) as text:
    content = text.read(limit + 1)
  if len(content) > limit:
    raise ValueError(
      f"it has more than {limit} bytes; write its records as JSONL, one on "
      "each line"
    )
  try:
    content.encode()
    document = json.loads(content, object_pairs_hook=_keep_duplicate_keys)
  except (ValueError, RecursionError) as error:
    raise ValueError(_why(error)) from error
  if not isinstance(document, list | dict | _DuplicateKeys):
    kind = type(document).__name__
    raise ValueError(f"it must hold a list or an object, not a {kind}")
  return document


def _find_records(document: Any) -> tuple[bool, Iterable[tuple[Any, Any]]]:
  """True and the records of an object by pid, or False and its one list."""
  items = list(document.items())
  lists = {
    key: value
    for key, value in items
    if isinstance(value, list) and any(isinstance(x, dict) for x in value)
  }
  is_map = any(isinstance(value, dict | _DuplicateKeys) for _, value in items)
  if len(lists) > 1:
    named = ", ".join(map(untrusted.shorten, lists))
    raise ValueError(f"it must hold one list of records, not several: {named}")
  if lists:
    return False, enumerate(*lists.values())
  if is_map or not items or isinstance(document, _DuplicateKeys):
    return True, items
  return False, [(0, document)]  # JSONL of one line.


def _named_row(pid: str, row: Any) -> Values:
  """A record that its pid names."""
  checked = _require_object(row, untrusted.shorten(pid))
  if isinstance(checked, records.BadRecord):
    return checked
  given = checked.get("pid")
  if given is not None and str(given) != pid:
    detail = (
      f"the record at {untrusted.shorten(pid)} has the pid "
      f"{untrusted.shorten(given)}"
    )
    return records.BadRecord("mismatched_pid", detail)
  return {**checked, "pid": pid}


class _DuplicateKeys:
  """A JSON object with a key twice; a dict would keep only the last one."""

  def __init__(self, pairs: list[tuple[str, Any]]):
    self._pairs = pairs
    keys = [key for key, _ in pairs]
    self.duplicate = next(key for key in keys if keys.count(key) > 1)

  def items(self) -> list[tuple[str, Any]]:
    return self._pairs


def _keep_duplicate_keys(
  pairs: list[tuple[str, Any]],
) -> dict[str, Any] | _DuplicateKeys:
  found = dict(pairs)
  return found if len(found) == len(pairs) else _DuplicateKeys(pairs)


# By the end of a file's name.
KINDS: Mapping[str, Callable[..., Iterator[Values]]] = {
  ".parquet": parquet,
  ".jsonl": json_lines,
  ".json": json_document,
  ".arrow": arrow,
}
