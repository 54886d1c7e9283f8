"""Finds the data in a folder or a file, and reads it row by row.

The kind of a file follows from its name's end, the split from its name or its
folders'. Nothing is checked here but that files are whole: an unreadable row is
passed on as its own `BadRecord`.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from data_pipelines import images, records, validation
from data_pipelines.sources import readers, stored
from data_pipelines.text import untrusted


class Row(NamedTuple):
  """A record as its file holds it.

  Attributes:
    values: Column name to plain Python value.
    read: Returns the bytes of a file that the row names; raises `BadRecord`.
  """

  values: Mapping[str, Any]
  read: Callable[[str], bytes]


type RawRecord = records.Problem | Row | records.BadRecord
# For each split of the source, "" if it names none, what reads its records.
type Readers = Mapping[str, Callable[[], Iterable[RawRecord]]]


@dataclasses.dataclass(frozen=True)
class Folder:
  """The data in a folder or a file.

  Attributes:
    readers: What reads each split, in the order of the files' names.
    files: The hash of the content of each file, also of pictures that rows
      name, by path relative to the data.
  """

  readers: Readers
  files: dict[str, str]


_SPLIT = re.compile(
  "(?<![a-z])(train|training|val|valid|validation|dev|eval|evaluation|test"
  "|testing|testmini)(?![a-z])"
)
# What follows the split in the name of a shard.
_SHARD = re.compile(r"([-_.]?\d+)*([-_]of[-_]\d+)?([-_][0-9a-f]{8,})?")
_COUNT = re.compile(r"-of-(\d+)\b")
# Files about the data, and the ones in a data dir beside its problems.
_NO_DATA = re.compile(
  r"\..*|cache-.*|(dataset_infos?|dataset_dict|state|manifest|features|config"
  r"|query|source)\.json|rejects\.jsonl"
)
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_MAX_DEPTH = 6
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class _File(NamedTuple):
  path: epath.Path
  kind: str  # A key of `readers.KINDS`.
  split: str


def find(path: epath.PathLike) -> Folder:
  """Finds the data in a folder or a file, locally or on gs://.

  Raises:
    SettingError: There is no data, or it is ambiguous or not whole.
  """
  try:
    root = epath.Path(path)
    root = root if "://" in os.fspath(path) else root.resolve()
    if root.is_dir():
      return _open_data_dir(root) or _open_files(root, _choose(root))
    if root.exists():
      return _open_files(root.parent, [_single(root)])
  except validation.SettingError:
    raise
  # A bucket's library may raise anything for a missing name or credential.
  except Exception as error:
    raise validation.SettingError(
      f"source ({os.fspath(path)!r}) must be readable: {error}; fix the "
      "path or the access to it, or copy it to a local folder."
    ) from error
  remedy = "correct the path"
  if _HUB_NAME.fullmatch(os.fspath(path)):
    remedy += (
      f", or get a data set of the Hugging Face hub with 'hf download "
      f"{os.fspath(path)} --repo-type dataset --local-dir DIR' and give DIR"
    )
  raise _refusal(path, "be a folder or a file, but there is none", remedy)


def _refusal(path: Any, rule: str, remedy: str) -> validation.SettingError:
  return validation.SettingError(
    f"source ({os.fspath(path)!r}) must {rule}; {remedy}."
  )


def _kind(name: str) -> str:
  """The kind of a file by its name's end; "" if it holds no data."""
  name = name.lower()
  if _NO_DATA.fullmatch(name):
    return ""
  name = name.removesuffix(".gz")
  return next((kind for kind in readers.KINDS if name.endswith(kind)), "")


def _single(path: epath.Path) -> _File:
  kind = _kind(path.name)
  if not kind:
    rule = f"end in one of {', '.join(readers.KINDS)}, or be a folder of such"
    remedy = "unpack or convert the file"
    raise _refusal(path, rule, remedy)
  return _File(path, kind, _split(path.name))


def _split(relative: str) -> str:
  """The split that a file's name, or else its nearest folder's, speaks of."""
  for part in reversed(relative.lower().split("/")):
    if match := _SPLIT.search(part):
      return match[1]
  return ""


