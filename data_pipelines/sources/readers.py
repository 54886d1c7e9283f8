"""Reads the rows of one file of data: parquet, Arrow, JSON, CSV or tar.

A row is what its file holds for one record, by column, in Python's own types. A
damaged row is its own `BadRecord`; a damaged file is a `SettingError`. A file
may be on gs://, and is held in memory only where its format leaves no choice.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, cast

from etils import epath

from data_pipelines import records, validation
from data_pipelines.storage import objects, paths
from data_pipelines.text import untrusted

# The columns of a record, or the reason why it cannot be read.
Values = Mapping[str, Any] | records.BadRecord

# The ends of names of pictures.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Characters; a picture in Base64 is a part of its line.
MAX_LINE = 64 * 2**20
# Bytes of rows that are held at once, and of a file.
_BATCH = 8 * 2**20
_BUFFER = 2**20


@contextlib.contextmanager
def _open(path: epath.Path, kind: str) -> Iterator[IO[bytes]]:
  """A file, unpacked if it is gzip; one in which the body fails is refused."""
  try:
    if not paths.is_remote(path):
      untrusted.size_of(path)  # Refuses a pipe.
    with objects.open_file(path) as file, contextlib.ExitStack() as stack:
      opened: Any = file
      if path.name.lower().endswith(".gz"):
        opened = stack.enter_context(gzip.GzipFile(fileobj=opened))
      yield opened
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

  # Otherwise whole row groups are read ahead.
  limits = {"buffer_size": _BUFFER, "pre_buffer": False}
  with (
    _open(path, "parquet") as opened,
    pq.ParquetFile(pa.PythonFile(opened), **limits) as file,
  ):
    names = _column_names(file.schema_arrow, binary)
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    num_bytes = sum(group.total_byte_size for group in groups)
    size = _batch_size(file.metadata.num_rows, num_bytes)
    for batch in file.iter_batches(batch_size=size, columns=names):
      yield from _batch_rows(batch)


def arrow(path: epath.Path, *, binary: bool = True) -> Iterator[Values]:
  """The rows of an Arrow file, in the format for files or for streams."""
  import pyarrow as pa

  with _open(path, "Arrow") as opened:
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    # What is mapped is not copied: a batch may hold a thousand pictures.
    source = (
      pa.PythonFile(opened)
      if paths.is_remote(path)
      else pa.memory_map(str(path))
    )
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
  """The number of rows to hold at once: few if they hold pictures."""
  return max(1, min(1000, _BATCH * num_rows // max(num_bytes, 1)))


def _column_names(schema: Any, binary: bool) -> list[str]:
  if len(set(schema.names)) < len(schema.names):
    raise ValueError("two columns have one name")
  return [x.name for x in schema if binary or "binary" not in str(x.type)]


def _batch_rows(batch: Any) -> Iterator[Values]:
  """The rows of an Arrow batch, with a BadRecord for each that is damaged."""
  try:
    batch.validate(full=True)  # Otherwise any offset would be followed.
    yield from batch.to_pylist(maps_as_pydicts="strict")
  except (ArithmeticError, ValueError) as error:  # No UTF-8, an odd date.
    if batch.num_rows == 1:
      detail = f"{type(error).__name__}: {error}"
      yield records.BadRecord("unreadable", detail)
    else:
      for index in range(batch.num_rows):
        yield from _batch_rows(batch.slice(index, 1))


@contextlib.contextmanager
def _open_text(path: epath.Path, kind: str) -> Iterator[IO[str]]:
  """A text file, of which bytes that are no UTF-8 are kept."""
  with _open(path, kind) as opened:
    # Excel's "Unicode text" is UTF-16; "-sig" drops a byte order mark.
    is_wide = opened.read(2) in (b"\xff\xfe", b"\xfe\xff")
    opened.seek(0)
    encoding = "utf-16" if is_wide else "utf-8-sig"
    yield io.TextIOWrapper(opened, encoding, "surrogateescape", newline="")


def _line(text: IO[str]) -> str | None:
  """The next line, "" at the end; None in place of one that is too long."""
  line = text.readline(MAX_LINE)
  rest = line
  while len(rest) == MAX_LINE and not rest.endswith("\n"):
    rest = text.readline(MAX_LINE)
  return line if rest is line else None


def _lines(text: IO[str]) -> Iterator[tuple[int, str | None]]:
  """The number and the text of each line that is not blank."""
  for number in itertools.count(1):
    line = _line(text)
    if line == "":
      return
    if line is None or line.strip():
      yield number, line


def json_lines(path: epath.Path) -> Iterator[Values]:
  """The objects of a JSONL file, one on each line that is not blank."""
  with _open_text(path, "JSONL") as text:
    for number, line in _lines(text):
      yield _json_row(line, f"line {number} of {path.name}")


def _json_row(text: str | None, where: str) -> Values:
  """The JSON object in a text, or why it holds none."""
  try:
    if text is None:
      raise ValueError(f"it has more than {MAX_LINE} characters")
    return _require_object(_parse(text), where)
  except ValueError as error:
    detail = f"{where} is no JSON: {error}"
    return records.BadRecord("not_a_record", detail)


def _parse(text: str) -> Any:
  """The JSON document in a text; an object with a key twice is a tuple."""
  try:
    text.encode()
    return json.loads(text, object_pairs_hook=_keep_duplicate_keys)
  except UnicodeEncodeError:
    raise ValueError("it is not UTF-8") from None
  except RecursionError:
    raise ValueError("it nests too deeply") from None


def _keep_duplicate_keys(pairs: list[tuple[str, Any]]) -> Any:
  """A JSON object, or its pairs: a dict would keep the last of two keys."""
  found = dict(pairs)
  return found if len(found) == len(pairs) else tuple(pairs)


def _require_object(row: Any, where: str) -> Values:
  if isinstance(row, dict):
    return row
  why = "has a field twice" if isinstance(row, tuple) else "is no JSON object"
  return records.BadRecord("not_a_record", f"{where} {why}")


def json_document(path: epath.Path) -> Iterator[Values]:
  """The records of a JSON file: a list, or an object that holds them.

  The object maps each pid to its record, or each column to its values as pandas
  writes it, or has one list of records among its fields. A file of JSON lines
  by the name of `.json` is read as such.
  """
  with _open_text(path, "JSON") as text:
    start = itertools.islice(_lines(text), 2)
    if [type(_json_row(line, "")) for _, line in start] == [dict, dict]:
      yield from json_lines(path)
      return
    text.seek(0)
    content = text.read(untrusted.MAX_JSON_BYTES + 1)
    if len(content) > untrusted.MAX_JSON_BYTES:
      rule = f"have at most {untrusted.MAX_JSON_BYTES} characters"
      raise _refusal(path, rule, "write its records as JSONL, one on a line")
    document = _parse(content)
    if not isinstance(document, list | dict | tuple):
      kind = type(document).__name__
      raise _refusal(path, f"hold a list or an object, not a {kind}")
    yield from _find_records(document, path)


def _find_records(document: Any, path: epath.Path) -> Iterator[Values]:
  """The records of a list, of the one list in an object, or of an object."""
  if isinstance(document, list):
    for index, row in enumerate(document):
      yield _require_object(row, f"record {index} of {path.name}")
    return
  is_pairs = isinstance(document, tuple)
  items = document if is_pairs else list(document.items())
  columns = {key: values for key, value in items if (values := _column(value))}
  if len(columns) == len(items) and len(set(map(len, columns.values()))) == 1:
    rows = zip(*columns.values(), strict=True)
    yield from (dict(zip(columns, row, strict=True)) for row in rows)
    return
  lists = {
    key: value
    for key, value in items
    if isinstance(value, list) and dict in map(type, value)
  }
  if len(lists) > 1:
    named = ", ".join(map(untrusted.shorten, lists))
    remedy = "write the records, with all their fields, to a file of their own"
    raise _refusal(path, f"hold one list, not several: {named}", remedy)
  if lists:
    yield from _find_records(next(iter(lists.values())), path)
  elif is_pairs or any(isinstance(value, dict | tuple) for _, value in items):
    yield from itertools.starmap(_named_row, items)
  elif items:
    yield document  # One line of JSONL.


def _column(value: Any) -> list[Any] | None:
  """The values of a column that stands alone; None for another value."""
  if isinstance(value, dict) and [*value] == [*map(str, range(len(value)))]:
    return [*value.values()]
  if isinstance(value, list) and dict not in map(type, value):
    return value
  return None


def _named_row(pid: str, row: Any) -> Values:
  """A record that its pid names."""
  named = untrusted.shorten(pid)
  row = _require_object(row, named)
  if isinstance(row, records.BadRecord):
    return row
  given = row.get("pid")
  if given is not None and str(given) != pid:
    detail = f"the record at {named} has the pid {untrusted.shorten(given)}"
    return records.BadRecord("mismatched_pid", detail)
  return {**row, "pid": pid}


def table(path: epath.Path) -> Iterator[Values]:
  """The rows of a CSV or TSV file as texts, by the names in its first row."""
  csv.field_size_limit(MAX_LINE)
  with _open_text(path, "CSV") as text:
    first = _line(text) or ""
    is_tsv = ".tsv" in path.name.lower()
    # Where the comma is decimal, Excel writes semicolons.
    delimiter = "\t" if is_tsv else max(",;\t", key=first.count)
    lines = itertools.chain([first], iter(lambda: _line(text), ""))
    given = cast(Iterable[str], lines)
    rows = csv.reader(given, delimiter=delimiter, strict=True)
    names = enumerate(next(rows, []))
    header = [name.strip() or f"Unnamed: {index}" for index, name in names]
    if len(set(header)) < len(header):
      raise ValueError("two columns have one name")
    for number in itertools.count(1):
      detail = f"row {number} of {path.name} "
      try:
        row = next(rows)
        "".join(row).encode()
        detail += f"has {len(row)} fields, and the first {len(header)}"
      except StopIteration:
        return
      except (csv.Error, UnicodeEncodeError) as error:
        if "end of data" in str(error):  # The rest of the file is one field.
          detail += "opens a quote that nothing closes"
          raise ValueError(detail) from error
        row = None
        detail += f"is no CSV in UTF-8, or over {MAX_LINE} characters long"
      if row is not None and len(row) == len(header):
        yield dict(zip(header, row, strict=True))
      elif row != []:
        yield records.BadRecord("not_a_record", detail)


class _BoundedReader(io.BufferedReader):
  """A tar whose headers cannot ask for any amount of memory."""

  def read(self, size: int | None = -1, /) -> bytes:
    if size is None or not 0 <= size <= 2 * MAX_LINE:
      raise ValueError(f"a header has {size} bytes")
    return super().read(size)


def tar(path: epath.Path, *, binary: bool = True) -> Iterator[Values]:
  """The samples of a webdataset shard, in the order of their first members.

  Members whose paths are equal up to the first dot of the name are a sample,
  `__key__`: `x.json` gives columns; any other text, such as `x.answer.txt` or
  `x.choices.json`, one column of its name; without JSON, `x.txt` is the
  `question` and `x.cls` the `answer`. A picture such as `x.jpg` is the column
  `jpg` and also `image`; several, as `x.0.jpg` and `x.1.jpg`, are `images`.
  """
  with (
    _open(path, "tar") as opened,
    _BoundedReader(cast(io.RawIOBase, opened), _BUFFER) as bounded,
    tarfile.open(fileobj=bounded, mode="r:") as file,
  ):
    shard = re.split(r"(?i)\.tar", path.name)[0]
    samples = itertools.groupby(_members(file), lambda x: _key_and_name(x)[0])
    for key, members in samples:
      try:
        row = _sample(file, key, members, binary)
      except records.BadRecord as error:
        yield error
        continue
      # Each shard may count its samples from 0.
      pid = {} if "id" in row else {"pid": f"{shard}/{key}"}
      yield {**pid, **row, "__key__": key}
    # A damaged header ends the members too.
    bounded.seek(file.offset)
    if bounded.read(tarfile.BLOCKSIZE).strip(b"\0"):
      raise ValueError(f"no header at byte {file.offset}")


def _members(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
  """The regular files of a tar that belong to samples; none is unpacked."""
  while member := file.next():
    cast(Any, file).members.clear()  # Otherwise they add up.
    # macOS adds files with a hidden name.
    if member.isreg() and all(_key_and_name(member)):
      yield member


def _key_and_name(member: tarfile.TarInfo) -> tuple[str, str]:
  """The sample of a member and its name there; "" for one of no sample."""
  folder, mark, base = member.name.removeprefix("./").rpartition("/")
  key, _, name = base.partition(".")
  return key and f"{folder}{mark}{key}", name.lower()


def _sample(
  file: tarfile.TarFile,
  key: str,
  members: Iterable[tarfile.TarInfo],
  binary: bool,
) -> dict[str, Any]:
  """The columns of a sample; see `tar`."""
  row: dict[str, Any] = {}
  pictures: dict[str, bytes] = {}
  fields: Values | None = None
  total = 0
  for member in members:
    name = _key_and_name(member)[1]
    is_picture = f".{name}".endswith(PICTURES)
    is_film = member.size > _BUFFER and not is_picture and name != "json"
    if is_film or (is_picture and not binary):
      continue
    total += member.size
    if total > MAX_LINE:
      detail = f"{key} has more than {MAX_LINE} bytes"
      raise records.BadRecord("image_too_large", detail)
    content = cast(IO[bytes], file.extractfile(member)).read(member.size)
    if is_picture:
      pictures[name] = content
      continue
    text = content.decode("utf-8-sig", "surrogateescape").strip()
    if name == "json":
      fields = _json_row(text, f"{key}.json")
    elif name.endswith(".json"):
      with records.all_faults("not_a_record"):
        row[name.removesuffix(".json")] = _parse(text)
    elif text == text.encode(errors="replace").decode():  # It was UTF-8.
      row[name.removesuffix(".txt")] = text
  if isinstance(fields, records.BadRecord):
    raise fields
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
  has_bytes = kind in (".parquet", ".arrow", ".tar")
  options = {"binary": False} if has_bytes else {}
  for values in KINDS[kind](path, **options):
    yield from _picture_names(values)


def _picture_names(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    if len(value) < 1000 and value.lower().endswith(PICTURES):
      yield value
  elif isinstance(value, Mapping | list):
    for each in value.values() if isinstance(value, Mapping) else value:
      yield from _picture_names(each)
