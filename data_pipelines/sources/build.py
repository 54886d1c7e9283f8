"""Builds a data dir from a source of problems, whole or not at all.

A data dir holds the problems as ArrayRecord (splits `train`, `eval` and, where
the source has unanswered ones, `test`), `tokenizer.model` trained on them,
`rejects.jsonl` and `manifest.json`. A complete one is reused as it is.
"""

import collections
import contextlib
import fcntl
import functools
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from absl import logging

from data_pipelines import records, validation
from data_pipelines.sources import (
  columns,
  files,
  intake,
  mathvista,
  reasoning_gym,
  stored,
  synthetic,
)
from data_pipelines.text import chat_prompts, tokenizer, untrusted

# Raise this when an old request gives new bytes.
FORMAT = 3
SYNTHETIC = "synthetic"
_MANIFEST, _REJECTS = "manifest.json", "rejects.jsonl"
_TOKENIZER = "tokenizer.model"
_OWN_FILES = {_MANIFEST, _REJECTS, _TOKENIZER, stored.Problems.name}
_MAX_TOKENIZER_TEXTS = 3_000


@dataclass(frozen=True)
class Request:
  """The source and the contents of a data dir.

  Attributes:
    source: The settings of synthetic or reasoning_gym's problems, a path that
      `files` can read, or such a path for each of `train`, `eval` and `test`.
    data_dir: The folder to build.
    seed: Another seed is another division into train and eval.
    eval_fraction: Expected share of the answered images that `eval` gets; 0
      makes no `eval`, 1 no `train`.
    vocab_size: Largest number of pieces of the tokenizer.
    max_reject_fraction: Largest share of unusable records.
    columns: The source's column for each of ours that is not to be guessed.
    unchecked_answers: "keep" keeps records whose answer no rule can check.
    tolerance: Largest relative error of a right number; None for the source's.
    split: Names of the source's splits to divide, or `train=NAME` and
      `eval=NAME` to keep them; () follows their names.
    near_duplicates: Images that are withheld from `train` because of `eval`:
      "exact" copies, "perceptual" for look-alikes too, or "none".
    exclude: Data dirs; what also stands in one of them never trains.
  """

  source: synthetic.Spec | reasoning_gym.Spec | str | Mapping[str, str]
  data_dir: str
  seed: int = field(metadata=validation.at_least(0))
  eval_fraction: float = field(metadata=validation.interval("[0, 1]", 0.2))
  vocab_size: int
  max_reject_fraction: float = field(
    metadata=validation.interval("[0, 1)", 0.01)
  )
  columns: Mapping[str, str] = field(default_factory=dict)
  unchecked_answers: str = field(
    default="reject", metadata=validation.one_of(("reject", "keep"))
  )
  tolerance: float | None = field(
    default=None, metadata=validation.interval("[0, 1)", 0.05)
  )
  split: tuple[str, ...] = ()
  near_duplicates: str = field(
    default="exact",
    metadata=validation.one_of(("exact", "perceptual", "none")),
  )
  exclude: tuple[str, ...] = ()

  def __post_init__(self):
    with validation.user_errors():
      validation.check_fields(self)
      validation.to_path("data_dir", self.data_dir)
      if isinstance(self.source, str):
        validation.to_path("source", self.source)


def build_data_dir(
  request: Request, *, overwrite: bool = False
) -> dict[str, Any]:
  """Builds the data dir, unless it is complete already.

  If two processes ask for the same one, the second waits and reuses it.

  Args:
    request: The source and the contents.
    overwrite: True replaces a data dir that was made by another request.

  Returns:
    The manifest: `source`, `terms` (whose terms forbid training, or ""),
    `counts` by split, `rejects` by reason, `withheld` pids that are in no
    split (see `intake.assign_splits`), `fingerprint` of all records in any
    order, `salt` of the division, `tokenizer`, `files`.

  Raises:
    SettingError: The request, the source or the folder must change first.
  """
  data_dir = _find_data_dir(request)
  readers, options = _open_source(request)
  building = data_dir.with_name(f".{data_dir.name}.building")
  retired = data_dir.with_name(f".{data_dir.name}.retired")
  with _lock(data_dir):
    manifest = read_manifest(data_dir)
    if manifest is not None:
      changes = _changes(manifest["request"], options)
      if changes and not overwrite:
        _refuse_to_replace(data_dir, manifest, changes)
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
      manifest = _write(request, readers, options, building)
      if data_dir.exists():
        data_dir.rename(retired)
      building.rename(data_dir)
    finally:
      for leftover in (building, retired):
        shutil.rmtree(leftover, ignore_errors=True)
  rejects = f"; rejected: {manifest['rejects']}" if manifest["rejects"] else ""
  logging.info("Prepared %s: %s%s.", data_dir, manifest["counts"], rejects)
  return manifest


