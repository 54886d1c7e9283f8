"""Finds which column of a source is which, and makes problems of its rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines import records, validation

NAMES = {
  "pid": ("pid", "id", "question_id", "index"),
  "question": ("question", "problem", "query", "prompt"),
  "answer": ("answer", "solution", "label"),
  "images": ("decoded_image", "images", "image"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How golds are read: `unchecked_answers` is "reject" or "keep"."""

  unchecked_answers: str = "reject"
  tolerance: float | None = None


@dataclasses.dataclass(frozen=True)
class Columns:
  """The column of each role; `described` says them in one line."""

  names: Mapping[str, str]
  described: str


def choose(
  sample: Sequence[Mapping[str, Any]], given: Mapping[str, str]
) -> Columns:
  """Guesses the columns from the first rows of a source.

  Raises:
    SettingError: No column is the question.
  """
  found = list(dict.fromkeys(name for row in sample for name in row))
  names = {
    role: name
    for role, known in NAMES.items()
    for name in reversed(known)
    if name in found
  } | dict(given)
  if "question" not in names:
    raise validation.SettingError(
      f"columns must name the question, one of {', '.join(found)}; set "
      "--columns=question=NAME."
    )
  listed = ", ".join(f"{role}={name}" for role, name in names.items())
  return Columns(names, f"Columns: {listed}.")


def to_problem(
  row: Any, columns: Columns, number: int, settings: Settings
) -> records.Problem:
  """The problem of a row; `number` names one without an id.

  Raises:
    BadRecord: The row is no problem.
  """
  del settings
  values = row.values
  if {"question_type", "answer_type"} <= values.keys():
    return records.from_row(values)
  get = {role: values.get(name) for role, name in columns.names.items()}
  answer = get.get("answer")
  if answer is None:
    raise records.BadRecord("missing_answer", "answer is empty")
  images = get.get("images") or ()
  images = images if isinstance(images, list | tuple) else [images]
  problem = records.Problem(
    pid=str(number if get.get("pid") is None else get["pid"]),
    question=str(get["question"]),
    images=tuple(_bytes(row, image) for image in images),
    answer=str(answer),
    question_type="free_form",
    answer_type="text",
  )
  return dataclasses.replace(problem, query=records.plain_query(problem))


def _bytes(row: Any, value: Any) -> bytes:
  if isinstance(value, Mapping):
    value = value.get("bytes") or value.get("path")
  return value if isinstance(value, bytes) else row.read(value)
