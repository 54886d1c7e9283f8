"""Recognizes folders of problems by their files, and reads them.

- The Hugging Face snapshot: `testmini-*.parquet`, `test-*.parquet`.
- The GitHub layout: `testmini.json`, `test.json`, keyed by pid, and the
  images that they name, `images/N.jpg`, beside them.
- A data dir, or the ArrayRecord files that `stored.write` wrote.

The files of the first two may also lie in `data/` under the folder. Records are
not checked here: an unreadable one is passed on as its own `BadRecord`.

References:
  The layouts: https://huggingface.co/datasets/AI4Math/MathVista,
    https://github.com/lupantech/MathVista/tree/main/data
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines import images, records, validation
from data_pipelines.sources import mathvista, stored
from data_pipelines.text import untrusted

# A problem, a row of a parquet file, or the reason why there is neither.
RawRecord = records.Problem | Mapping[str, Any] | records.BadRecord
# For each split of the source, a function that reads its records.
Readers = Mapping[str, Callable[[], Iterable[RawRecord]]]

_JSON_SPLITS = ("testmini", "test")


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder of problems in a known layout."""

  readers: Readers
  files: dict[str, str]  # Hash of the content of each file, by relative path.


def find(folder: epath.PathLike) -> Folder:
  """Recognizes the layout of a folder; parquet and JSON may be on gs:// too.

  Raises:
    SettingError: The folder has no known layout, several, or damaged files.
  """
  try:
    found = {
      kind: source
      for kind, open_layout in (
        ("parquet", _open_parquet),
        ("JSON", _open_json),
        ("ArrayRecord", _open_array_record),
      )
      if (source := open_layout(folder)) is not None
    }
  except validation.SettingError:
    raise
  # A bucket's library may raise anything for a missing name or credential.
  except Exception as error:
    raise validation.SettingError(
      f"source ({os.fspath(folder)!r}) must be readable: {error}; fix the "
      "path or the access to it, or copy it to a local folder."
    ) from error
  if len(found) == 1:
    return found.popitem()[1]
  if found:
    raise validation.SettingError(
      f"source ({os.fspath(folder)!r}) must hold one kind of files, not "
      f"{' and '.join(found)}; move the other files elsewhere."
    )
  raise validation.SettingError(
    f"source ({os.fspath(folder)!r}) must be a folder with files such as "
    "testmini-*.parquet, or testmini.json and images/, itself or in its data/, "
    "or a data dir that prepare made; get one with 'hf download "
    "AI4Math/MathVista --repo-type dataset --local-dir DIR'."
  )


def _open_parquet(folder: epath.PathLike) -> Folder | None:
  shards = mathvista.shards(folder)
  paths = [path for split in shards.values() for path in split]
  return _folder(mathvista.rows, shards, paths)


def _open_json(folder: epath.PathLike) -> Folder | None:
  root = epath.Path(folder)
  for parent in (root, root / "data"):
    splits = {split: parent / f"{split}.json" for split in _JSON_SPLITS}
    splits = {split: path for split, path in splits.items() if path.exists()}
    if splits:
      names = [
        entry.get("image")
        for path in splits.values()
        for _, entry in _json_entries(path)
        if isinstance(entry, dict)
      ]
      found = [_image_path(parent, name) for name in names]
      paths = [path for path in found if path is not None]
      return _folder(json_rows, splits, [*splits.values(), *paths])
  return None


def _open_array_record(folder: epath.PathLike) -> Folder | None:
  sources = {} if "://" in os.fspath(folder) else stored.sources(folder)
  paths = [path for source in sources.values() for path in source.paths]
  return _folder(_read_problems, sources, paths)


def _folder(
  read: Callable[[Any], Iterable[RawRecord]],
  splits: Mapping[str, Any],
  paths: Sequence[epath.PathLike],
) -> Folder | None:
  """The splits and files of a folder; None if it has none of this layout.

  Paths are relative to the first file's folder, so that a folder may be moved.
  """
  if not splits:
    return None
  readers = {
    split: functools.partial(read, files) for split, files in splits.items()
  }
  files = list(map(epath.Path, paths))
  root = files[0].parent
  named = {file.relative_to(root).as_posix(): file for file in files}
  return Folder(readers, {name: _hash(named[name]) for name in sorted(named)})


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


def _read_problems(source: stored.Source) -> Iterator[RawRecord]:
  for index in range(len(source)):
    try:
      with records.all_faults():
        problem = source[index]
    except records.BadRecord as error:
      yield error
    else:
      yield problem


def json_rows(path: epath.Path) -> Iterator[RawRecord]:
  """The records of `testmini.json` as rows of the parquet files.

  A missing image is null. There is no `query`: `records.from_row` builds it.

  Raises:
    SettingError: The file is no JSON object.
  """
  for pid, entry in _json_entries(path):
    yield _json_row(pid, entry, path.parent)


def _json_entries(path: epath.Path) -> Iterable[tuple[str, Any]]:
  """The pids of a JSON file, each with what the file holds for it."""
  try:
    document = json.loads(
      untrusted.read_bytes(path, untrusted.MAX_JSON_BYTES),
      object_pairs_hook=_keep_duplicate_keys,
    )
  except (OSError, ValueError, RecursionError) as error:
    why = "it nests too deeply" if isinstance(error, RecursionError) else error
    raise validation.SettingError(
      f"source file ({path}) must be JSON: {why}; fetch it again."
    ) from error
  if not isinstance(document, dict | _DuplicateKeys):
    raise validation.SettingError(
      f"source file ({path}) must map pids to problems, but holds a "
      f"{type(document).__name__}; take testmini.json of the GitHub repository."
    )
  return document.items()


class _DuplicateKeys:
  """A JSON object with a key twice; a dict would keep only the last one."""

  def __init__(self, pairs: list[tuple[str, Any]]):
    self._pairs = pairs

  def items(self) -> list[tuple[str, Any]]:
    return self._pairs


def _keep_duplicate_keys(
  pairs: list[tuple[str, Any]],
) -> dict[str, Any] | _DuplicateKeys:
  found = dict(pairs)
  return found if len(found) == len(pairs) else _DuplicateKeys(pairs)


def _json_row(pid: str, entry: Any, folder: epath.Path) -> RawRecord:
  if not isinstance(entry, dict):
    detail = f"{untrusted.shorten(pid)} is no JSON object"
    return records.BadRecord("not_a_record", detail)
  row = {"pid": pid, **entry}
  if row["pid"] != pid:
    detail = (
      f"the record at {untrusted.shorten(pid)} has the pid "
      f"{untrusted.shorten(row['pid'])}"
    )
    return records.BadRecord("mismatched_pid", detail)
  path = _image_path(folder, row.get("image"))
  image: Any = None
  if path is not None:
    try:
      with records.all_faults("missing_image"):
        content = untrusted.read_bytes(path, images.MAX_BYTES)
        image = {"bytes": content, "path": row["image"]}
    except records.BadRecord as error:
      image = error
  return {**row, "decoded_image": image}


def _image_path(folder: epath.Path, name: Any) -> epath.Path | None:
  """The path of an image; None without one, or outside the folder."""
  parts = pathlib.PurePosixPath(name).parts if isinstance(name, str) else ()
  if not parts or parts[0] == "/" or ".." in parts:
    return None
  return folder.joinpath(*parts)
