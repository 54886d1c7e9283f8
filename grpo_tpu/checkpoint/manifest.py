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
from collections.abc import Callable, Mapping
from typing import Any

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


def path_for(folder: epath.Path) -> epath.Path:
  """The path of the manifest of `folder`."""
  return folder.with_name(f"{folder.name}{SUFFIX}")


def write(folder: epath.Path, facts: Mapping[str, Any]) -> None:
  """Writes the manifest of a finished `folder`, whose files it reads.

  The manifest also stores `facts`, which JSON must be able to hold.
  """
  files = describe_files(folder)
  body = {"name": folder.name, "facts": dict(facts), "files": files}
  text = json.dumps({"crc32c": _json_checksum(body), "body": body}, indent=1)
  paths.write_whole(path_for(folder), f"{text}\n".encode())


def describe_files(
  folder: epath.Path, wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, dict[str, Any]]:
  """Size and checksum of the files of `folder`, or of a file, by name."""
  found = {k: x for k, x in _list_files(folder).items() if wanted(k)}
  return {
    name: {"bytes": found[name][0], "crc32c": checksum}
    for name, checksum in _checksums(folder, found).items()
  }


def read_files(folder: epath.Path) -> dict[str, dict[str, Any]]:
  """The files in the manifest of `folder`, as `describe_files` gives them.

  Raises:
    ManifestError: As in `read`.
  """
  return _read_body(folder)["files"]


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

  Checks share `part` of `parts` about equal ones, of the files whose path in
  `folder` starts with `under`. Returns a kind of damage, a colon and the
  details; "" if there is no damage.
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
      size = found[name][0]
      if size != (right := wanted[name]["bytes"]):
        right = untrusted.shorten(right)
        return f"wrong size: {printable(name)} {size}, not {right}"
    mine = {name: found[name] for name in names}
    for name, value in _checksums(folder, mine).items():
      if value != (right := wanted[name]["crc32c"]):
        right = printable(right[:8])
        return f"wrong checksum: {printable(name)} {value}, not {right}"
  except FileNotFoundError as error:  # A link to nothing.
    return f"missing file: {error}"
  except OSError as error:
    if error.errno != errno.EIO:  # EIO: the disk lost the data for good.
      raise
    return f"unreadable file: {error}"
  return ""


def move_aside(folder: epath.Path, damage: str) -> None:
  """Moves a folder and its manifest into `quarantine/`."""
  name = f"{folder.name}-{damage.partition(':')[0].replace(' ', '-')}"
  free, number = folder.parent / "quarantine" / name, 1
  while free.exists() or path_for(free).exists():
    number += 1
    free = free.with_name(f"{name}-{number}")
  free.parent.mkdir(exist_ok=True)
  # In a bucket, each object is copied and deleted. A folder that is moved in
  # part still has its manifest, so it is not deleted as an interrupted save.
  for old, new in ((folder, free), (path_for(folder), path_for(free))):
    if old.exists():
      old.rename(new)


def _read_body(folder: epath.Path) -> dict[str, Any]:
  path = path_for(folder)
  try:
    whole = untrusted.read_json(path, source="it")
    body = untrusted.get_field(whole, "body", dict, "it")
    if whole.get("crc32c") != _json_checksum(body):
      raise ValueError("its checksum differs")
    # Another program may write a checksum too.
    for name, kind in (("name", str), ("facts", dict), ("files", dict)):
      untrusted.get_field(body, name, kind, "it")
    for name, kind in (("score", float), ("metric", str)):
      if body["facts"].get(name) is not None:
        untrusted.get_field(body["facts"], name, kind, "its facts")
    for file, row in body["files"].items():
      untrusted.check_kind(row, dict, f"its entry of {file}")
      for name, kind in (("bytes", int), ("crc32c", str)):
        untrusted.get_field(row, name, kind, f"its entry of {file}")
  except FileNotFoundError as error:
    raise ManifestError(f"no manifest: {path.name}") from error
  except (ValueError, RecursionError) as error:
    reason = str(error).removesuffix(".")
    raise ManifestError(f"damaged manifest: {path.name}: {reason}") from error
  if body["name"] != folder.name:
    other = untrusted.shorten(body["name"])
    raise ManifestError(f"foreign manifest: {path.name} was made for {other}")
  return body


def _list_files(folder: epath.Path) -> dict[str, tuple[int, str]]:
  """Size and checksum of all files below; "" for one that must be read."""
  if paths.is_remote(folder):
    found = objects.list_objects(folder, what="the checkpoint")
    return {
      name: (x.size, base64.b64decode(x.crc32c).hex())
      for name, x in found.items()
    }
  if folder.is_file():
    return {"": (folder.stat().length, "")}
  walk = [root / name for root, _, names in folder.walk() for name in names]
  return {
    path.relative_to(folder).as_posix(): (path.stat().length, "")
    for path in sorted(walk)
  }


def _checksums(
  folder: epath.Path, files: Mapping[str, tuple[int, str]]
) -> dict[str, str]:
  def checksum(name: str) -> str:
    size, known = files[name]
    return known or _checksum(folder / name, size)

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    return dict(zip(files, threads.map(checksum, files), strict=True))


def _checksum(path: epath.Path, size: int) -> str:
  value = 0
  if size:  # A pipe or a device, which would never end, has none.
    with path.open("rb") as content:
      while chunk := content.read(_CHUNK_BYTES):
        value = google_crc32c.extend(value, chunk)
  return f"{value:08x}"


def _json_checksum(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return f"{google_crc32c.extend(0, text.encode()):08x}"
