"""Copies of what lies in buckets on this machine's disk, made once.

A copy is in `~/.cache/grpo_tpu/copies`, by the names, sizes and generations of
its objects: it is made again, in place of the older one, when they change.
"""

import base64
import collections
import contextlib
import errno
import fcntl
import hashlib
import itertools
import math
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping

import google_crc32c
from absl import logging

from data_pipelines.storage import objects, paths
from data_pipelines.validation import SettingError, printable

# Bytes of a request, and how many are under way. With more, new memory costs
# more time than the network.
_PIECE, _REQUESTS = 8 * 2**20, 16
_TRIES = 3
_LOG_SECONDS = 5.0


class _Changed(Exception):
  """An object is gone, or is not the one that was listed."""


def host_copy(
  path: str | os.PathLike[str],
  *,
  what: str,
  names: Collection[str] | None = None,
) -> pathlib.Path:
  """The file or folder on this machine's disk; copied there from a bucket.

  A copy appears whole or not at all, once for all processes of the machine. A
  path on a disk is returned as it is. `what` is the setting or flag that names
  it, `names` the files of a folder to copy, by default all.

  Raises:
    SettingError: It is not there, may not be read, keeps changing, or does not
      fit on the disk.
    OSError: The bucket does not answer.
  """
  if not paths.is_remote(path):
    return pathlib.Path(path)
  text, fault = os.fspath(path), None
  home = cache_folder("copies") / digest(text)
  with home.with_suffix(".lock").open("a") as file:
    with contextlib.suppress(OSError):  # A file system without locks.
      fcntl.lockf(file, fcntl.LOCK_EX)
    for _ in range(_TRIES):
      found = objects.list_objects(text, what=what)
      if names is not None:
        found = {name: x for name, x in found.items() if name in names}
      _check_names(found, text, what)
      copy = home / digest(repr(sorted(found.items()))) / os.path.basename(text)
      files = [(copy / name, each.size) for name, each in found.items()]
      if all(x.is_file() and x.stat().st_size == size for x, size in files):
        return copy
      shutil.rmtree(home, ignore_errors=True)  # Older, or unfinished.
      try:
        _build(text, found, copy, what)
        return copy
      except _Changed as error:
        logging.warning("Copies %s again: %s", text, error)
        fault = error
  raise SettingError(
    f"{what} ({text!r}) must not change while it is copied: {fault}; wait for "
    "what writes there, and see that this machine's account may read it all."
  ) from fault


def digest(text: str) -> str:
  """A name of 24 characters for a text."""
  return hashlib.sha256(text.encode()).hexdigest()[:24]


def cache_folder(name: str) -> pathlib.Path:
  """A folder of this user that outlives the process."""
  try:
    folder = pathlib.Path("~/.cache/grpo_tpu").expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder
  except (OSError, RuntimeError):  # No home, or one that cannot be written.
    folder = pathlib.Path(tempfile.gettempdir()) / f"grpo_tpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
      raise PermissionError(f"{folder} belongs to another user.") from None
    (folder / name).mkdir(exist_ok=True)
    return folder / name


def _check_names(found: Collection[str], text: str, what: str) -> None:
  """Refuses a folder without files, or whose names are no paths of files."""
  fault = "" if found else "there is none"
  for name in filter(None, found):
    above = {str(each) for each in pathlib.PurePath(name).parents}
    is_path = os.path.normpath(name) == name != "." and name[0] != "/"
    if not is_path or name.startswith("..") or above & {*found} or "\0" in name:
      fault = f"{printable(name)!r} in it is no path, or also a folder"
  if fault:
    raise SettingError(
      f"{what} ({text!r}) must be a file or a folder of files, but {fault}; "
      "correct the path, or copy the files there first."
    )


def _build(
  text: str, found: Mapping[str, objects.Object], copy: pathlib.Path, what: str
) -> None:
  """Copies the objects beside their place, and moves them there."""
  size = sum(each.size for each in found.values())
  building = copy.parent.with_suffix(".building")
  building.mkdir(parents=True)
  start, done, report = time.monotonic(), 0, _LOG_SECONDS
  try:
    if (free := shutil.disk_usage(building).free) < size:
      raise SettingError(
        f"{what} ({text!r}) must fit on this machine's disk, but has "
        f"{size / 1e9:.2f} GB, and {copy.parents[2]} has {free / 1e9:.2f} GB "
        "free; make room there, or let HOME be on a larger disk."
      )
    for name, pieces in itertools.groupby(_read(text, found), lambda x: x[0]):
      file, crc = building / copy.name / name, 0
      file.parent.mkdir(parents=True, exist_ok=True)
      with file.open("wb") as out:
        for _, data in pieces:
          out.write(data)
          crc, done = google_crc32c.extend(crc, data), done + len(data)
          seconds = time.monotonic() - start
          if seconds > report or done == size:
            report = seconds + _LOG_SECONDS if done < size else math.inf
            numbers = done / 1e9, size / 1e9, done / 1e6 / seconds
            message = "%s: copied %.2f of %.2f GB, %.0f MB/s, of %s."
            logging.info(message, what, *numbers, text)
      if base64.b64encode(crc.to_bytes(4)).decode() != found[name].crc32c:
        raise _Changed(f"{printable(name)} has another checksum")
    building.rename(copy.parent)
  finally:
    shutil.rmtree(building, ignore_errors=True)


def _read(
  text: str, found: Mapping[str, objects.Object]
) -> Iterator[tuple[str, bytes]]:
  """The pieces of the objects in order; many requests are under way at once.

  Raises:
    _Changed: An object is gone, is shorter than it was, or may not be read.
    OSError: The bucket does not answer.
  """
  import tensorstore as ts

  bucket, prefix = objects.split(text)
  context = ts.Context({"gcs_request_retries": {"max_retries": 8}})
  spec = {"driver": "gcs", "bucket": bucket}
  store = ts.KvStore.open(spec, context=context).result()
  ranges = (
    (name, slice(start, min(start + _PIECE, each.size)))
    for name, each in found.items()
    for start in range(0, max(each.size, 1), _PIECE)
  )
  waiting: collections.deque = collections.deque()
  while True:
    for name, part in itertools.islice(ranges, _REQUESTS - len(waiting)):
      key = "/".join(filter(None, (prefix, name)))
      future = store.read(key, byte_range=part) if part.stop else None
      waiting.append((name, future))
    if not waiting:
      return
    name, future = waiting.popleft()
    try:
      read = future and future.result()
    except Exception as error:  # TensorStore's errors have no classes.
      reason = printable(str(error))[:300]
      if re.search("OUT_OF_RANGE|PERMISSION_DENIED|UNAUTHENTICATED", reason):
        raise _Changed(reason) from error
      text = f"gs://{bucket} does not answer: {reason}"
      raise OSError(errno.ETIMEDOUT, text) from error
    if read and read.state != "value":
      raise _Changed(f"{printable(name)} is gone")
    yield name, read.value if read else b""
