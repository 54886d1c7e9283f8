"""One problem, with any number of pictures: checks and encodes it.

Knows nothing of files, splits or pixels: a picture is its published bytes. An
unusable record raises `BadRecord`, whose reason is a short slug to count.

References:
  MathVista: https://arxiv.org/abs/2310.02255 (schema and shipped queries:
  https://github.com/lupantech/MathVista).
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from data_pipelines.text import tables
from data_pipelines.text.untrusted import shorten
from data_pipelines.validation import printable

QUESTION_TYPES = ("multi_choice", "free_form")
# "scored" answers have a scorer of their own, see `metadata`; "unchecked" ones
# no rule can check, so that only users' and models' rewards can reward them.
ANSWER_TYPES = (
  *("text", "integer", "float", "list", "expression", "scored", "unchecked"),
)
# Stands in a question or a query where a picture goes. Without any mark the
# pictures come first.
IMAGE_MARK = "<image>"
MAX_IMAGES = 16
MAX_PRECISION = 6
MAX_CHOICES = 26
# Characters of a text or of the metadata; more fit into no prompt.
MAX_TEXT = 100_000
# Levels of lists and objects in one another.
MAX_DEPTH = 32
_MAX_DETAIL = 300
# The metadata that slices of a score are named by.
SLICES = ("task", "category", "context", "grade", "source", "split")

_TEXTS = tables.read("data_pipelines.sources.rows", "mathvista.toml")


class BadRecord(ValueError):
  """An unusable record, a stable slug to count, and a printable detail."""

  def __init__(self, reason: str, detail: str):
    detail = printable(detail[:_MAX_DETAIL])
    super().__init__(f"{reason}: {detail}")
    self.reason = reason
    self.detail = detail

  def __reduce__(self):
    """Makes the exception picklable, to return from a worker process."""
    return type(self), (self.reason, self.detail)


@contextlib.contextmanager
def all_faults(reason: str = "unreadable") -> Iterator[None]:
  """Raises a `BadRecord` for whatever a library raises for a damaged record."""
  try:
    yield
  except BadRecord:
    raise
  except Exception as error:
    raise BadRecord(reason, f"{type(error).__name__}: {error}") from error


class LabelledCompletion(NamedTuple):
  """A completion and its label; a higher label is better."""

  text: str
  label: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A question with its pictures, and what a right answer is.

  Attributes:
    pid: The name of the problem, unique in its data set.
    question: The question alone, perhaps with an `IMAGE_MARK` per picture.
    images: The pictures as published, still encoded; none for text alone.
    image_path: The first picture's path in the source; its suffix may be wrong.
    choices: The options of a multiple-choice question, else empty.
    unit: The unit of the answer, or "".
    precision: Decimal places of a float answer, or -1.
    tolerance: Largest relative error of a number that is right; 0 for none.
    answer: The answer or the option's text; "" if it is not public.
    aliases: Other answers that are as right.
    question_type: "multi_choice" or "free_form".
    answer_type: One of `ANSWER_TYPES`; "text" for all multiple-choice ones.
    query: The text that a prompt shows: MathVista's official text, byte for
      byte, or for other records the question and its options.
    solution: A worked answer without tags, or "".
    completions: Labelled completions that came with the problem.
    metadata: The source's other columns; of MathVista category, context, grade,
      img_height, img_width, language, skills, source, split and task. A
      "scored" problem has the name of its `scorer` and its `entry`.
  """

  pid: str
  question: str
  images: tuple[bytes, ...] = ()
  image_path: str = ""
  choices: tuple[str, ...] = ()
  unit: str = ""
  precision: int = -1
  tolerance: float = 0.0
  answer: str
  aliases: tuple[str, ...] = ()
  question_type: str
  answer_type: str
  query: str = ""
  solution: str = ""
  completions: tuple[LabelledCompletion, ...] = ()
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def is_checkable(self) -> bool:
    """True if rules can check a completion: the answer is public."""
    return self.answer_type != "unchecked" and self.answer != ""


def make_question(question: str, images: Sequence[bytes] = ()) -> Problem:
  """A person's question, whose answer nobody knows."""
  return Problem(
    pid="this question",
    question=question,
    query=question,
    images=tuple(images),
    answer="",
    question_type="free_form",
    answer_type="unchecked",
  )


