"""One problem in MathVista's schema: reads, checks and encodes it.

Knows nothing of files, splits or pixels: an image is its published bytes. An
unusable record raises `BadRecord`, whose reason is a short slug to count.

References:
  MathVista: https://arxiv.org/abs/2310.02255 (schema and shipped queries:
  https://github.com/lupantech/MathVista).
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

QUESTION_TYPES = ("multi_choice", "free_form")
ANSWER_TYPES = ("text", "integer", "float", "list")
MAX_PRECISION = 6
MAX_CHOICES = 26

_HINTS = {
  "text": (
    "Hint: Please answer the question and provide the correct option letter, "
    "e.g., A, B, C, D, at the end."
  ),
  "integer": (
    "Hint: Please answer the question requiring an integer answer and provide "
    "the final value, e.g., 1, 2, 3, at the end."
  ),
  "float": (
    "Hint: Please answer the question requiring a floating-point number with "
    "{count} decimal {places} and provide the final value, e.g., {examples}, "
    "at the end."
  ),
  "list": (
    "Hint: Please answer the question requiring a Python list as an answer and "
    "provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end."
  ),
}
_COUNTS = ("one", "two", "three", "four", "five", "six")


class BadRecord(ValueError):
  """An unusable record; `reason` is a stable slug to count."""

  def __init__(self, reason: str, detail: str):
    super().__init__(f"{reason}: {detail}")
    self.reason = reason
    self.detail = detail

  def __reduce__(self):
    """Makes the exception picklable, to return from a worker process."""
    return type(self), (self.reason, self.detail)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """An image, a question and a checkable answer.

  Attributes:
    pid: The name of the problem, unique in its data set.
    question: The question alone.
    image_path: The image's path in the source; its suffix may be wrong.
    image_bytes: The image as published, still encoded.
    choices: The options of a multiple-choice question, else empty.
    unit: The unit of the answer, or "".
    precision: Decimal places of a float answer, or -1.
    answer: The answer, for a multiple-choice question the text of the option;
      "" if it is not public.
    question_type: "multi_choice" or "free_form".
    answer_type: "text" (all multiple-choice ones), "integer", "float", "list".
    query: The official query text, byte for byte.
    solution: A worked answer without tags, or "".
    metadata: Category, context, grade, img_height, img_width, language,
      skills, source, split and task, as the source has them.
  """

  pid: str
  question: str
  image_path: str = ""
  image_bytes: bytes = b""
  choices: tuple[str, ...] = ()
  unit: str = ""
  precision: int = -1
  answer: str
  question_type: str
  answer_type: str
  query: str = ""
  solution: str = ""
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def has_answer(self) -> bool:
    """True if the answer is public, so that a completion can be checked."""
    return self.answer != ""


class Source(Protocol):
  """Random access to problems: the same index is always the same problem."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Problem: ...


FIELDS = tuple(field.name for field in dataclasses.fields(Problem))


def official_query(problem: Problem) -> str:
  """The text that MathVista ships as `query`: hint, question, options.

  Raises:
    BadRecord: The types or the precision have no hint.
  """
  is_choice = problem.question_type == "multi_choice"
  kind = "text" if is_choice else problem.answer_type
  if kind not in _HINTS:
    raise BadRecord(
      "unknown_answer_type", f"answer_type {problem.answer_type!r}"
    )
  hint = _HINTS[kind]
  if kind == "float":
    precision = problem.precision
    _check_precision(precision)
    digits = "23456789"
    examples = (f"1.{digits[i : i + precision]}" for i in range(3))
    hint = hint.format(
      count=_COUNTS[precision - 1],
      places="place" if precision == 1 else "places",
      examples=", ".join(examples),
    )
  unit = f" (Unit: {problem.unit})" if problem.unit else ""
  lines = [hint, f"Question: {problem.question}{unit}"]
  if problem.choices:
    lines.append("Choices:")
    lines += [f"({chr(65 + i)}) {x}" for i, x in enumerate(problem.choices)]
  return "\n".join(lines).strip()


def with_official_query(problem: Problem) -> Problem:
  """The problem with the query that MathVista would ship for it."""
  return dataclasses.replace(problem, query=official_query(problem))


def from_row(row: Mapping[str, Any]) -> Problem:
  """The problem in one row of the Hugging Face parquet files.

  Nulls become "", () or -1. Checks only the types of the columns; `validate`
  checks the values.

  Args:
    row: Column name to value; `decoded_image` is a struct of `bytes` and
      `path`. A missing `query` is built; `solution` is this project's own
      optional column.

  Returns:
    The problem with the row's image bytes.

  Raises:
    BadRecord: A column is missing or has a wrong type.
  """
  image = row.get("decoded_image")
  image_bytes = image.get("bytes") if isinstance(image, Mapping) else None
  if not isinstance(image_bytes, bytes) or not image_bytes:
    raise BadRecord(
      "missing_image",
      f"decoded_image.bytes holds no encoded image of {row.get('image')!r}",
    )
  return dataclasses.replace(from_result(row), image_bytes=image_bytes)


