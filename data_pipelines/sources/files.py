"""Finds the data in a folder or a file, and reads it row by row.

The kind of a file follows from its name's end, the split from its name or its
folders'. An unreadable row is passed on as its own `BadRecord`.
"""

import collections
import concurrent.futures
import contextlib
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
from data_pipelines.storage import objects, paths
from data_pipelines.text import untrusted
from data_pipelines.validation import printable


class Row(NamedTuple):
  """A record as its file holds it."""

  values: Mapping[str, Any]  # Plain Python values by column.
  read: Callable[[str], bytes]  # The bytes of a file that the row names.


type RawRecord = records.Problem | Row | records.BadRecord
# For each split of the source, "" if it names none, what reads its records.
type Readers = Mapping[str, Callable[[], Iterable[RawRecord]]]


@dataclasses.dataclass(frozen=True)
class Folder:
  """The data in a folder or a file."""

  readers: Readers  # The files of a split in the order of their names.
  # The hashes of files, also of pictures that rows name, by relative path.
  files: dict[str, str]
  counts: dict[str, int]  # Records of each split, where that costs little.


class _File(NamedTuple):
  path: epath.Path
  kind: str  # A key of `readers.KINDS`.
  split: str
  is_exact: bool  # True for train.json, train-00000-of-00002.json.


_SPLIT = re.compile(
  "(?<![a-z])(train|training|val|valid|validation|dev|eval|evaluation|test"
  "|testing|testmini)(?![a-z])"
)
# The number of a shard, and a hash.
_SHARD = re.compile(r"([-_.]?\d+)*([-_]of[-_]\d+)?([-_][0-9a-f]{8,})?")
_COUNT = re.compile(r"-\d+-of-(\d+)\b")
# Files about the data.
_NO_DATA = re.compile(
  r"cache-.*|rejects\.jsonl"
  r"|(dataset_infos?|dataset_dict|state|features|manifest)\.json"
)
_MAX_DEPTH = 6
_KNOWN = ", ".join(readers.KINDS)


def find(path: epath.PathLike) -> Folder:
  """Finds the data in a folder or a file, locally or on gs://."""
  with validation.user_errors():
    root = epath.Path(paths.expand_path("source", os.fspath(path)))
  root, is_folder, exists = paths.absolute(root), False, False
  try:
    if paths.is_remote(root):
      exists = "" in (found := objects.list_objects(root, what="source"))
      is_folder = bool(found) and not exists
    else:
      is_folder, exists = root.is_dir(), root.exists()
    if is_folder:
      return _open_data_dir(root) or _open(root, _choose(root))
    if exists:
      if file := _file(root, root.name):
        return _open(root.parent, [file])
      rule = f"end in one of {_KNOWN}, or be a folder of such files"
      raise _refusal(root, rule, "unpack or convert it")
  except validation.SettingError:
    raise
  except Exception as error:
    if validation.is_machine_failure(error):
      raise
    raise validation.SettingError(
      f"source ({os.fspath(path)!r}) must be readable: {error}; fix the "
      "path or the access to it, or copy it to a local folder."
    ) from error
  remedy = "correct the path"
  if re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(path)):
    remedy += (
      f"; for a data set on the Hugging Face hub, run 'hf download "
      f"{os.fspath(path)} --repo-type dataset --local-dir DIR' and give DIR"
    )
  raise _refusal(path, "be a folder or a file, and there is none", remedy)


def _refusal(path: Any, rule: str, remedy: str) -> validation.SettingError:
  return validation.SettingError(
    f"source ({os.fspath(path)!r}) must {printable(rule)}; {printable(remedy)}."
  )


def _file(path: epath.Path, relative: str) -> _File | None:
  """A file with its kind and split; None if its name's end is unknown."""
  *folders, name = relative.lower().split("/")
  stem = name.removesuffix(".gz")
  kind = next((kind for kind in readers.KINDS if stem.endswith(kind)), None)
  if kind is None:
    return None
  found = map(_SPLIT.search, (name, *reversed(folders)))
  split = next((match[1] for match in found if match), "")
  stem = stem.removesuffix(kind)
  is_shard = _SHARD.fullmatch(stem.removeprefix(split)) is not None
  return _File(path, kind, split, bool(split) and is_shard)


