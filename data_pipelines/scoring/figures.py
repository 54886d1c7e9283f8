"""The figures of a results file: shares of right records, overall and by slice.

`--mode=evaluate` and `python -m data_pipelines.score` take their figures from
`table`. This module knows no files, no models and no way of grading.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.scoring import statistics

TYPES = ("question_type", "answer_type")
DIMENSIONS = (
  *(*TYPES, "task", "category", "context", "grade"),
  *("source", "skill", "data_set", "subject", "subfield", "level"),
  *("problem_version", "human_or_machine", "key"),
)


def is_unreadable(pid: str) -> bool:
  """True if the pid stands for a record that an evaluation could not read.

  Neither the problem nor its type is known, so the record counts as wrong and
  in no slice.
  """
  return pid.startswith("unreadable:")


def table(
  records: Sequence[Mapping[str, Any]],
  labels: Mapping[str, Sequence[bool | None]],
) -> list[dict[str, Any]]:
  """Counts the right records overall and in each slice.

  Args:
    records: At least one record in MathVista's results format. A record counts
      in one slice of each dimension that it names, in one slice per skill, and
      in no slice if it is unreadable.
    labels: For each way of grading, whether each record is right; None where
      the grade is missing.

  Returns:
    One JSON object per row, overall first, then by dimension and name:
    `dimension`, `name`, for each way of grading a `statistics.share` (None
    without grades), and for the first way `multi_choice`, the accuracy on
    multiple choice above chance (None where guessing is impossible or certain).
  """
  members: dict[tuple[int, str], list[int]] = {}
  for index, record in enumerate(records):
    for key in _slices_of(record):
      members.setdefault(key, []).append(index)
  groups = [("overall", "all", list(range(len(records))))]
  groups += [
    (DIMENSIONS[i], name, members[i, name]) for i, name in sorted(members)
  ]
  graded = next(iter(labels.values()))
  rows = []
  for dimension, name, indices in groups:
    row: dict[str, Any] = {"dimension": dimension, "name": name}
    for way, marks in labels.items():
      row[way] = _share([marks[i] for i in indices])
    row["multi_choice"] = _above_chance(
      [
        (len(records[i]["choices"]), graded[i])
        for i in indices
        if records[i]["question_type"] == "multi_choice"
      ]
    )
    rows.append(row)
  return rows


def _slices_of(record: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
  """The slices of a record: the index of a dimension, and a name in it."""
  if is_unreadable(str(record.get("pid"))):
    return
  metadata = record.get("metadata") or {}
  inner = metadata.get("metadata")  # As MathVerse has it.
  metadata = {**(inner if isinstance(inner, Mapping) else {}), **metadata}
  if metadata.get("official_rule") != "wemath":
    metadata.pop("key", None)  # The name of a record in most other sets.
  metadata |= {name: record.get(name) for name in TYPES}
  for index, dimension in enumerate(DIMENSIONS):
    for name in names_in(metadata, dimension):
      yield index, name


def names_in(fields: Mapping[str, Any], dimension: str) -> list[str]:
  """The slices of a record in a dimension; a list gives one for each item."""
  value = fields.get("skills" if dimension == "skill" else dimension)
  values = value if isinstance(value, list | tuple) else [value]
  kept = [x for x in values if isinstance(x, str | int | float) and x != ""]
  return list(dict.fromkeys(map(str, kept)))


def _share(marks: Sequence[bool | None]) -> dict[str, Any] | None:
  kept = [mark for mark in marks if mark is not None]
  return statistics.share(sum(kept), len(kept)) if kept else None


def _above_chance(
  graded: Sequence[tuple[int, bool | None]],
) -> dict[str, Any] | None:
  """Corrects the accuracy on multiple choice for guessing.

  `guess` is the expected share of right guesses, the mean of 1 / options. With
  it `share`, `low` and `high` become (x - guess) / (1 - guess): 0 for guessing,
  1 for all right.

  Args:
    graded: For each problem its number of options, and if it is right.
  """
  if not graded:
    return None
  guess = float(np.mean(1 / np.array([options for options, _ in graded])))
  if guess == 1:
    return None
  share = statistics.share(sum(bool(right) for _, right in graded), len(graded))
  return {"problems": len(graded), "guess": guess} | {
    name: (share[name] - guess) / (1 - guess)
    for name in ("share", "low", "high")
  }