def _choose(root: epath.Path) -> list[_File]:
  """The files of a folder to read, in the order of their names."""
  listed = sorted(_walk(root), key=os.fspath)
  found = [
    _File(path, kind, _split(path.relative_to(root).as_posix()))
    for path in listed
    if (kind := _kind(path.name))
  ]
  if not found:
    others = ", ".join(path.name for path in listed[:3]) or "nothing"
    kinds = ", ".join(readers.KINDS)
    raise _refusal(
      root,
      f"hold files that end in one of {kinds}, but holds "
      f"{validation.printable(others)}",
      "unpack or convert the data, or give a data dir that prepare made",
    )
  chosen = _without_others(found)
  if left_out := [file.path.name for file in found if file not in chosen]:
    names = validation.printable(", ".join(left_out[:3]))
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    logging.info("Left out of the source: %s%s.", names, more)
  _require_one_kind(root, chosen)
  _require_all_shards(root, chosen)
  return chosen


def _walk(folder: epath.Path, depth: int = _MAX_DEPTH) -> Iterator[epath.Path]:
  """The files under a folder, except hidden ones and pictures."""
  for path in folder.iterdir():
    name = path.name.lower()
    if name.startswith(".") or name.endswith(_PICTURES):
      continue
    # On gs:// each question takes a while.
    if _kind(name) or not depth or not path.is_dir():
      yield path
    else:
      yield from _walk(path, depth - 1)


def _without_others(files: Sequence[_File]) -> list[_File]:
  """The files of splits; of those, the ones that the split alone names.

  Without any split in a name, all files are one pool.
  """
  named = [file for file in files if file.split] or list(files)
  exact = {_set(file) for file in named if _is_exact(file)}
  return [file for file in named if _is_exact(file) or _set(file) not in exact]


def _set(file: _File) -> tuple[str, str, str]:
  return os.fspath(file.path.parent), file.kind, file.split


def _is_exact(file: _File) -> bool:
  """True for train.json and train-00000-of-00002.json, not for train_x.json."""
  stem = file.path.name.lower().removesuffix(".gz").removesuffix(file.kind)
  has_split = stem.startswith(file.split) and file.split != ""
  return has_split and bool(_SHARD.fullmatch(stem.removeprefix(file.split)))


def _require_one_kind(root: epath.Path, files: Sequence[_File]) -> None:
  first: dict[str, _File] = {}
  for file in files:
    other = first.setdefault(file.split, file)
    if other.kind != file.kind:
      one, two = (x.path.relative_to(root).as_posix() for x in (other, file))
      raise _refusal(
        root,
        f"hold one kind of files for a split, not {one} and {two}",
        f"give one of them, as in --source={other.path}",
      )


def _require_all_shards(root: epath.Path, files: Sequence[_File]) -> None:
  sets: dict[tuple[str, ...], list[str]] = {}
  for file in files:
    stem = re.split(r"-\d+-of-", file.path.name)[0]
    sets.setdefault((*_set(file), stem), []).append(file.path.name)
  for names in sets.values():
    # A name without a count, such as train-all.parquet, cannot be checked.
    counts = [_COUNT.search(name) for name in names]
    if any(count and int(count[1]) != len(names) for count in counts):
      raise _refusal(
        root,
        "have all files of a split, but not all those that belong to "
        f"{names[0]} are there, or there is another set",
        "fetch it again into an empty folder",
      )


def _open_data_dir(root: epath.Path) -> Folder | None:
  """The problems in a data dir; None if the folder is none."""
  sources = {} if "://" in os.fspath(root) else stored.sources(root)
  if not sources:
    return None
  found = {
    split: functools.partial(_read_problems, source)
    for split, source in sources.items()
  }
  paths = [
    epath.Path(path) for source in sources.values() for path in source.paths
  ]
  return Folder(found, _hashes(paths, []))


def _open_files(root: epath.Path, files: Sequence[_File]) -> Folder:
  splits: dict[str, list[_File]] = {}
  for file in files:
    splits.setdefault(file.split, []).append(file)
  found = {
    split: functools.partial(_read_rows, group, root)
    for split, group in splits.items()
  }
  paths = [file.path for file in files]
  return Folder(found, _hashes(paths, _named_pictures(files, root)))


def _read_problems(source: stored.Source) -> Iterator[RawRecord]:
  for index in range(len(source)):
    try:
      with records.all_faults():
        problem = source[index]
    except records.BadRecord as error:
      yield error
    else:
      yield problem


