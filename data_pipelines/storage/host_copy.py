"""Copies of what lies in buckets on this machine's disk, made once.

A copy is in `~/.cache/grpo_tpu/copies`, by the names, sizes and generations of
its objects, so it is made again when one changes; older ones are removed.
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
import shutil
import tempfile
import threading
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
# The copies that this process reads, each with the lock that keeps it.
_in_use: dict[pathlib.Path, int] = {}
_one_thread = threading.RLock()


def host_copy(
  path: str | os.PathLike[str],
  *,
  what: str,
  names: Collection[str] | None = None,
) -> pathlib.Path:
  """The file or folder on this machine's disk; copied there from a bucket.

  Appears whole or not at all, once for all processes of the machine. A path on
  a disk is returned as it is.

  Args:
    path: A file or a folder, on a disk or in a bucket.
    what: The setting or flag that names it, for errors and logs.
    names: The relative names of the files of a folder to copy; None for all.

  Raises:
    SettingError: It is not there, may not be read, keeps changing, or does not
      fit on the disk.
    OSError: The bucket does not answer.
  """
  if not paths.is_remote(path):
    return pathlib.Path(path)
  text = os.fspath(path)
  home = cache_folder("copies") / _digest(text)
  with _one_thread, lock(home.with_suffix(".lock"), text):
    for _ in range(_TRIES):
      found = objects.list_objects(text, what=what)
      if not found:
        raise SettingError(
          f"{what} ({text!r}) must be a file or a folder, and there is none; "
          "correct the path, or copy it there first."
        )
      if names is not None:
        found = {name: x for name, x in found.items() if name in names}
      _check_names(found, text, what)
      copy = home / _digest(repr(sorted(found.items())))
      target = copy / text.rpartition("/")[2]
      try:
        if not _is_whole(target, found):
          _remove_others(home)
          _build(text, found, target, what)
        _keep(copy)
        return target
      except objects.Changed as error:
        logging.warning("%s in %s; copies it again.", error, text)
  raise SettingError(
    f"{what} ({text!r}) must not change while it is copied; wait for what "
    "writes there."
  )


def cache_folder(name: str) -> pathlib.Path:
  """A folder that outlives this process, for its user alone where possible."""
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


@contextlib.contextmanager
def lock(file: pathlib.Path, shown: str) -> Iterator[None]:
  """Waits until no other process of this machine holds the lock of the file."""
  with file.open("a") as held:
    try:
      fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      logging.info("Waits for another process, which makes %s here.", shown)
      fcntl.lockf(held, fcntl.LOCK_EX)
    yield


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:24]


def _check_names(found: Collection[str], text: str, what: str) -> None:
  """Refuses names that would be no files below one folder."""
  above = {str(x) for name in found for x in pathlib.PurePath(name).parents}
  for name in found:
    parts = name.split("/") if name else []
    if not all(parts) or {".", ".."} & {*parts} or "\0" in name:
      fault = "is no path of a file"
    elif name in above:
      fault = "is a file and a folder"
    else:
      continue
    raise SettingError(
      f"{what} ({text!r}) must hold files, but {printable(name)!r} in it "
      f"{fault}; remove it, or copy the others to a folder of their own."
    )


def _is_whole(
  target: pathlib.Path, found: Mapping[str, objects.Object]
) -> bool:
  """True if the copy has all files, with their sizes."""
  files = ((target / name, each.size) for name, each in found.items())
  return all(x.is_file() and x.stat().st_size == size for x, size in files)


def _keep(copy: pathlib.Path) -> None:
  """Keeps other processes from removing a copy while this one runs."""
  if copy not in _in_use:
    file = os.open(copy.with_suffix(".use"), os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.suppress(OSError):  # A file system without locks.
      fcntl.lockf(file, fcntl.LOCK_SH)
    _in_use[copy] = file


def _remove_others(home: pathlib.Path) -> None:
  """Removes unfinished and older copies that no process reads."""
  home.mkdir(exist_ok=True)
  for copy in home.iterdir():
    if copy in _in_use or not copy.is_dir():
      continue
    with copy.with_suffix(".use").open("a+") as file:
      try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        continue
      shutil.rmtree(copy, ignore_errors=True)
      copy.with_suffix(".use").unlink()


def _build(
  text: str,
  found: Mapping[str, objects.Object],
  target: pathlib.Path,
  what: str,
) -> None:
  """Copies the objects beside their place, and moves them there."""
  size = sum(each.size for each in found.values())
  copy = target.parent
  building = copy.with_suffix(".building")
  start, copied, report = time.monotonic(), 0, _LOG_SECONDS
  message = "%s: copied %.2f of %.2f GB of %s, %.0f MB/s."
  try:
    if shutil.disk_usage(copy.parent).free < size:
      raise OSError(errno.ENOSPC, "The disk is too small.")
    with objects.refusals(text, what=what):
      for name, pieces in itertools.groupby(_read(text, found), lambda x: x[0]):
        file, crc = building / target.name / name, 0
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
          for _, data in pieces:
            out.write(data)
            crc, copied = google_crc32c.extend(crc, data), copied + len(data)
            seconds = time.monotonic() - start
            if seconds > report or copied == size:
              report = seconds + _LOG_SECONDS if copied < size else math.inf
              done = copied / 1e9, size / 1e9, text, copied / 1e6 / seconds
              logging.info(message, what, *done)
        if base64.b64encode(crc.to_bytes(4)).decode() != found[name].crc32c:
          raise objects.Changed(name or text)
    shutil.rmtree(copy, ignore_errors=True)
    building.rename(copy)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    shutil.rmtree(building, ignore_errors=True)
    free = shutil.disk_usage(copy.parent).free
    raise SettingError(
      f"{what} ({text!r}) must fit on this machine's disk, but has "
      f"{size / 1e9:.2f} GB, and {copy.parent.parent} has {free / 1e9:.2f} GB "
      "free; make room there, or let HOME be on a larger disk."
    ) from error
  finally:
    shutil.rmtree(building, ignore_errors=True)


def _read(
  text: str, found: Mapping[str, objects.Object]
) -> Iterator[tuple[str, bytes]]:
  """The pieces of the objects in order; many requests are under way at once.

  Raises:
    Changed: An object is gone, or is shorter than it was.
  """
  bucket, prefix = objects.split(text)
  store = objects.store(bucket)
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
    yield name, objects.value(future, name or text) if future else b""
