"""Recognizes folders of problems by their files, and reads them.

- The Hugging Face snapshot: `testmini-*.parquet`, `test-*.parquet`.
- The GitHub layout: `testmini.json`, `test.json`, keyed by pid, and the
  images that they name, `images/N.jpg`, beside them.
- A data dir, or the ArrayRecord files that `mathvista.write` wrote.

The files of the first two may also lie in `data/` under the folder. Records are
not checked here: an unreadable one is passed on as its own `BadRecord`.

References:
  The layouts: https://huggingface.co/datasets/AI4Math/MathVista,
    https://github.com/lupantech/MathVista/tree/main/data
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines import records, validation
from data_pipelines.sources import mathvista

# A problem, a row of a parquet file, or the reason why there is neither.
RawRecord = records.Problem | Mapping[str, Any] | records.BadRecord
# For each split of the source, a function that reads its records.
Readers = Mapping[str, Callable[[], Iterable[RawRecord]]]

_JSON_SPLITS = ("testmini", "test")


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder of problems in a known layout."""

  readers: Readers
  files: list[tuple[str, int]]  # Relative path and size in bytes of each file.


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
      images = (parent / "images").glob("*")
      return _folder(json_rows, splits, [*splits.values(), *images])
  return None


def _open_array_record(folder: epath.PathLike) -> Folder | None:
  sources = {} if "://" in os.fspath(folder) else mathvista.sources(folder)
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
  sizes = [
    (file.relative_to(root).as_posix(), file.stat().length) for file in files
  ]
  return Folder(readers, sorted(sizes))


def _read_problems(source: mathvista.Source) -> Iterator[RawRecord]:
  for index in range(len(source)):
    try:
      yield source[index]
    # TFDS raises many kinds of errors for a damaged or foreign example.
    except Exception as error:
      yield records.BadRecord("unreadable", f"{type(error).__name__}: {error}")


def json_rows(path: epath.Path) -> Iterator[RawRecord]:
  """The records of `testmini.json` as rows of the parquet files.

  A missing image is null. There is no `query`: `records.from_row` builds it.

  Raises:
    SettingError: The file is no JSON object.
  """
  try:
    document = json.loads(
      path.read_text(encoding="utf-8"), object_pairs_hook=_keep_duplicate_keys
    )
  except (OSError, ValueError) as error:
    raise validation.SettingError(
      f"source file ({path}) must be JSON: {error}; fetch it again."
    ) from error
  if not isinstance(document, dict | _DuplicateKeys):
    raise validation.SettingError(
      f"source file ({path}) must map pids to problems, but holds a "
      f"{type(document).__name__}; take testmini.json of the GitHub repository."
    )
  for pid, entry in document.items():
    yield _json_row(pid, entry, path.parent)


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
    return records.BadRecord("not_a_record", f"{pid!r} is no JSON object")
  row = {"pid": pid, **entry}
  if row["pid"] != pid:
    return records.BadRecord(
      "mismatched_pid", f"the record at {pid!r} has the pid {row['pid']!r}"
    )
  name = row.get("image")
  image = {"bytes": _read_image(folder, name), "path": name}
  return {**row, "decoded_image": image}


def _read_image(folder: epath.Path, name: Any) -> bytes | None:
  """The bytes of an image; None if it is missing or outside the folder."""
  parts = pathlib.PurePosixPath(name).parts if isinstance(name, str) else ()
  if not parts or parts[0] == "/" or ".." in parts:
    return None
  try:
    return folder.joinpath(*parts).read_bytes()
  # A name may be too long, hold a NUL or name a folder.
  except (OSError, ValueError):
    return None
