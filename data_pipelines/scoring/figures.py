"""The figures of a results file: shares of right records, overall and by slice.

`--mode=evaluate` and `python -m data_pipelines.score` take their figures from
`table`. This module knows no files, no models and no way of grading.
"""

from collections.abc import Mapping, Sequence
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
  tables = [fields(record) for record in records]
  groups = [("overall", "all", list(range(len(records))))]
  groups += [
    (dimension, name, indices)
    for dimension in DIMENSIONS
    for name, indices in members(tables, dimension).items()
  ]
  graded = next(iter(labels.values()))
  rows = []
  for dimension, name, indices in groups:
    row: dict[str, Any] = {"dimension": dimension, "name": name}
    for way, marks in labels.items():
      kept = [mark for i in indices if (mark := marks[i]) is not None]
      row[way] = statistics.share(sum(kept), len(kept)) if kept else None
    choices = [
      i for i in indices if records[i]["question_type"] == "multi_choice"
    ]
    row["multi_choice"] = _above_chance(
      [len(records[i]["choices"]) for i in choices],
      sum(bool(graded[i]) for i in choices),
    )
    rows.append(row)
  return rows


def members(
  tables: Sequence[Mapping[str, Any]], dimension: str
) -> dict[str, list[int]]:
  """The indices of the records in each slice of a dimension, by its name.

  Each of the `tables` holds the fields of a record; each item of a list names a
  slice.
  """
  found: dict[str, list[int]] = {}
  for index, each in enumerate(tables):
    value = each.get("skills" if dimension == "skill" else dimension)
    values = value if isinstance(value, list | tuple) else [value]
    kept = [x for x in values if isinstance(x, str | int | float) and x != ""]
    for name in dict.fromkeys(map(str, kept)):
      found.setdefault(name, []).append(index)
  return dict(sorted(found.items()))


def fields(record: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a record that slices are named by."""
  if is_unreadable(str(record.get("pid"))):
    return {}
  metadata = record.get("metadata") or {}
  inner = metadata.get("metadata")  # As MathVerse has it.
  found = {**(inner if isinstance(inner, Mapping) else {}), **metadata}
  if found.get("official_rule") != "wemath":
    found.pop("key", None)  # The name of a record in most other sets.
  return found | {name: record.get(name) for name in TYPES}


def _above_chance(options: Sequence[int], right: int) -> dict[str, Any] | None:
  """Corrects the accuracy on multiple choice for guessing.

  `guess` is the expected share of right guesses, the mean of 1 / options. With
  it `share`, `low` and `high` become (x - guess) / (1 - guess): 0 for guessing,
  1 for all right.

  Args:
    options: For each problem its number of options.
    right: The number of right answers.
  """
  guess = float(np.mean(1 / np.array(options))) if options else 1.0
  if guess == 1:
    return None
  share = statistics.share(right, len(options))
  return {"problems": len(options), "guess": guess} | {
    name: (share[name] - guess) / (1 - guess)
    for name in ("share", "low", "high")
  }
