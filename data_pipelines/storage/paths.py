"""Paths on a disk, or in a bucket: `gs://BUCKET/PATH`.

A bucket has no folders, renames or appends: an object appears whole or not at
all, and a folder exists as long as an object lies in it. `epath` reads and
writes both kinds. It imports TensorFlow at the first use of a bucket.
"""

import contextlib
import os
import pathlib
import posixpath
import re
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from data_pipelines.storage import objects
from data_pipelines.validation import require

_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/.*)?", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(path: str | os.PathLike[str]) -> bool:
  """True for a path in a bucket."""
  return os.fspath(path).startswith("gs://")


def to_path(name: str, value: str) -> epath.Path:
  """The path that a flag or a setting names; a leading `~` is the home.

  Raises:
    ValueError: It names no file or folder, on a disk or in a bucket.
  """
  require(bool(value.strip()), name, value, "name a file or a folder", "")
  if is_remote(value):
    return epath.Path(_normalize(name, value))
  remedy = "copy it to a disk or to gs://, and name it there"
  rule = "be a path on a disk, or gs://BUCKET/PATH"
  require(not _SCHEME.match(value), name, value, rule, remedy)
  path = pathlib.Path(value)
  try:
    path = path.expanduser()
    path.lstat()
  except (FileNotFoundError, NotADirectoryError, PermissionError):
    pass  # Whoever opens it says so.
  # No such home; a name that is too long, a loop of links; a null character.
  except (RuntimeError, OSError, ValueError) as error:
    raise ValueError(
      f"{name} ({value!r}) must name a file or a folder: {error}."
    ) from error
  return epath.Path(path)


def expand_path(name: str, value: str) -> str:
  """The text of a path as `to_path` reads it; "" stays."""
  return os.fspath(to_path(name, value)) if value else value


def is_path() -> Mapping[str, Any]:
  """The metadata of a field that names a file or a folder, or "" for none."""
  return {"expand": expand_path}


def absolute(path: str | os.PathLike[str]) -> epath.Path:
  """The path without links and from the root; one in a bucket stays."""
  text = os.fspath(path)
  return epath.Path(text if is_remote(text) else os.path.realpath(text))


def make_folder(path: str | os.PathLike[str]) -> epath.Path:
  """Makes a folder and those above it; a bucket needs none."""
  folder = epath.Path(path)
  if not is_remote(path):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file that appears whole or not at all; its folder must exist."""
  if is_remote(path):
    objects.put(path, data, what="file")
    return
  # Readers of a folder pass over names that begin with a dot.
  name = f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}.tmp"
  unfinished = pathlib.Path(path).with_name(name)
  try:
    with unfinished.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException:
    with contextlib.suppress(OSError):
      unfinished.unlink()
    raise


def _normalize(name: str, value: str) -> str:
  """A path in a bucket without empty parts and without a slash at its end."""
  rule = "be gs://BUCKET/PATH, without . or .. in it"
  parts = value.removeprefix("gs://").split("/")
  holds = _BUCKET.fullmatch(value) and not {".", ".."} & set(parts)
  holds = holds and not re.search(r"[\x00-\x1f\x7f]", value)
  require(bool(holds), name, value, rule, "write, as in gs://my-bucket/runs/1")
  return "gs://" + posixpath.join(*filter(None, parts))