def _open_source(request: Request) -> tuple[files.Readers, dict[str, Any]]:
  """The source's readers, and the options that a manifest must match."""
  options = asdict(request)
  del options["data_dir"]
  if isinstance(request.source, synthetic.Spec):
    spec = request.source
    draw = functools.cache(lambda: list(synthetic.problems(spec)))
    readers: files.Readers = {SYNTHETIC: draw}
  elif isinstance(request.source, reasoning_gym.Spec):
    readers = {"": functools.partial(reasoning_gym.problems, request.source)}
  else:
    is_remote = "://" in request.source
    path = None if is_remote else validation.to_path("source", request.source)
    folder = files.find(path or request.source)
    # Names and contents, not the path: a snapshot may be moved.
    readers, options["source"] = _mapped(request, folder.readers), "folder"
    options["files"] = folder.files
  # JSON turns tuples into lists, in the manifest too.
  return readers, json.loads(json.dumps({"format": FORMAT, **options}))


def _mapped(request: Request, readers: files.Readers) -> files.Readers:
  """The readers of the problems that the rows of a source are."""
  rows = itertools.chain.from_iterable(read() for read in readers.values())
  sample = [x.values for x in rows if isinstance(x, files.Row)][:100]
  if not sample:
    return readers
  chosen = columns.choose(sample, request.columns)
  logging.info("%s", chosen.described)
  settings = columns.Settings(request.unchecked_answers, request.tolerance)
  return {
    split: functools.partial(_problems, read, chosen, settings)
    for split, read in readers.items()
  }


def _problems(
  read: Callable[[], Iterable[files.RawRecord]],
  chosen: columns.Columns,
  settings: columns.Settings,
) -> Iterator[files.RawRecord]:
  """The problems of a split's rows, or why one is none."""
  for number, raw in enumerate(read()):
    if isinstance(raw, files.Row):
      try:
        with records.all_faults():
          raw = columns.to_problem(raw, chosen, number, settings)
      except records.BadRecord as error:
        raw = error
    yield raw


def _find_data_dir(request: Request) -> pathlib.Path:
  """The data dir; refuses one with files that this module did not write."""
  data_dir = validation.to_path("data_dir", request.data_dir)
  named = f"data_dir ({request.data_dir!r})"
  if "://" in request.data_dir or not data_dir.resolve().name:
    raise validation.SettingError(f"{named} must be a local folder, below /.")
  try:
    data_dir = data_dir.resolve()
    is_new = not data_dir.exists()
    if not is_new and not data_dir.is_dir():
      raise validation.SettingError(f"{named} must be a folder, not a file.")
    found = set() if is_new else {path.name for path in data_dir.iterdir()}
  except OSError as error:
    raise validation.SettingError(
      f"{named} must be a folder that can be made: {error}; choose another "
      "folder."
    ) from error
  if foreign := sorted(found - _OWN_FILES):
    listed = validation.printable(", ".join(foreign[:3]))
    raise validation.SettingError(
      f"{named} must be new, empty or made by prepare, but holds {listed}; "
      "choose another folder."
    )
  return data_dir


@contextlib.contextmanager
def _lock(data_dir: pathlib.Path) -> Iterator[None]:
  """Waits until no other process is building this data dir."""
  try:
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = open(data_dir.with_name(f".{data_dir.name}.lock"), "w")
  except OSError as error:
    raise validation.SettingError(
      f"data_dir ({str(data_dir)!r}) must be a folder that can be made: "
      f"{error}; choose another folder."
    ) from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def read_manifest(data_dir: pathlib.Path) -> dict[str, Any] | None:
  """The manifest of a data dir; None without one, or if it is damaged."""
  path = data_dir / _MANIFEST
  if not path.exists():
    return None
  try:
    manifest = untrusted.read_json(path)
    for name in ("request", "files", "counts"):
      untrusted.get_field(manifest, name, dict, str(path))
    untrusted.get_field(manifest, "source", str, str(path))
  except (OSError, ValueError) as error:
    logging.warning("Rebuilding %s: %s", data_dir, error)
    return None
  return manifest


