"""Builds a data dir from a source of problems, whole or not at all.

docs/data.md lists its files. A complete one is reused as it is.
"""

import collections
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from absl import logging
from etils import epath

from data_pipelines import validation
from data_pipelines.records import IMAGE_MARK
from data_pipelines.sources import divide, exclusion, origin, splits, stored
from data_pipelines.sources.origin import Request
from data_pipelines.sources.rows import mathvista
from data_pipelines.storage import host_copy, objects, paths
from data_pipelines.text import chat_prompts, tokenizer, untrusted

# Raise this when an old request gives new bytes.
FORMAT = 3
SYNTHETIC = origin.SYNTHETIC
_MANIFEST, _REJECTS = stored.MANIFEST, "rejects.jsonl"
_TOKENIZER, _MARK = "tokenizer.model", ".preparing"
_OWN_FILES = {_MANIFEST, _REJECTS, _TOKENIZER, _MARK, stored.NAME}
_MAX_TOKENIZER_TEXTS = 3_000


def build_data_dir(
  request: Request, *, overwrite: bool = False, num_workers: int = 0
) -> dict[str, Any]:
  """Builds the data dir, unless it is complete already; returns its manifest.

  If two processes ask for the same one, the second waits and reuses it; of two
  machines one reuses what the other has built. One in a bucket is built on this
  machine's disk. The number of processes that check records changes no file; 0
  is this one.
  """
  data_dir = find_data_dir(request)
  source, options = _open_source(request)
  beside = pathlib.Path(data_dir)
  if is_remote := paths.is_remote(data_dir):
    name = host_copy.digest(os.fspath(data_dir))
    beside = host_copy.cache_folder("building") / name
  # Two machines build in two folders, for a shared disk may know no locks.
  building, retired = (
    beside.with_name(f".{beside.name}.{word}.{socket.gethostname()}")
    for word in ("building", "retired")
  )
  with _lock(beside):
    manifest = read_manifest(data_dir)
    if manifest is not None:
      changes = _changes(manifest["request"], options)
      if changes and not overwrite:
        raise _other_request(data_dir, manifest, changes)
      if not changes and manifest["files"] == _sizes(data_dir):
        logging.info("Reusing %s: %s.", data_dir, manifest["counts"])
        return manifest
      why = f"{changes[0]}." if changes else "some of its files are damaged."
      logging.info("Rebuilding %s: %s", data_dir, why)
    # A killed process leaves these.
    for leftover in (building, retired):
      shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    try:
      if is_remote:
        objects.put(data_dir / _MARK, b"", what="data_dir")  # If it may write.
      manifest = _write(request, source, options, building, num_workers)
      if is_remote:
        parts = building, data_dir
        objects.replace_folder(*parts, last=_MANIFEST, what="data_dir")
      elif not _holds(data_dir, manifest):
        with contextlib.suppress(FileNotFoundError):
          data_dir.rename(retired)
        try:
          building.rename(data_dir)
        except OSError:  # Another machine was first.
          if not _holds(data_dir, manifest):
            raise
    finally:
      for leftover in (building, retired):
        shutil.rmtree(leftover, ignore_errors=True)
  rejects = ""
  if manifest["rejects"]:
    rejects = f"; rejected, see {_REJECTS}: {manifest['rejects']}"
  logging.info("Prepared %s: %s%s.", data_dir, manifest["counts"], rejects)
  return manifest


def _other_request(
  data_dir: epath.Path, manifest: Mapping[str, Any], changes: list[str]
) -> validation.SettingError:
  left = len(changes) - 3
  more = f" and {left} more changes" if left > 0 else ""
  return validation.SettingError(
    f"data_dir ({str(data_dir)!r}) was made from "
    f"{untrusted.shorten(manifest['source'])} by another request: "
    f"{'; '.join(changes[:3])}{more}. Choose another --data_dir, or add "
    "--overwrite to replace it."
  )


def _holds(data_dir: epath.PathLike, manifest: Mapping[str, Any]) -> bool:
  """True for a data dir with this manifest and all its files."""
  is_same = read_manifest(data_dir) == manifest
  return is_same and _sizes(data_dir) == manifest["files"]


def _open_source(request: Request) -> tuple[origin.Origin, dict[str, Any]]:
  """The source, and the options that a manifest must match."""
  options = asdict(request)
  del options["data_dir"]
  source = origin.open_source(request.source)
  if source.files:
    # Names and contents, not the path: a snapshot may be moved.
    options |= {"source": "folder", "files": source.files}
  options["exclude"] = [exclusion.fingerprint(each) for each in request.exclude]
  # JSON turns tuples into lists, in the manifest too.
  return source, json.loads(json.dumps({"format": FORMAT, **options}))


def _refusal(data_dir: object, rule: str) -> validation.SettingError:
  return validation.SettingError(
    f"data_dir ({str(data_dir)!r}) must {rule}; choose another folder."
  )


