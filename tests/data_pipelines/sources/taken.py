"""Reads records as prepare does, in a scratch file of the test."""

import contextlib
import tempfile

from data_pipelines.sources import intake, near_duplicates, origin, stored


def columns_of(readers, given=()):
  source = origin.Origin("", readers, [[name] for name in readers], {})
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


def write(problems, data_dir):
  """Writes the problems of each split as prepare does."""
  data_dir.mkdir(parents=True, exist_ok=True)
  with contextlib.closing(stored.Scratch(data_dir)) as scratch:
    places = {
      split: [(each.pid, scratch.append(stored.encode(each))) for each in found]
      for split, found in problems.items()
    }
    stored.write_encoded(scratch, places, data_dir)
