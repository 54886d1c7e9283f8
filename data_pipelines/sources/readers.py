"""Reads the rows of one file of data: parquet, Arrow, JSON, CSV or tar.

A row is what its file holds for one record, by column, in plain Python values.
A damaged row is its own `BadRecord`; a damaged file is a `SettingError`. Files
may be on gs://, and nothing is held whole that can be read in parts.
"""

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple, cast

from etils import epath

from data_pipelines import records, validation
from data_pipelines.text import untrusted

# The columns of a record, or the reason why it cannot be read.
Values = Mapping[str, Any] | records.BadRecord

# The ends of names of pictures.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# A picture in Base64 is a part of its line.
MAX_LINE = 64 * 2**20
# Bytes of rows that are held at once, and of a file.
_BATCH = 8 * 2**20
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
    why = str(error)[:300] or type(error).__name__
    raise _refusal(path, f"be a whole {kind} file: {why}") from error


def _refusal(
  path: epath.Path, rule: str, remedy: str = "fetch it again"
) -> validation.SettingError:
  text = f"source file ({path}) must {rule}; {remedy}."
  return validation.SettingError(validation.printable(text))


def parquet(path: epath.Path, *, binary: bool = True) -> Iterator[Values]:
  """The rows of a parquet file; without `binary` no bytes are read."""
  import pyarrow as pa  # Imported here: ArrayRecord does not need it.
  import pyarrow.parquet as pq

  with _whole(path, "parquet"), _open(path) as opened:
    # Otherwise whole row groups are read ahead.
    limits = {"buffer_size": _BUFFER, "pre_buffer": False}
    with pq.ParquetFile(pa.PythonFile(opened), **limits) as file:
      names = _column_names(file.schema_arrow, binary)
      groups = map(file.metadata.row_group, range(file.num_row_groups))
      num_bytes = sum(group.total_byte_size for group in groups)
      size = _batch_size(file.metadata.num_rows, num_bytes)
      for batch in file.iter_batches(batch_size=size, columns=names):
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
      size = _batch_size(batch.num_rows, batch.nbytes)
      batch = batch.select(names)
      for start in range(0, batch.num_rows, size):
        yield from _batch_rows(batch.slice(start, size))


