"""Reads the data dirs whose problems must not be trained on."""

import contextlib
import functools
import itertools
from collections.abc import Sequence

from data_pipelines import records, validation
from data_pipelines.sources import intake, near_duplicates, processes, stored
from data_pipelines.storage import paths
from data_pipelines.text import untrusted

_BATCH = 8


def fingerprint(folder: str) -> str:
  """The fingerprint of a data dir."""
  with validation.user_errors():
    path = paths.to_path("exclude", folder) / "manifest.json"
  try:
    manifest = untrusted.read_json(path)
    return untrusted.get_field(manifest, "fingerprint", str, str(path))
  except (OSError, ValueError) as error:
    is_refused = isinstance(error, validation.SettingError)
    if is_refused or validation.is_machine_failure(error):
      raise
    raise validation.SettingError(
      f"exclude ({folder!r}) must name data dirs that prepare made: {error}."
    ) from error


def read(
  folders: Sequence[str],
  scratch: stored.Scratch,
  looks: near_duplicates.Looks,
  *,
  with_looks: bool,
  num_workers: int,
) -> dict[str, str]:
  """The groups of all problems of data dirs, each with a problem's name.

  `looks` gets the perceptual hashes, if any, and `scratch` their problems.
  """
  found: dict[str, str] = {}
  for folder in folders:
    sources = stored.sources(paths.to_path("exclude", folder)).values()
    read_all = itertools.chain.from_iterable(map(stored.read_all, sources))
    problems, named = itertools.tee(read_all)
    results = processes.map_in_order(
      functools.partial(intake.hash_all, with_looks=with_looks),
      itertools.batched(problems, _BATCH),
      num_workers=num_workers,
      lost=lambda each, how: f"{getattr(each, 'pid', '')} {how}",
    )
    # Closed also by Ctrl-C, or its threads would hold up the end.
    with contextlib.closing(results):
      for problem, result in zip(named, results, strict=True):
        if isinstance(problem, records.BadRecord) or isinstance(result, str):
          raise validation.SettingError(
            f"exclude ({folder!r}) must hold whole problems, but one cannot be "
            f"read: {result}; prepare it again."
          )
        groups, hashes = result
        for group in groups:
          found.setdefault(group, f"{problem.pid} of {folder}")
        if hashes:
          looks.add(hashes, scratch.append(stored.encode(problem)))
  return found
