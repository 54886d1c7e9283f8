"""Manifests: the size and checksum of every file in a checkpoint.

Orbax restores a file with a flipped byte without an error. The manifest of
folder `00000012` is the file `00000012.manifest.json` beside it. It is written
last, so a folder without a manifest may be incomplete. A bucket knows the
checksums of its objects, so nothing is read there.
"""

import base64
import concurrent.futures
import errno
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import google_crc32c
from etils import epath

from data_pipelines.storage import objects, paths
from data_pipelines.text import untrusted
from data_pipelines.validation import printable

SUFFIX = ".manifest.json"
_CHUNK_BYTES = 1 << 24
_THREADS = 4


class ManifestError(Exception):
  """Raised for a manifest that is missing or was changed."""


class _File(NamedTuple):
  """A file of a checkpoint; `stored` describes an object of a bucket."""

  path: epath.Path
  stored: objects.Object | None = None

  @property
  def size(self) -> int:
    return self.stored.size if self.stored else self.path.stat().length


def path_for(folder: epath.Path) -> epath.Path:
  """The path of the manifest of `folder`."""
  return folder.with_name(f"{folder.name}{SUFFIX}")


def write(folder: epath.Path, facts: Mapping[str, Any]) -> None:
  """Writes the manifest of a finished `folder`, whose files it reads.

  The manifest also stores `facts`, which JSON must be able to hold.
  """
  files = _list_files(folder)
  checksums = _checksums(files.values())
  rows = {
    name: {"bytes": file.size, "crc32c": checksum}
    for (name, file), checksum in zip(files.items(), checksums, strict=True)
  }
  body = {"name": folder.name, "facts": dict(facts), "files": rows}
  text = json.dumps({"crc32c": _json_checksum(body), "body": body}, indent=1)
  paths.write_whole(path_for(folder), f"{text}\n".encode())


def read(folder: epath.Path) -> dict[str, Any]:
  """Returns the `facts` that the manifest of `folder` was written with.

  Raises:
    ManifestError: The manifest is missing or was changed.
  """
  return _read_body(folder)["facts"]


def find_damage(
  folder: epath.Path, *, part: int = 0, parts: int = 1, under: str = ""
) -> str:
  """Compares the files of `folder` with its manifest.

  Args:
    folder: The folder; its manifest lies beside it.
    part: Index of the share of the files to check, less than `parts`.
    parts: Number of shares of about equal size.
    under: Check only files whose path within `folder` starts with this.

  Returns:
    A kind of damage, a colon and the details; "" if there is no damage.
  """
  try:
    wanted = _read_body(folder)["files"]
  except ManifestError as error:
    return str(error)
  try:
    found = _list_files(folder)
    if extra := sorted(found.keys() - wanted.keys()):
      return f"unknown file: {printable(extra[0])}"
    names = sorted(wanted, key=lambda name: (-wanted[name]["bytes"], name))
    names = [name for name in names[part::parts] if name.startswith(under)]
    for name in names:
      # A name that leads out of the folder is not among those found.
      if name not in found:
        return f"missing file: {printable(name)}"
      size = found[name].size
      if size != wanted[name]["bytes"]:
        return (
          f"wrong size: {printable(name)} {size}, not "
          f"{untrusted.shorten(wanted[name]['bytes'])}"
        )
    values = _checksums([found[name] for name in names])
    for name, value in zip(names, values, strict=True):
      if value != wanted[name]["crc32c"]:
        return (
          f"wrong checksum: {printable(name)} {value}, not "
          f"{printable(wanted[name]['crc32c'][:8])}"
        )
  except FileNotFoundError as error:  # A link to nothing.
    return f"missing file: {error}"
  except OSError as error:
    if error.errno != errno.EIO:  # EIO: the disk lost the data for good.
      raise
    return f"unreadable file: {error}"
  return ""


def move_aside(folder: epath.Path, target: epath.Path) -> str:
  """Moves a damaged folder and its manifest; returns an error or "".

  If the target exists, a number is added to its name.
  """
  free, number = target, 1
  try:
    while free.exists() or path_for(free).exists():
      number += 1
      free = target.with_name(f"{target.name}-{number}")
    free.parent.mkdir(exist_ok=True)
    # In a bucket, each object is copied and deleted. A folder that is moved in
    # part still has its manifest, so it is not deleted as an interrupted save.
    for old, new in ((folder, free), (path_for(folder), path_for(free))):
      if old.exists():
        old.rename(new)
  except OSError as error:
    return f"{folder} is damaged, and cannot be moved aside: {error}"
  return ""


def _read_body(folder: epath.Path) -> dict[str, Any]:
  path = path_for(folder)
  try:
    whole = untrusted.read_json(path, source="it")
    body = untrusted.get_field(whole, "body", dict, "it")
    if whole.get("crc32c") != _json_checksum(body):
      raise ValueError("its checksum differs")
    # Another program may write a checksum too.
    untrusted.get_field(body, "name", str, "it")
    facts = untrusted.get_field(body, "facts", dict, "it")
    if facts.get("score") is not None:
      untrusted.get_field(facts, "score", float, "its facts")
    if "metric" in facts:
      untrusted.get_field(facts, "metric", str, "its facts")
    files = untrusted.get_field(body, "files", dict, "it")
    for name, row in files.items():
      source = f"its entry of {name}"
      untrusted.check_kind(row, dict, source)
      untrusted.get_field(row, "bytes", int, source)
      untrusted.get_field(row, "crc32c", str, source)
  except FileNotFoundError as error:
    raise ManifestError(f"no manifest: {path.name}") from error
  except (ValueError, RecursionError) as error:
    reason = str(error).removesuffix(".")
    raise ManifestError(f"damaged manifest: {path.name}: {reason}") from error
  if body["name"] != folder.name:
    made_for = untrusted.shorten(body["name"])
    raise ManifestError(
      f"foreign manifest: {path.name} was made for {made_for}"
    )
  return body


def _list_files(folder: epath.Path) -> dict[str, _File]:
  """All files in the folder and below, by their path within it."""
  if paths.is_remote(folder):
    found = objects.list_objects(folder, what="the checkpoint")
    return {name: _File(folder / name, x) for name, x in found.items()}
  walk = [root / name for root, _, names in folder.walk() for name in names]
  files = {path.relative_to(folder).as_posix(): _File(path) for path in walk}
  return dict(sorted(files.items()))


def _checksums(files: Iterable[_File]) -> list[str]:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    return list(threads.map(_checksum, files))


def _checksum(file: _File) -> str:
  if file.stored:
    return base64.b64decode(file.stored.crc32c).hex()
  value = 0
  # Only what has a size is opened: a pipe or a device would never end.
  if not file.size:
    return f"{value:08x}"
  with file.path.open("rb") as content:
    while chunk := content.read(_CHUNK_BYTES):
      value = google_crc32c.extend(value, chunk)
  return f"{value:08x}"


def _json_checksum(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return f"{google_crc32c.extend(0, text.encode()):08x}"