class Source(Protocol):
  """Random access to problems: the same index is always the same problem."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Problem: ...


FIELDS = tuple(field.name for field in dataclasses.fields(Problem))


def official_query(problem: Problem) -> str:
  """The text that MathVista ships as `query`: hint, question, options."""
  is_choice = problem.question_type == "multi_choice"
  kind = "text" if is_choice else problem.answer_type
  detail = f"answer_type {shorten(kind)}"
  _require(kind in _TEXTS["hints"], "unknown_answer_type", detail)
  hint = _TEXTS["hints"][kind]
  if kind == "float":
    precision = problem.precision
    _check_precision(precision)
    digits = "23456789"
    examples = (f"1.{digits[i : i + precision]}" for i in range(3))
    hint = hint.format(
      count=_TEXTS["counts"][precision - 1],
      places="place" if precision == 1 else "places",
      examples=", ".join(examples),
    )
  question, *options = _lines(problem)
  heading = ["Choices:"] if options else []
  return "\n".join([hint, f"Question: {question}", *heading, *options]).strip()


def has_hint(problem: Problem) -> bool:
  """True if MathVista has a hint for such an answer."""
  if problem.answer_type == "float":
    return 1 <= problem.precision <= MAX_PRECISION
  is_choice = problem.question_type == "multi_choice"
  return is_choice or problem.answer_type in ("integer", "list")


def plain_query(problem: Problem) -> str:
  """The question and its options, without a hint how to answer."""
  return "\n".join(_lines(problem)).strip()


def _lines(problem: Problem) -> list[str]:
  """The question with its unit, then the options with their letters."""
  unit = f" (Unit: {problem.unit})" if problem.unit else ""
  options = (f"({chr(65 + i)}) {x}" for i, x in enumerate(problem.choices))
  return [f"{problem.question}{unit}", *options]


def from_result(row: Mapping[str, Any]) -> Problem:
  """The problem in one record of a results file, without image bytes."""
  parsers = {
    "choices": _texts,
    "aliases": _texts,
    "precision": _precision,
    "tolerance": to_tolerance,
    "completions": to_completions,
    "metadata": _metadata,
  }
  required = ("pid", "question", "answer", "question_type", "answer_type")
  values: dict[str, Any] = dict.fromkeys(required, "")
  for name in FIELDS:
    column = "image" if name == "image_path" else name
    if name != "images" and (value := row.get(column)) is not None:
      values[name] = parsers.get(name, _text)(column, value)
  problem = Problem(**values)
  query = problem.query.strip() or official_query(problem)
  return dataclasses.replace(problem, query=query)


def validate(problem: Problem) -> None:
  """Refuses a record that no run can use; `images.decode` checks the image."""
  _require(problem.pid.strip(), "missing_pid", "pid is empty")
  _require(problem.question.strip(), "empty_question", "question is empty")
  count = len(problem.images)
  _require(all(problem.images), "missing_image", "a picture is empty")
  detail = f"{count} pictures; at most {MAX_IMAGES} are shown"
  _require(count <= MAX_IMAGES, "too_many_images", detail)
  marks = problem.query.count(IMAGE_MARK)
  detail = f"{marks} marks {IMAGE_MARK} for {count} pictures"
  reason = "image_count" if count else "missing_image"
  _require(marks in (0, count), reason, detail)
  for name in FIELDS:
    value = getattr(problem, name)
    for text in value if isinstance(value, tuple) else (value,):
      if isinstance(text, LabelledCompletion):
        text = text.text
      if isinstance(text, str):
        check_text(name, text)
  check_text("metadata", to_example(problem)["metadata"])
  validate_types(problem)


def validate_types(problem: Problem) -> None:
  """Refuses types, options, precision and answer that do not fit together."""
  for name, known in (
    ("question_type", QUESTION_TYPES),
    ("answer_type", ANSWER_TYPES),
  ):
    value = getattr(problem, name)
    detail = f"{name} {shorten(value)} is none of {known}"
    _require(value in known, f"unknown_{name}", detail)
  if problem.question_type == "multi_choice":
    kind, count = problem.answer_type, len(problem.choices)
    detail = f"a multi_choice answer has type text, not {shorten(kind)}"
    _require(kind == "text", "mismatched_types", detail)
    detail = f"{count} choices; letters allow 1 to {MAX_CHOICES}"
    _require(1 <= count <= MAX_CHOICES, "bad_choices", detail)
    is_there = not problem.is_checkable or problem.answer in problem.choices
    detail = f"answer {shorten(problem.answer)} is none of the choices"
    _require(is_there, "answer_not_in_choices", detail)
  elif problem.answer_type == "float":
    _check_precision(problem.precision)


def to_example(problem: Problem) -> dict[str, Any]:
  """The flat features that the TFDS builder stores."""
  example = {name: getattr(problem, name) for name in FIELDS}
  for name in ("images", "choices", "aliases"):
    example[name] = list(example[name])
  # As text, because TFDS stores every float in 32 bits.
  example["tolerance"] = repr(problem.tolerance)
  example["completions"] = json.dumps(problem.completions, ensure_ascii=False)
  example["metadata"] = json.dumps(
    dict(problem.metadata), ensure_ascii=False, sort_keys=True
  )
  return example


def from_example(example: Mapping[str, Any]) -> Problem:
  """The inverse of `to_example`; text may be UTF-8 bytes."""

  def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

  values: dict[str, Any] = {
    field.name: text(example[field.name])
    for field in dataclasses.fields(Problem)
    if field.type is str
  }
  for name, parse in (("completions", to_completions), ("metadata", _metadata)):
    values[name] = parse(name, json.loads(text(example[name])))
  return Problem(
    images=tuple(map(bytes, example["images"])),
    choices=tuple(map(text, example["choices"])),
    aliases=tuple(map(text, example["aliases"])),
    precision=int(example["precision"]),
    tolerance=float(text(example["tolerance"])),
    **values,
  )


def _require(holds: object, reason: str, detail: str) -> None:
  """Raises a BadRecord unless the rule holds."""
  if not holds:
    raise BadRecord(reason, detail)


def _require_kind(column: str, value: Any, kinds: Any, reason: str) -> None:
  detail = f"{column} holds a {type(value).__name__}"
  _require(isinstance(value, kinds), reason, detail)


def _text(column: str, value: Any) -> str:
  _require_kind(column, value, str, "not_text")
  return value


def check_text(name: str, text: str) -> None:
  """Refuses a text that is too long, or holds a NUL or a lone surrogate."""
  rule = f"has more than {MAX_TEXT} characters"
  _require(len(text) <= MAX_TEXT, "text_too_long", f"{name} {rule}")
  is_text = "\0" not in text and text == text.encode(errors="ignore").decode()
  _require(is_text, "not_text", f"{name} holds a NUL or a lone surrogate")


def is_shallow(value: Any, depth: int = MAX_DEPTH) -> bool:
  """True for a value that has at most `depth` lists in one another."""
  if isinstance(value, Mapping):
    value = tuple(value.values())
  if not isinstance(value, list | tuple):
    return True
  return depth > 0 and all(is_shallow(each, depth - 1) for each in value)


def _texts(column: str, values: Any) -> tuple[str, ...]:
  kinds = () if isinstance(values, str) else Iterable
  _require_kind(column, values, kinds, "not_a_list")
  return tuple(_text(column, value) for value in values)


def _metadata(column: str, value: Any) -> dict[str, Any]:
  """The metadata without nulls; must be JSON, because they are stored so."""
  _require(is_shallow(value), "bad_metadata", f"{column} nest too deeply")
  try:
    known = {k: v for k, v in value.items() if v is not None}
    found = json.loads(json.dumps(known))
  except (AttributeError, TypeError, OverflowError, ValueError) as error:
    detail = f"{column} are not JSON: {error}"
    raise BadRecord("bad_metadata", detail) from error
  skills = found.get("skills", ())
  _require_kind("skills", skills, str | list | tuple, "bad_metadata")
  slices = [(name, found.get(name)) for name in SLICES]
  for name, each in (*slices, *(("skills", skill) for skill in skills)):
    _require_kind(name, each, str | int | float | None, "bad_metadata")
  return found


def _precision(column: str, value: Any) -> int:
  """The precision as an int; -1 for NaN."""
  if value != value:
    return -1
  # It is stored in 32 bits.
  is_small = isinstance(value, int | float) and abs(value) < 2**31
  detail = f"{column} {shorten(value)} is no small whole number"
  _require(is_small and value % 1 == 0, "bad_precision", detail)
  return int(value)


def to_tolerance(column: str, value: Any) -> float:
  """The relative tolerance, from 0 to below 1; 0 for NaN."""
  if value != value:
    return 0.0
  holds = isinstance(value, int | float) and 0 <= value < 1
  detail = f"{column} {shorten(value)} is no share from 0 to below 1"
  _require(holds, "bad_tolerance", detail)
  return float(value)


def to_completions(column: str, values: Any) -> tuple[LabelledCompletion, ...]:
  """The completions in pairs of a text and a label."""
  detail = f"{column} {shorten(values)} are no pairs of text and label"
  _require(isinstance(values, list | tuple), "bad_completions", detail)
  found = []
  for each in values:
    is_pair = isinstance(each, list | tuple) and len(each) == 2
    holds = is_pair and isinstance(each[0], str)
    # The range of float32; False for NaN.
    holds = holds and isinstance(each[1], int | float) and abs(each[1]) < 1e38
    _require(holds, "bad_completions", detail)
    found.append(LabelledCompletion(each[0], float(each[1])))
  return tuple(found)


def _check_precision(precision: int) -> None:
  rule = f"precision {precision} of a float answer is not 1 to {MAX_PRECISION}"
  _require(1 <= precision <= MAX_PRECISION, "bad_precision", rule)