def find_data_dir(request: Request) -> epath.Path:
  """The data dir; refuses one with files that this module did not write."""
  data_dir = paths.absolute(paths.to_path("data_dir", request.data_dir))
  if not data_dir.name:
    raise _refusal(request.data_dir, "be a folder below /")
  try:
    if paths.is_remote(data_dir):
      names = objects.list_objects(data_dir, what="data_dir")
      found = {name.partition("/")[0] or data_dir.name for name in names}
    else:
      found = {path.name for path in data_dir.iterdir()}
  except FileNotFoundError:
    return data_dir
  except OSError as error:
    rule = f"be a folder that can be made: {error}"
    raise _refusal(request.data_dir, rule) from error
  if foreign := sorted(found - _OWN_FILES):
    listed = validation.printable(", ".join(foreign[:3]))
    rule = f"be new, empty or made by prepare, but holds {listed}"
    raise _refusal(request.data_dir, rule)
  return data_dir


@contextlib.contextmanager
def _lock(data_dir: pathlib.Path) -> Iterator[None]:
  """Waits until no other process is building this data dir."""
  try:
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = open(data_dir.with_name(f".{data_dir.name}.lock"), "w")
  except OSError as error:
    rule = f"be a folder that can be made: {error}"
    raise _refusal(data_dir, rule) from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def read_manifest(data_dir: epath.PathLike) -> dict[str, Any] | None:
  """The manifest of a data dir; None without one, or if it is damaged."""
  path = f"{os.fspath(data_dir)}/{_MANIFEST}"
  try:
    manifest = untrusted.read_json(path)
    for name in ("request", "files", "counts"):
      untrusted.get_field(manifest, name, dict, path)
    untrusted.get_field(manifest, "source", str, path)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:
    is_refused = isinstance(error, validation.SettingError)
    if is_refused or validation.is_machine_failure(error):
      raise
    logging.warning("Rebuilding %s: %s", data_dir, error)
    return None
  return manifest


def find_changes(request: Request) -> list[str]:
  """The changes, in words, since the request that made a data dir, if any."""
  manifest = read_manifest(paths.to_path("data_dir", request.data_dir))
  if manifest is None:
    return []
  return _changes(manifest["request"], _open_source(request)[1])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """The differences between two requests, in words."""
  changes = []
  sides = [dict(each) for each in (before, now)]
  old, new = (side.pop("files", {}) for side in sides)
  for side in sides:
    if isinstance(spec := side.get("source"), dict):
      side["source"] = SYNTHETIC
      side |= {f"source.{name}": value for name, value in spec.items()}
  for name in sorted(sides[0].keys() | sides[1].keys()):
    values = [side.get(name, "not set") for side in sides]
    if values[0] != values[1]:
      was, is_now = map(untrusted.shorten, values)
      changes.append(f"{name} was {was} and is {is_now}")
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      word = "is new" if name not in old else "has changed"
      word = "is gone" if name not in new else word
      changes.append(f"{validation.printable(name)} of the source {word}")
  return changes


def _sizes(folder: epath.PathLike) -> dict[str, int]:
  """Bytes of every file under the folder except the manifest."""
  if paths.is_remote(folder):
    found = objects.list_objects(folder, what="data_dir")
    return {k: x.size for k, x in found.items() if k != _MANIFEST}
  folder = pathlib.Path(folder)
  return {
    path.relative_to(folder).as_posix(): path.stat().st_size
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name != _MANIFEST
  }


def _write(
  request: Request,
  source: origin.Origin,
  options: dict[str, Any],
  folder: pathlib.Path,
  num_workers: int,
) -> dict[str, Any]:
  """Writes a data dir into an empty folder, and returns its manifest."""
  salt = f"seed-{request.seed}"
  with contextlib.closing(stored.Scratch(folder)) as scratch:
    division = divide.divide(
      request, source, scratch, salt=salt, num_workers=num_workers
    )
    written = division.by_split
    first = next(iter(written.values()))[:_MAX_TOKENIZER_TEXTS]
    texts = (
      chat_prompts.chat_text(stored.decode(scratch[record.place]))
      for record in first
    )
    with validation.user_errors():
      tokenizer.train(
        (text.replace(IMAGE_MARK, "") for text in texts),
        folder / _TOKENIZER,
        request.vocab_size,
      )
    places = {
      split: [(record.pid, record.place) for record in chosen]
      for split, chosen in written.items()
    }
    stored.write_encoded(scratch, places, folder)
  with open(folder / _REJECTS, "w") as file:
    lines = (json.dumps(asdict(each)) for each in division.rejects)
    file.writelines(f"{line}\n" for line in lines)
  everything = [each for chosen in written.values() for each in chosen]
  num_original = sum(record.is_mathvista for record in everything)
  trained = tokenizer.Tokenizer(folder / _TOKENIZER)
  origins = collections.defaultdict(collections.Counter)
  for split, chosen in written.items():
    for record in chosen:
      origins[record.split][split] += 1
  manifest = {
    "source": source.name,
    "terms": mathvista.terms(num_original, len(everything)),
    "counts": {split: len(chosen) for split, chosen in written.items()},
    # For each split of the source, how many of its problems are in ours.
    "source_splits": origins,
    "rejects": divide.count_reasons(division.rejects),
    "withheld": division.withheld,
    "fingerprint": splits.fingerprint(written),
    "salt": salt,
    "tokenizer": {
      "fingerprint": trained.fingerprint,
      "vocab_size": trained.vocab_size,
    },
    "files": _sizes(folder),
    "request": options,
  }
  (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
  return manifest