def _choose(root: epath.Path) -> list[_File]:
  """The files of a folder to read, in the order of their names."""
  paths = {x.relative_to(root).as_posix(): x for x in _walk(root, set())}
  dicts = {x for x in paths.values() if x.name == "dataset_dict.json"}
  found = []
  for name, path in sorted(paths.items()):
    file = None if _NO_DATA.fullmatch(path.name) else _file(path, name)
    # The folders of a DatasetDict are splits of any name.
    if file and (path.parent.parent / "dataset_dict.json") in dicts:
      file = file._replace(split=path.parent.name)
    found += [file] if file else []
  if not found:
    others = ", ".join(sorted(paths)[:3]) or "none"
    rule = f"hold files that end in one of {_KNOWN}, and holds {others}"
    raise _refusal(root, rule, "unpack or convert the data, or give its folder")
  # testmini.json, not annot_testmini.json or query.json.
  named = [file for file in found if file.split] or found
  exact = {file.split for file in named if file.is_exact}
  chosen = [x for x in named if x.is_exact or x.split not in exact]
  kept = set(chosen)
  if left_out := [file.path.name for file in found if file not in kept]:
    more = " and others" if len(left_out) > 3 else ""
    names = printable(", ".join(left_out[:3]))
    logging.info("Not read, for other files name a split: %s%s.", names, more)
  folders = {file.path.parent.relative_to(root).as_posix() for file in chosen}
  if len(folders) > len({file.split for file in chosen}):
    names = printable(", ".join(sorted(folders)[:9]))
    logging.info("Reading all folders, as one source: %s.", names)
  _check_choice(root, chosen)
  return chosen


def _walk(
  folder: epath.Path, seen: set[str], depth: int = _MAX_DEPTH
) -> Iterator[epath.Path]:
  """The files under a folder, except hidden ones and pictures."""
  if paths.is_remote(folder):
    for name in objects.list_objects(folder, what="source"):
      is_hidden = f"/{name}".count("/.") or name.count("/") > depth
      if not is_hidden and not name.lower().endswith(readers.PICTURES):
        yield folder / name
    return
  place = os.path.realpath(folder)
  if depth < 0 or place in seen:
    return
  seen.add(place)
  for path in folder.iterdir():
    name = path.name.lower()
    if name.startswith(".") or name.endswith(readers.PICTURES):
      continue
    if path.is_dir():  # Spark writes folders such as a.parquet.
      yield from _walk(path, seen, depth - 1)
    else:
      yield path


def _check_choice(root: epath.Path, files: Sequence[_File]) -> None:
  """Refuses a split of several kinds, or without all its shards."""
  first: dict[str, _File] = {}
  shards = collections.defaultdict(list)
  for file in files:
    other = first.setdefault(file.split, file)
    if other.kind != file.kind:
      one, two = (x.path.relative_to(root).as_posix() for x in (other, file))
      rule = f"hold one kind of files for a split, not {one} and {two}"
      remedy = f"give one of them, as in --source={other.path}"
      raise _refusal(root, rule, remedy)
    if match := _COUNT.search(file.path.name):
      stem = file.path.name[: match.start()]
      shards[file.path.parent, stem].append(int(match[1]))
  for (_, stem), counts in shards.items():
    if set(counts) != {len(counts)}:
      rule = (
        f"have all files of a split, and has {len(counts)} named {stem}-... of "
        f"{max(counts)}, or two sets of them"
      )
      raise _refusal(root, rule, "fetch it again into an empty folder")


def _open_data_dir(root: epath.Path) -> Folder | None:
  """The problems in a data dir; None if the folder is none."""
  if paths.is_remote(root):
    names = objects.list_objects(root, what="source")
    if not any(".array_record-" in name for name in names):
      return None
  sources = stored.sources(root)
  if not sources:
    return None
  found = {
    split: functools.partial(stored.read_all, source)
    for split, source in sources.items()
  }
  every = [path for source in sources.values() for path in source.paths]
  counts = {split: len(source) for split, source in sources.items()}
  return Folder(found, _hashes(every, []), counts)


