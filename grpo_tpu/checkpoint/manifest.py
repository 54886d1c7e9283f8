"""What a checkpoint's files must be: sizes and checksums, written after them.

Orbax restores a file with a flipped byte without a word. A manifest lies beside
the folder it is of, as `00000012.manifest.json`, and is written last: a folder
without one is not known to be whole.
"""

import concurrent.futures
import errno
import json
from collections.abc import Mapping
from typing import Any

import google_crc32c
from etils import epath

SUFFIX = ".manifest.json"
UNFINISHED_SUFFIX = f"{SUFFIX}.tmp"
_CHUNK_BYTES = 1 << 24
_THREADS = 4


class Damaged(Exception):
  """A manifest that is not there, or not as it was written."""


def path_of(folder: epath.Path) -> epath.Path:
  """Where the manifest of `folder` lies."""
  return folder.with_name(f"{folder.name}{SUFFIX}")


def write(folder: epath.Path, facts: Mapping[str, Any]) -> None:
  """Reads all files of `folder` and writes down what they are.

  Args:
    folder: Which nobody writes to any more.
    facts: What else the manifest shall say, as JSON would hold it.
  """
  files = _files(folder)
  body = {
    "name": folder.name,
    "facts": dict(facts),
    "files": {
      name: {"bytes": size, "crc32c": checksum}
      for name, size, checksum in zip(
        files, _sizes(files), _checksums(files.values()), strict=True
      )
    },
  }
  text = json.dumps({"crc32c": _of_json(body), "body": body}, indent=1)
  path = path_of(folder)
  # Beside, then renamed: a kill in between leaves none.
  unfinished = path.with_name(f"{folder.name}{UNFINISHED_SUFFIX}")
  unfinished.write_text(f"{text}\n")
  unfinished.replace(path)


def read(folder: epath.Path) -> dict[str, Any]:
  """The `facts` that the manifest of `folder` was written with.

  Raises:
    Damaged: There is none, or it is not as it was written.
  """
  return _body(folder)["facts"]


def damage(
  folder: epath.Path, *, part: int = 0, parts: int = 1, under: str = ""
) -> str:
  """What is wrong with `folder`; "" if nothing is.

  Args:
    folder: With its manifest beside it.
    part: Which share of the files to look at, below `parts`.
    parts: How many shares of about the same size there are.
    under: Looks only at the files whose path within `folder` starts so.

  Returns:
    A kind of damage, a colon, and what exactly it is.
  """
  try:
    wanted = _body(folder)["files"]
  except Damaged as error:
    return str(error)
  try:
    extra = sorted(_files(folder).keys() - wanted.keys())
    if extra:
      return f"unknown file: {extra[0]}"
    names = sorted(wanted, key=lambda name: (-wanted[name]["bytes"], name))
    names = [name for name in names[part::parts] if name.startswith(under)]
    files = {name: folder / name for name in names}
    for name, size in zip(names, _sizes(files), strict=True):
      if size is None:
        return f"missing file: {name}"
      if size != wanted[name]["bytes"]:
        return f"wrong size: {name} {size}, not {wanted[name]['bytes']}"
    for name, value in zip(names, _checksums(files.values()), strict=True):
      if value != wanted[name]["crc32c"]:
        return f"wrong checksum: {name} {value}, not {wanted[name]['crc32c']}"
  except OSError as error:
    if error.errno != errno.EIO:  # The disk has lost it, not the network.
      raise
    return f"unreadable file: {error}"
  return ""


def _body(folder: epath.Path) -> dict[str, Any]:
  path = path_of(folder)
  try:
    whole = json.loads(path.read_bytes())
    body = whole["body"]
    is_as_written = whole["crc32c"] == _of_json(body)
  except FileNotFoundError as error:
    raise Damaged(f"no manifest: {path.name}") from error
  except (ValueError, KeyError, TypeError) as error:
    raise Damaged(f"damaged manifest: {path.name}: {error}") from error
  if not is_as_written:
    raise Damaged(f"damaged manifest: {path.name}: not as it was written")
  if body["name"] != folder.name:
    raise Damaged(f"foreign manifest: {path.name} is of {body['name']}")
  return body


def _files(folder: epath.Path) -> dict[str, epath.Path]:
  """All files below, by their paths within `folder`."""
  found, waiting = {}, [folder] if folder.is_dir() else []
  while waiting:
    for path in waiting.pop().iterdir():
      if path.is_dir():
        waiting.append(path)
      else:
        found[path.relative_to(folder).as_posix()] = path
  return dict(sorted(found.items()))


def _sizes(files: Mapping[str, epath.Path]) -> list[int | None]:
  """In bytes; None for what is no file."""
  return [
    path.stat().length if path.exists() and not path.is_dir() else None
    for path in files.values()
  ]


def _checksums(paths) -> list[str]:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    return list(threads.map(_checksum, paths))


def _checksum(path: epath.Path) -> str:
  value = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      value = google_crc32c.extend(value, chunk)
  return f"{value:08x}"


def _of_json(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return f"{google_crc32c.extend(0, text.encode()):08x}"