def find_changes(request: Request) -> list[str]:
  """The changes, in words, since the request that made a data dir, if any."""
  manifest = read_manifest(validation.to_path("data_dir", request.data_dir))
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


def _refuse_to_replace(
  data_dir: pathlib.Path, manifest: Mapping[str, Any], changes: Sequence[str]
) -> NoReturn:
  more = f" and {len(changes) - 3} more changes" if len(changes) > 3 else ""
  raise validation.SettingError(
    f"data_dir ({str(data_dir)!r}) was made from "
    f"{untrusted.shorten(manifest['source'])} by another request: "
    f"{'; '.join(changes[:3])}{more}. Choose another --data_dir, or add "
    "--overwrite to replace it."
  )


def _sizes(folder: pathlib.Path) -> dict[str, int]:
  """Bytes of every file under the folder except the manifest."""
  return {
    path.relative_to(folder).as_posix(): path.stat().st_size
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name != _MANIFEST
  }


def _write(
  request: Request,
  readers: files.Readers,
  options: dict[str, Any],
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Writes a data dir into an empty folder, and returns its manifest."""
  accepted, rejects = intake.check_records(readers)
  _limit_rejects(request, len(accepted), rejects)
  salt = f"seed-{request.seed}"
  splits = intake.assign_splits(
    accepted, salt=salt, eval_fraction=request.eval_fraction
  )
  counts = collections.Counter(splits.values())
  _require_both_sides(request, counts)
  written = [split for split in ("train", "eval", "test") if counts[split]]
  read_split = functools.partial(intake.read_split, readers, splits)
  texts = map(chat_prompts.chat_text, read_split(written[0]))
  with validation.user_errors():
    tokenizer.train(
      itertools.islice(texts, _MAX_TOKENIZER_TEXTS),
      folder / _TOKENIZER,
      request.vocab_size,
    )
  stored.write({split: read_split(split) for split in written}, folder)
  with open(folder / _REJECTS, "w") as file:
    file.writelines(json.dumps(each, default=str) + "\n" for each in rejects)
  is_synthetic = isinstance(request.source, synthetic.Spec)
  num_original = sum(record.is_mathvista for record in accepted)
  trained = tokenizer.Tokenizer(folder / _TOKENIZER)
  manifest = {
    "source": SYNTHETIC if is_synthetic else str(request.source),
    "terms": mathvista.terms(num_original, len(accepted)),
    "counts": {split: counts[split] for split in written},
    "rejects": _reasons(rejects),
    "withheld": sorted(
      record.pid for record in accepted if splits[record.key] == intake.WITHHELD
    ),
    "fingerprint": intake.fingerprint(accepted, splits),
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


def _require_both_sides(request: Request, counts: Mapping[str, int]) -> None:
  """Refuses a division that leaves either train or eval without problems."""
  if not 0 < request.eval_fraction < 1:
    return
  if (counts["train"] > 0) != (counts["eval"] > 0):
    raise validation.SettingError(
      f"eval_fraction ({request.eval_fraction}) must leave problems to both "
      f"splits, but train gets {counts['train']} problems and eval "
      f"{counts['eval']}; move it towards 0.5 or give more problems."
    )


def _limit_rejects(
  request: Request, num_accepted: int, rejects: Sequence[Mapping[str, Any]]
) -> None:
  total = num_accepted + len(rejects)
  if not total:
    raise validation.SettingError(
      f"source ({request.source!r}) must hold at least one record."
    )
  # The limit is below 1, so at least one record is accepted.
  if len(rejects) / total <= request.max_reject_fraction:
    return
  counts = ", ".join(f"{n} {why}" for why, n in _reasons(rejects).items())
  first = rejects[0]
  raise validation.SettingError(
    f"{len(rejects)} of {total} records are unusable ({counts}); the limit is "
    f"max_reject_fraction ({request.max_reject_fraction}). The first one: pid "
    f"{first['pid']} of {first['split']}, {first['detail']}. Fix the source or "
    "raise max_reject_fraction."
  )


def _reasons(rejects: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  """The number of rejected records for each reason, by name."""
  counts = collections.Counter(reject["reason"] for reject in rejects)
  return dict(sorted(counts.items()))