def _batch_size(num_rows: int, num_bytes: int) -> int:
  """How many rows to hold at once: of whole pictures, few."""
  return max(1, min(1000, _BATCH * num_rows // max(num_bytes, 1)))


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


def _is_cut(text: IO[str], line: str) -> bool:
  """True for a line that is too long, of which the rest is then skipped."""
  is_cut = False
  while len(line) == MAX_LINE and not line.endswith("\n"):
    line, is_cut = text.readline(MAX_LINE), True
  return is_cut


def _lines(text: IO[str]) -> Iterator[tuple[int, str | None]]:
  """Each line that is not blank with its number; None for one that is cut."""
  for number in itertools.count(1):
    line = text.readline(MAX_LINE)
    if _is_cut(text, line):
      yield number, None
    elif line.strip():
      yield number, line
    elif not line:
      return


def json_lines(path: epath.Path) -> Iterator[Values]:
  """The objects of a JSONL file, one on each line that is not blank."""
  with _whole(path, "JSONL"), _open_text(path) as text:
    for number, line in _lines(text):
      where = f"line {number} of {path.name}"
      try:
        row = _parse(line)
      except ValueError as error:
        row = records.BadRecord("not_a_record", f"{where} is no JSON: {error}")
      yield _require_object(row, where)


def _parse(text: str | None) -> Any:
  """The JSON document in a text; an object with a key twice is a tuple."""
  if text is None:
    raise ValueError(f"it has more than {MAX_LINE} characters")
  try:
    text.encode()
    return json.loads(text, object_pairs_hook=_keep_duplicate_keys)
  except UnicodeEncodeError:
    raise ValueError("it is not UTF-8") from None
  except RecursionError:
    raise ValueError("it nests too deeply") from None


def _require_object(row: Any, where: str) -> Values:
  """The row, or why it is none."""
  if isinstance(row, dict | records.BadRecord):
    return row
  why = "has a field twice" if isinstance(row, tuple) else "is no JSON object"
  return records.BadRecord("not_a_record", f"{where} {why}")


def json_document(path: epath.Path) -> Iterator[Values]:
  """The records of a JSON file: a list, or an object that holds them.

  The object maps each pid to its record, or has one list of records among its
  fields. A file of JSON lines by the name of `.json` is read as such.
  """
  with _whole(path, "JSON"), _open_text(path) as text:
    start = [line for _, line in itertools.islice(_lines(text), 2)]
    if len(start) == 2 and _is_object(start[0]) and _is_object(start[1]):
      yield from json_lines(path)
      return
    text.seek(0)
    content = text.read(untrusted.MAX_JSON_BYTES + 1)
    if len(content) > untrusted.MAX_JSON_BYTES:
      rule = f"have at most {untrusted.MAX_JSON_BYTES} characters"
      raise _refusal(path, rule, "write its records as JSONL, one on a line")
    document = _parse(content)
    if isinstance(document, list):
      document = {"": document}
    if not isinstance(document, dict | tuple):
      kind = type(document).__name__
      raise _refusal(path, f"hold a list or an object, not a {kind}")
    yield from _find_records(document, path)


def _is_object(line: str | None) -> bool:
  try:
    return isinstance(_parse(line), dict | tuple)
  except ValueError:
    return False


def _find_records(document: Any, path: epath.Path) -> Iterator[Values]:
  """The records of the one list in an object, or of the object by pid."""
  is_pairs = isinstance(document, tuple)
  items = document if is_pairs else list(document.items())
  lists = {
    key: value
    for key, value in items
    if key == "" or isinstance(value, list) and dict in map(type, value)
  }
  if len(lists) > 1:
    named = ", ".join(map(untrusted.shorten, lists))
    remedy = "write the records, with all their fields, to a file of their own"
    raise _refusal(path, f"hold one list, not several: {named}", remedy)
  if lists:
    for index, row in enumerate(*lists.values()):
      yield _require_object(row, f"record {index} of {path.name}")
  elif is_pairs or any(isinstance(value, dict | tuple) for _, value in items):
    yield from (_named_row(*item) for item in items)
  elif items:
    yield document  # One line of JSONL.


def _named_row(pid: str, row: Any) -> Values:
  """A record that its pid names."""
  named = untrusted.shorten(pid)
  checked = _require_object(row, named)
  if isinstance(checked, records.BadRecord):
    return checked
  given = checked.get("pid")
  if given is not None and str(given) != pid:
    detail = f"the record at {named} has the pid {untrusted.shorten(given)}"
    return records.BadRecord("mismatched_pid", detail)
  return {**checked, "pid": pid}


def _keep_duplicate_keys(
  pairs: list[tuple[str, Any]],
) -> dict[str, Any] | tuple[tuple[str, Any], ...]:
  """A JSON object; its pairs if a key is there twice, as no dict can say."""
  found = dict(pairs)
  return found if len(found) == len(pairs) else tuple(pairs)


def table(path: epath.Path) -> Iterator[Values]:
  """The rows of a CSV or TSV file as texts, by the names in its first row."""
  csv.field_size_limit(MAX_LINE)
  with _whole(path, "CSV"), _open_text(path) as text:
    first = text.readline(MAX_LINE)
    is_tsv = ".tsv" in path.name.lower()
    # Where the comma is decimal, Excel writes semicolons.
    delimiter = "\t" if is_tsv else max(",;\t", key=first.count)
    lines = itertools.chain([first], iter(functools.partial(_line, text), ""))
    rows = csv.reader(lines, delimiter=delimiter)
    header = [
      name.strip() or f"Unnamed: {index}"
      for index, name in enumerate(next(rows, []))
    ]
    if len(set(header)) < len(header):
      raise ValueError("two columns have one name")
    for number in itertools.count(1):
      where = f"row {number} of {path.name}"
      try:
        row = next(rows)
        "".join(row).encode()
      except StopIteration:
        return
      except (csv.Error, UnicodeEncodeError) as error:
        why = error if isinstance(error, csv.Error) else "it is not UTF-8"
        yield records.BadRecord("not_a_record", f"{where}: {why}")
        continue
      if len(row) == len(header):
        yield dict(zip(header, row, strict=True))
      elif row:
        detail = f"{where} has {len(row)} fields, and the first {len(header)}"
        yield records.BadRecord("not_a_record", detail)


def _line(text: IO[str]) -> str:
  line = text.readline(MAX_LINE)
  if _is_cut(text, line):
    raise csv.Error(f"a line has more than {MAX_LINE} characters")
  return line


def tar(path: epath.Path) -> Iterator[Values]:
  """The samples of a webdataset shard, in the order of their first members.

  Members whose paths are equal up to the first dot of the name are a sample.

  - `x.json` gives columns; any other text, such as `x.answer.txt`, one column
    of its name. Without JSON, `x.txt` is the `question` and `x.cls` the
    `answer`.
  - A picture such as `x.jpg` is the column `jpg` and also `image`; several, as
    `x.0.jpg` and `x.1.jpg`, are `images`, by number. They stand in for the
    names of pictures that the JSON has there.
  - The common path is `__key__`, and with the shard's name the `pid` where the
    JSON gives none.
  """
  with _whole(path, "tar"), _open(path) as opened:
    samples = itertools.groupby(_members(opened), lambda member: member.key)
    for key, members in samples:
      try:
        row = _sample(key, members)
      except records.BadRecord as error:
        yield error
        continue
      # Each shard may count its samples from 0.
      pid = {} if "id" in row else {"pid": f"{path.stem}/{key}"}
      yield {**pid, **row, "__key__": key}


class _Member(NamedTuple):
  """A file in a tar: its sample, its name there, and what reads it."""

  key: str
  name: str
  size: int
  read: Callable[[], bytes]


class _Bounded(io.BufferedReader):
  """A tar whose headers cannot ask for any amount of memory."""

  def read(self, size: int | None = -1, /) -> bytes:
    if size is None or not 0 <= size <= 2 * MAX_LINE:
      raise ValueError(f"a header has {size} bytes")
    return super().read(size)


def _members(opened: IO[bytes]) -> Iterator[_Member]:
  """The regular files of a tar; nothing is unpacked."""
  with (
    _Bounded(cast(io.RawIOBase, opened), _BUFFER) as bounded,
    tarfile.open(fileobj=bounded, mode="r:") as file,
  ):
    while member := file.next():
      file.members.clear()  # Otherwise they add up.
      folder, _, base = member.name.rpartition("/")
      key, _, name = base.partition(".")
      # macOS adds files with a hidden name.
      if member.isreg() and not member.issparse() and key and name:
        key = f"{folder}/{key}".removeprefix("./").lstrip("/")
        read = functools.partial(_read_member, file, member)
        yield _Member(key, name.lower(), member.size, read)
    # A damaged header ends the loop too.
    bounded.seek(file.offset)
    if bounded.read(tarfile.BLOCKSIZE).strip(b"\0"):
      raise ValueError(f"no header at byte {file.offset}")


def _read_member(file: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
  opened = file.extractfile(member)
  assert opened is not None  # It is a regular file.
  return opened.read(member.size)


def _sample(key: str, members: Iterable[_Member]) -> dict[str, Any]:
  """The columns of a sample; see `tar`."""
  row: dict[str, Any] = {}
  pictures: dict[str, bytes] = {}
  fields: dict[str, Any] | None = None
  total = 0
  for member in members:
    name = member.name
    is_picture = f".{name}".endswith(PICTURES)
    if member.size > _BUFFER and not is_picture and name != "json":
      continue  # A film, say.
    total += member.size
    if total > MAX_LINE:
      detail = f"{key} has more than {MAX_LINE} bytes"
      raise records.BadRecord("image_too_large", detail)
    content = member.read()
    if is_picture:
      pictures[name] = content
    elif name == "json":
      fields = _fields(content, f"{key}.json")
    elif (text := _to_text(content)) is not None:
      row[name.removesuffix(".txt")] = text
  if fields is None:
    for name, column in (("txt", "question"), ("cls", "answer")):
      if name in row:
        row.setdefault(column, row.pop(name))
  row |= fields or {}
  if pictures:
    row.pop("image", None)
    row.pop("images", None)
    ordered = [pictures[name] for name in sorted(pictures, key=_by_number)]
    row |= pictures
    row |= {"images": ordered} if len(ordered) > 1 else {"image": ordered[0]}
  return row


def _fields(content: bytes, where: str) -> dict[str, Any]:
  with records.all_faults("not_a_record"):
    row = _parse(content.decode("utf-8-sig"))
  row = _require_object(row, where)
  if isinstance(row, records.BadRecord):
    raise row
  return dict(row)


def _to_text(content: bytes) -> str | None:
  """The text in a member; None for one of another kind."""
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError:
    return None
  return None if "\0" in text else text.strip()


def _by_number(name: str) -> list[Any]:
  """A key by which 2 comes before 10."""
  parts: list[Any] = re.split(r"(\d+)", name)
  parts[1::2] = map(int, parts[1::2])
  return parts


# By the end of a file's name.
KINDS: Mapping[str, Callable[..., Iterator[Values]]] = {
  ".parquet": parquet,
  ".jsonl": json_lines,
  ".json": json_document,
  ".csv": table,
  ".tsv": table,
  ".arrow": arrow,
  ".tar": tar,
}


def picture_names(path: epath.Path, kind: str) -> Iterator[str]:
  """The texts in the rows of a file that may name a picture beside it."""
  if kind != ".tar":
    is_columnar = kind in (".parquet", ".arrow")
    options = {"binary": False} if is_columnar else {}
    for values in KINDS[kind](path, **options):
      yield from _picture_names(values)


def _picture_names(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    if len(value) < 1000 and value.lower().endswith(PICTURES):
      yield value
  elif isinstance(value, Mapping | list):
    for each in value.values() if isinstance(value, Mapping) else value:
      yield from _picture_names(each)