def _open(root: epath.Path, files: Sequence[_File]) -> Folder:
  import pyarrow.parquet as pq  # Imported here: ArrayRecord does not need it.

  splits: dict[str, list[_File]] = {}
  for file in files:
    splits.setdefault(file.split, []).append(file)
  found = {
    split: functools.partial(_read_rows, group, root)
    for split, group in splits.items()
  }
  every = [os.fspath(file.path) for file in files]
  counts: dict[str, int] = {}
  is_local = not paths.is_remote(root)
  with contextlib.suppress(Exception):  # Whoever reads a damaged file says so.
    for split, group in splits.items():
      if is_local and {file.kind for file in group} == {".parquet"}:
        counts[split] = sum(pq.read_metadata(x.path).num_rows for x in group)
  return Folder(found, _hashes(every, _named_pictures(files, root)), counts)


def _read_rows(files: Sequence[_File], root: epath.Path) -> Iterator[RawRecord]:
  for file in files:
    read = functools.partial(_read_picture, file.path.parent, root)
    for values in readers.KINDS[file.kind](file.path):
      is_bad = isinstance(values, records.BadRecord)
      yield values if is_bad else Row(values, read)


def _candidates(folder: epath.Path, root: epath.Path, name: str) -> list[str]:
  """The paths that a row may mean, of which none leaves the root."""
  top = os.fspath(root).rstrip("/") + "/"
  name = name.removeprefix("file://")
  if not name or "://" in name and not name.startswith(top):
    return []
  found: dict[str, None] = {}
  for base in (folder, folder / "images", root, root / "images"):
    path = name if "://" in name else posixpath.join(os.fspath(base), name)
    scheme, mark, rest = path.rpartition("://")
    path = f"{scheme}{mark}{posixpath.normpath(rest)}"  # Without `..`.
    if path.startswith(top):
      found[path] = None
  return list(found)


def _read_picture(folder: epath.Path, root: epath.Path, name: Any) -> bytes:
  """The content of a picture that a row of a file in the folder names."""
  shown = untrusted.shorten(name)
  if not isinstance(name, str):
    raise records.BadRecord("missing_image", f"{shown} names no file")
  paths = _candidates(folder, root, name)
  with records.all_faults("missing_image"):
    for path in paths:
      try:
        return untrusted.read_bytes(path, images.MAX_BYTES)
      except (FileNotFoundError, NotADirectoryError):
        continue
  why = f"No such file: {shown}, beside the data or in images/; unpack it there"
  if not paths:
    why = f"{shown} is outside {root}; give a folder that holds it and the data"
    if "://" in name.removeprefix("file://"):
      why = f"{shown} is an address; download the picture and name its file"
  raise records.BadRecord("missing_image", why)


def _named_pictures(files: Sequence[_File], root: epath.Path) -> list[str]:
  """The paths of the pictures that rows name."""

  @functools.cache
  def list_folder(folder: str) -> frozenset[str]:
    if paths.is_remote(folder):
      return frozenset(objects.list_objects(folder, what="source"))
    return frozenset(os.listdir(folder) if os.path.isdir(folder) else ())

  found: dict[str, None] = {}
  for file in files:
    for name in readers.picture_names(file.path, file.kind):
      name = name.replace("\\", "/")
      # A path on another machine: `columns` looks for its last parts.
      tails = [name.split("/")[-n:] for n in (3, 2, 1) if name[0] == "/"]
      for each in (name, *map("/".join, tails)):
        for path in _candidates(file.path.parent, root, each):
          if posixpath.basename(path) in list_folder(posixpath.dirname(path)):
            found[path] = None
  return list(found)


def _hashes(paths: Sequence[str], pictures: Sequence[str]) -> dict[str, str]:
  """The hashes of files, by path relative to the folder of the data."""
  base = posixpath.commonpath(list(map(posixpath.dirname, paths)))
  every = [*paths, *pictures]
  names = [posixpath.relpath(path, base) for path in every]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    return dict(sorted(zip(names, pool.map(_hash, every), strict=True)))


def _hash(path: str) -> str:
  """A hash of a file's content; "" if it is no file that can be read."""
  digest = hashlib.sha256()
  try:
    if not paths.is_remote(path):
      untrusted.size_of(path)
    with objects.open_file(path) as file:
      while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()[:32]
  # A name may be too long, hold a NUL, or name a folder.
  except (OSError, ValueError) as error:
    if validation.is_machine_failure(error):
      raise
  return ""