def from_result(row: Mapping[str, Any]) -> Problem:
  """The problem in one record of a results file, without image bytes.

  Raises:
    BadRecord: A field has a wrong type.
  """
  problem = Problem(
    pid=_text(row, "pid"),
    question=_text(row, "question"),
    image_path=_text(row, "image"),
    choices=_texts(row, "choices"),
    unit=_text(row, "unit"),
    precision=_precision(row.get("precision")),
    answer=_text(row, "answer"),
    question_type=_text(row, "question_type"),
    answer_type=_text(row, "answer_type"),
    query=_text(row, "query").strip(),
    solution=_text(row, "solution"),
    metadata=_metadata(row.get("metadata")),
  )
  return problem if problem.query else with_official_query(problem)


def validate(problem: Problem) -> None:
  """Refuses a record that no run can use; `images.decode` checks the image.

  Raises:
    BadRecord: The record cannot be asked or its answer cannot be checked.
  """
  if not problem.pid.strip():
    raise BadRecord("missing_pid", "pid is empty")
  if not problem.question.strip():
    raise BadRecord("empty_question", "question is empty")
  if not problem.image_bytes:
    raise BadRecord("missing_image", "image_bytes is empty")
  validate_types(problem)


def validate_types(problem: Problem) -> None:
  """Refuses a problem whose answer cannot be checked.

  Raises:
    BadRecord: The types, the options, the precision and the answer do not fit
      together.
  """
  if problem.question_type not in QUESTION_TYPES:
    raise BadRecord(
      "unknown_question_type",
      f"question_type {problem.question_type!r} is none of {QUESTION_TYPES}",
    )
  if problem.answer_type not in ANSWER_TYPES:
    raise BadRecord(
      "unknown_answer_type",
      f"answer_type {problem.answer_type!r} is none of {ANSWER_TYPES}",
    )
  if problem.question_type == "multi_choice":
    _check_choices(problem)
  elif problem.answer_type == "text":
    raise BadRecord(
      "unverifiable_text", "a free-form answer of type text has no rule"
    )
  elif problem.answer_type == "float":
    _check_precision(problem.precision)


def to_example(problem: Problem) -> dict[str, Any]:
  """The flat features that the TFDS builder stores."""
  example = {name: getattr(problem, name) for name in FIELDS}
  example["choices"] = list(problem.choices)
  example["metadata"] = json.dumps(
    dict(problem.metadata), ensure_ascii=False, sort_keys=True
  )
  return example


def from_example(example: Mapping[str, Any]) -> Problem:
  """The inverse of `to_example`; text may be UTF-8 bytes."""
  fields = {
    field.name: _to_text(example[field.name])
    for field in dataclasses.fields(Problem)
    if field.type is str
  }
  return Problem(
    image_bytes=bytes(example["image_bytes"]),
    choices=tuple(_to_text(choice) for choice in example["choices"]),
    precision=int(example["precision"]),
    metadata=json.loads(_to_text(example["metadata"])),
    **fields,
  )


def _text(row: Mapping[str, Any], name: str) -> str:
  """The column as text; "" if null or absent."""
  value = row.get(name)
  return "" if value is None else _checked_text(name, value)


def _checked_text(name: str, value: Any) -> str:
  if not isinstance(value, str):
    raise BadRecord("not_text", f"{name} holds a {type(value).__name__}")
  return value


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
  """The column as a list of texts; () if null or absent."""
  values = row.get(name)
  if values is None:
    return ()
  if isinstance(values, str) or not isinstance(values, Iterable):
    raise BadRecord("not_a_list", f"{name} holds a {type(values).__name__}")
  return tuple(_checked_text(name, value) for value in values)


def _metadata(value: Any) -> dict[str, Any]:
  """The column without nulls; must be JSON, because it is stored as JSON."""
  if value is None:
    return {}
  try:
    return json.loads(
      json.dumps({k: v for k, v in value.items() if v is not None})
    )
  except (AttributeError, TypeError, ValueError) as error:
    raise BadRecord(
      "bad_metadata", f"metadata are not JSON: {error}"
    ) from error


def _precision(value: Any) -> int:
  """The column as an int; -1 if null or NaN."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return -1
  if not isinstance(value, int | float) or not float(value).is_integer():
    raise BadRecord("bad_precision", f"precision {value!r} is not whole")
  return int(value)


def _check_precision(precision: int) -> None:
  if not 1 <= precision <= MAX_PRECISION:
    raise BadRecord(
      "bad_precision",
      f"precision {precision} of a float answer is not 1 to {MAX_PRECISION}",
    )


def _check_choices(problem: Problem) -> None:
  """Checks a multiple-choice record; two options may have the same text."""
  if problem.answer_type != "text":
    raise BadRecord(
      "mismatched_types",
      f"a multi_choice answer has type text, not {problem.answer_type!r}",
    )
  if not 1 <= len(problem.choices) <= MAX_CHOICES:
    raise BadRecord(
      "bad_choices",
      f"{len(problem.choices)} choices; letters allow 1 to {MAX_CHOICES}",
    )
  if problem.has_answer and problem.answer not in problem.choices:
    raise BadRecord(
      "answer_not_in_choices",
      f"answer {problem.answer!r} is none of the choices",
    )


def _to_text(value: str | bytes) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
