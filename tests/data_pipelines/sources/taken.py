"""Reads records as prepare does, in a scratch file of the test."""

import contextlib
import tempfile

from data_pipelines.sources import intake, near_duplicates, origin, stored


def columns_of(readers, given=()):
  source = origin.Origin("", readers, [[name] for name in readers], {}, {})
  return origin.choose_columns(source, dict(given), readers)


def check(readers, **options):
  """The usable records and the rejects of readers."""
  records, rejects, _ = check_and_keep(readers, **options)
  return records, rejects


def check_and_keep(readers, *, num_workers=0, chosen=None, **options):
  """The usable records, the rejects, and the usable problems in order."""
  chosen = columns_of(readers) if chosen is None else chosen
  checker = intake.Checker(chosen, **options)
  with contextlib.closing(stored.Scratch(tempfile.gettempdir())) as scratch:
    looks = near_duplicates.Looks(scratch)
    records, rejects = intake.check_records(
      readers, checker, scratch, looks, num_workers=num_workers
    )
    problems = [stored.decode(scratch[i]) for i in range(len(scratch))]
  return records, rejects, problems
