"""The folders that problems come in, told apart by the files they hold.

- The Hugging Face snapshot: `testmini-*.parquet`, `test-*.parquet`.
- The GitHub layout: `testmini.json`, `test.json`, keyed by pid, and the
  pictures that they name, `images/N.jpg`, beside them.
- What `data_pipelines.prepare` or `mathvista.write` made: ArrayRecord files.

Each but the last may also lie in `data/` under the folder. Knows nothing of
which records are good: what cannot be read is passed on as its own `BadRecord`.

References:
  The layouts: https://huggingface.co/datasets/AI4Math/MathVista,
    https://github.com/lupantech/MathVista/tree/main/data
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from data_pipelines import records
from data_pipelines.sources import mathvista

# A problem that is whole, a row as parquet has it, or why there is neither.
Raw = records.Problem | Mapping[str, Any] | records.BadRecord
# By the source's own splits, what reads their records from the start.
Readers = Mapping[str, Callable[[], Iterable[Raw]]]

_JSON_SPLITS = ("testmini", "test")


@dataclasses.dataclass(frozen=True)
class Folder:
  """A source that has been found.

  Attributes:
    readers: What reads its records, by split.
    files: Name under the folder and bytes of each file that it consists of;
      another content is another list, unless its files kept their sizes.
  """

  readers: Readers
  files: list[tuple[str, int]]


def find(folder: epath.PathLike) -> Folder:
  """The source in a folder, of whichever kind.

  Args:
    folder: A local path; for parquet and JSON also one that `etils.epath`
      knows, such as gs://.

  Raises:
    SnapshotError: The folder holds none of them, more than one, or a damaged
      one.
  """
  try:
    found = {
      kind: source
      for kind, look in (
        ("parquet", _parquet),
        ("JSON", _github),
        ("ArrayRecord", _array_record),
      )
      if (source := look(folder)) is not None
    }
  except mathvista.SnapshotError:
    raise
  # A bucket's library raises what it likes for a missing name or credential.
  except Exception as error:
    raise mathvista.SnapshotError(
      f"source ({os.fspath(folder)!r}) must be readable: {error}; mend the "
      "path or the access to it, or copy it to a local folder."
    ) from error
  if len(found) == 1:
    return found.popitem()[1]
  if found:
    raise mathvista.SnapshotError(
      f"source ({os.fspath(folder)!r}) must hold one kind of files, not "
      f"{' and '.join(found)}; move the others elsewhere."
    )
  raise mathvista.SnapshotError(
    f"source ({os.fspath(folder)!r}) must be a folder with files such as "
    "testmini-*.parquet, or testmini.json and images/, itself or in its data/, "
    "or one that prepare has made; get one with 'hf download AI4Math/MathVista "
    "--repo-type dataset --local-dir DIR'."
  )


def _parquet(folder: epath.PathLike) -> Folder | None:
  shards = mathvista.shards(folder)
  if not shards:
    return None
  readers = {
    split: functools.partial(mathvista.rows, paths)
    for split, paths in shards.items()
  }
  paths = [path for split in shards.values() for path in split]
  return Folder(readers, _sizes(paths[0].parent, paths))


def _github(folder: epath.PathLike) -> Folder | None:
  root = epath.Path(folder)
  for place in (root, root / "data"):
    paths = {split: place / f"{split}.json" for split in _JSON_SPLITS}
    paths = {split: path for split, path in paths.items() if path.exists()}
    if paths:
      readers = {
        split: functools.partial(json_rows, path)
        for split, path in paths.items()
      }
      pictures = (place / "images").glob("*")
      return Folder(readers, _sizes(place, [*paths.values(), *pictures]))
  return None


def _array_record(folder: epath.PathLike) -> Folder | None:
  if "://" in os.fspath(folder) or not (sources := mathvista.sources(folder)):
    return None
  readers = {
    split: functools.partial(_problems, source)
    for split, source in sources.items()
  }
  paths = [path for source in sources.values() for path in source.paths]
  return Folder(readers, _sizes(pathlib.Path(paths[0]).parent, paths))


def _sizes(
  root: epath.PathLike, paths: Iterable[epath.PathLike]
) -> list[tuple[str, int]]:
  """By name, so that a folder may be moved."""
  root = epath.Path(root)
  return sorted(
    (
      epath.Path(path).relative_to(root).as_posix(),
      epath.Path(path).stat().length,
    )
    for path in paths
  )


def _problems(source: mathvista.Source) -> Iterator[Raw]:
  for index in range(len(source)):
    try:
      yield source[index]
    # What TFDS raises on a damaged or foreign example is of many kinds.
    except Exception as error:
      yield records.BadRecord("unreadable", f"{type(error).__name__}: {error}")


def json_rows(path: epath.Path) -> Iterator[Raw]:
  """The records of `testmini.json` as rows of the parquet files.

  A picture that is not there is null, as a row may have it. There is no
  `query`, which `records.from_row` builds.

  Raises:
    SnapshotError: The file is no JSON object.
  """
  try:
    document = json.loads(
      path.read_text(encoding="utf-8"), object_pairs_hook=_object
    )
  except (OSError, ValueError) as error:
    raise mathvista.SnapshotError(
      f"source file ({path}) must be JSON: {error}; fetch it again."
    ) from error
  if not isinstance(document, dict | _Repeated):
    raise mathvista.SnapshotError(
      f"source file ({path}) must map pids to problems, but holds a "
      f"{type(document).__name__}; take testmini.json of the GitHub repository."
    )
  for pid, entry in document.items():
    yield _json_row(pid, entry, path.parent)


class _Repeated:
  """A JSON object that gives a key twice, of which a dict keeps the last."""

  def __init__(self, pairs: list[tuple[str, Any]]):
    self._pairs = pairs

  def items(self) -> list[tuple[str, Any]]:
    return self._pairs


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
  found = dict(pairs)
  return found if len(found) == len(pairs) else _Repeated(pairs)


def _json_row(pid: str, entry: Any, folder: epath.Path) -> Raw:
  if not isinstance(entry, dict):
    return records.BadRecord("not_a_record", f"{pid!r} is no JSON object")
  row = {"pid": pid, **entry}
  if row["pid"] != pid:
    return records.BadRecord(
      "mismatched_pid", f"{pid!r} says that its pid is {row['pid']!r}"
    )
  name = row.get("image")
  picture = {"bytes": _picture(folder, name), "path": name}
  return {**row, "decoded_image": picture}


def _picture(folder: epath.Path, name: Any) -> bytes | None:
  """The bytes of a picture, if it is one of the folder's own."""
  parts = pathlib.PurePosixPath(name).parts if isinstance(name, str) else ()
  if not parts or parts[0] == "/" or ".." in parts:
    return None
  try:
    return folder.joinpath(*parts).read_bytes()
  # A name may be too long, hold a NUL, or be that of a folder.
  except (OSError, ValueError):
    return None
