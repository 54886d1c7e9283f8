"""One problem in MathVista's schema: how it is read, checked and encoded.

Knows nothing of files, splits or pictures' contents: an image is the bytes it
was published as. What cannot be a problem raises `BadRecord`, whose reason is
a short slug that can be counted.

References:
  MathVista: https://arxiv.org/abs/2310.02255 (schema and shipped queries:
  https://github.com/lupantech/MathVista).
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
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
  """A record that cannot be a problem; `reason` is a stable slug to count."""

  def __init__(self, reason: str, detail: str):
    super().__init__(f"{reason}: {detail}")
    self.reason = reason
    self.detail = detail

  def __reduce__(self):
    """Lets the exception come back from a worker process."""
    return type(self), (self.reason, self.detail)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A picture, a question and a checkable answer.

  Attributes:
    pid: The name of the problem, unique in its data set.
    question: The question alone.
    image_path: Where the source kept the picture; its suffix may lie.
    image_bytes: The picture as it was published, still encoded.
    choices: The options of a multiple-choice question, else empty.
    unit: What the answer is measured in, or "".
    precision: Decimal places of a float answer, or -1.
    answer: The answer; of a multiple-choice question, the text of the option.
      "" when it is not public.
    question_type: "multi_choice" or "free_form".
    answer_type: "text" (all multiple-choice ones), "integer", "float", "list".
    query: The official query text, byte for byte.
    solution: A worked answer without any tag, or "".
    metadata: Category, context, grade, img_height, img_width, language,
      skills, source, split and task, as the source has them.
  """

  pid: str
  question: str
  image_path: str
  image_bytes: bytes
  choices: tuple[str, ...]
  unit: str
  precision: int
  answer: str
  question_type: str
  answer_type: str
  query: str
  solution: str
  metadata: Mapping[str, Any]

  @property
  def has_answer(self) -> bool:
    """Whether the answer is public, so that a response can be checked."""
    return self.answer != ""


class Source(Protocol):
  """Random access to problems: the same index is always the same problem."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Problem: ...


FIELDS = tuple(field.name for field in dataclasses.fields(Problem))


def official_query(
  *,
  question: str,
  choices: Sequence[str],
  unit: str,
  precision: int,
  question_type: str,
  answer_type: str,
) -> str:
  """The text that MathVista ships as `query`: hint, question, options.

  Raises:
    BadRecord: The types or the precision have no hint.
  """
  kind = "text" if question_type == "multi_choice" else answer_type
  if kind not in _HINTS:
    raise BadRecord("unknown_answer_type", f"answer_type {answer_type!r}")
  hint = _HINTS[kind]
  if kind == "float":
    _check_precision(precision)
    digits = "23456789"
    examples = (f"1.{digits[i : i + precision]}" for i in range(3))
    hint = hint.format(
      count=_COUNTS[precision - 1],
      places="place" if precision == 1 else "places",
      examples=", ".join(examples),
    )
  lines = [hint, f"Question: {question}" + (f" (Unit: {unit})" if unit else "")]
  if choices:
    lines.append("Choices:")
    lines += [f"({chr(65 + i)}) {text}" for i, text in enumerate(choices)]
  return "\n".join(lines).strip()


def from_row(row: Mapping[str, Any]) -> Problem:
  """The problem in one row of the Hugging Face parquet files.

  Nulls become "", () or -1. Only the shape of the row is held here; `validate`
  holds what the fields mean.

  Args:
    row: Column name to value; `decoded_image` is a struct of `bytes` and
      `path`. `query` is built when the row has none, and `solution` is an
      optional column of this project's own.

  Returns:
    The problem, its image bytes untouched.

  Raises:
    BadRecord: A column is missing or holds a value of another kind.
  """
  picture = row.get("decoded_image")
  image_bytes = picture.get("bytes") if isinstance(picture, Mapping) else None
  if not isinstance(image_bytes, bytes) or not image_bytes:
    raise BadRecord(
      "missing_image",
      f"decoded_image.bytes holds no encoded picture of {row.get('image')!r}",
    )
  return dataclasses.replace(from_result(row), image_bytes=image_bytes)


def from_result(row: Mapping[str, Any]) -> Problem:
  """The problem in one record of a results file, which has no picture.

  As `from_row`, but the `image_bytes` are empty.

  Raises:
    BadRecord: A field holds a value of another kind.
  """
  problem = Problem(
    pid=_text(row, "pid"),
    question=_text(row, "question"),
    image_path=_text(row, "image"),
    image_bytes=b"",
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
  if problem.query:
    return problem
  query = official_query(
    question=problem.question,
    choices=problem.choices,
    unit=problem.unit,
    precision=problem.precision,
    question_type=problem.question_type,
    answer_type=problem.answer_type,
  )
  return dataclasses.replace(problem, query=query)


def validate(problem: Problem) -> None:
  """Passes every record that a run could use, and no other.

  Whether the picture decodes is for `images.decode` to say.

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
  """Passes every problem whose answer could be checked, asked or not.

  Raises:
    BadRecord: The types, the options, the precision or the answer do not fit
      each other.
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
  """The problem as the flat features that the TFDS builder stores."""
  example = {name: getattr(problem, name) for name in FIELDS}
  example["choices"] = list(problem.choices)
  example["metadata"] = json.dumps(
    dict(problem.metadata), ensure_ascii=False, sort_keys=True
  )
  return example


def from_example(example: Mapping[str, Any]) -> Problem:
  """The inverse of `to_example`; text may come as UTF-8 bytes."""
  fields = {
    field.name: _decoded(example[field.name])
    for field in dataclasses.fields(Problem)
    if field.type is str
  }
  return Problem(
    image_bytes=bytes(example["image_bytes"]),
    choices=tuple(_decoded(choice) for choice in example["choices"]),
    precision=int(example["precision"]),
    metadata=json.loads(_decoded(example["metadata"])),
    **fields,
  )


def _text(row: Mapping[str, Any], name: str) -> str:
  """The column as text; null and absent read as ""."""
  value = row.get(name)
  return "" if value is None else _checked_text(name, value)


def _checked_text(name: str, value: Any) -> str:
  if not isinstance(value, str):
    raise BadRecord("not_text", f"{name} holds a {type(value).__name__}")
  return value


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
  """The column as a list of texts; null and absent read as ()."""
  values = row.get(name)
  if values is None:
    return ()
  if isinstance(values, str) or not isinstance(values, Iterable):
    raise BadRecord("not_a_list", f"{name} holds a {type(values).__name__}")
  return tuple(_checked_text(name, value) for value in values)


def _metadata(value: Any) -> dict[str, Any]:
  """The column without its nulls; held to be JSON, for it is stored so."""
  if value is None:
    return {}
  try:
    return json.loads(
      json.dumps({k: v for k, v in value.items() if v is not None})
    )
  except (AttributeError, TypeError, ValueError) as error:
    raise BadRecord("bad_metadata", f"metadata is no JSON: {error}") from error


def _precision(value: Any) -> int:
  """The column as an int: 2.0 and 2 are 2; null and NaN are -1."""
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
  """Holds a multiple-choice record; two options may have the same text."""
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
      "answer_not_in_choices", f"answer {problem.answer!r} is no choice"
    )


def _decoded(value: str | bytes) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