def _read_rows(files: Sequence[_File], root: epath.Path) -> Iterator[RawRecord]:
  for file in files:
    read = functools.partial(_read_picture, file.path.parent, root)
    for values in readers.KINDS[file.kind](file.path):
      if isinstance(values, records.BadRecord):
        yield values
      else:
        yield Row(values, read)


def _candidates(folder: epath.Path, root: epath.Path, name: Any) -> list[str]:
  """The paths that a row may mean, of which none leaves the root.

  Raises:
    BadRecord: Each of them does.
  """
  shown = untrusted.shorten(name)
  if not isinstance(name, str) or not name:
    raise records.BadRecord("missing_image", f"{shown} names no file")
  name, top = name.removeprefix("file://"), os.fspath(root).rstrip("/") + "/"
  if "://" in name and not name.startswith(top):
    detail = f"{shown} is an address; download the picture and name its file"
    raise records.BadRecord("missing_image", detail)
  bases = [folder, folder / "images", root, root / "images"]
  paths = [_join(os.fspath(base), name) for base in bases]
  inside = [path for path in paths if path.startswith(top)]
  if not inside:
    detail = (
      f"{shown} is outside {top}; give the folder that holds data and pictures "
      "as the source"
    )
    raise records.BadRecord("missing_image", detail)
  return list(dict.fromkeys(inside))


def _join(base: str, name: str) -> str:
  """The path of a name under a base, without `..`; an absolute one stays."""
  path = name if "://" in name else posixpath.join(base, name)
  scheme, mark, rest = path.rpartition("://")
  return f"{scheme}{mark}{posixpath.normpath(rest)}"


def _read_picture(folder: epath.Path, root: epath.Path, name: str) -> bytes:
  """The content of a picture that a row in the folder names."""
  with records.all_faults("missing_image"):
    for path in _candidates(folder, root, name):
      try:
        return untrusted.read_bytes(epath.Path(path), images.MAX_BYTES)
      except (FileNotFoundError, NotADirectoryError):
        continue
  raise records.BadRecord(
    "missing_image",
    f"No such file: {untrusted.shorten(name)}, neither beside the data nor in "
    "images/ there",
  )


def _named_pictures(
  files: Sequence[_File], root: epath.Path
) -> list[epath.Path]:
  """The pictures that rows name, as far as their names end like pictures."""

  @functools.cache
  def listed(folder: str) -> frozenset[str]:
    path = epath.Path(folder)
    # A bucket's library has errors of its own for a folder that is not there.
    return frozenset(
      [each.name for each in path.iterdir()] if path.is_dir() else ()
    )

  found: dict[str, None] = {}
  for file in files:
    if file.kind == ".tar":
      continue
    is_columnar = file.kind in (".parquet", ".arrow")
    options = {"binary": False} if is_columnar else {}
    for values in readers.KINDS[file.kind](file.path, **options):
      for name in _strings(values):
        try:
          paths = _candidates(file.path.parent, root, name)
        except records.BadRecord:
          continue
        for path in paths:
          parent, _, base = path.rpartition("/")
          if base in listed(parent):
            found[path] = None
            break
  return [epath.Path(path) for path in found]


def _strings(value: Any) -> Iterator[str]:
  """The texts inside a value that may name a picture."""
  if isinstance(value, str):
    if len(value) < 1000 and value.lower().endswith(_PICTURES):
      yield value
  elif isinstance(value, Mapping):
    for each in value.values():
      yield from _strings(each)
  elif isinstance(value, list):
    for each in value:
      yield from _strings(each)


def _hashes(
  paths: Sequence[epath.Path], pictures: Sequence[epath.Path]
) -> dict[str, str]:
  """The hashes of files, by paths relative to the folder of the data.

  A source may thus be moved.
  """
  base = posixpath.commonpath([os.fspath(path.parent) for path in paths])
  every = [*paths, *pictures]
  names = [posixpath.relpath(os.fspath(path), base) for path in every]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    return dict(sorted(zip(names, pool.map(_hash, every), strict=True)))


def _hash(path: epath.Path) -> str:
  """A hash of a file's content; "" if it is no file that can be read."""
  digest = hashlib.sha256()
  try:
    untrusted.size_of(path)
    with path.open("rb") as file:
      while block := file.read(2**20):
        digest.update(block)
  # A name may be too long, hold a NUL, or name a folder.
  except (OSError, ValueError):
    return ""
  return digest.hexdigest()[:32]
