"""Finds which column of a source is which, and makes problems of its rows.

Knows nothing of files: a row is a dict of plain values, and names its pictures.
MathVista's own schema keeps its official query.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from data_pipelines import records, validation
from data_pipelines.records import BadRecord, LabelledCompletion, Problem
from data_pipelines.sources import (
  choices,
  conversations,
  gold,
  guesses,
  mathvista,
  metadata,
  pictures,
)
from data_pipelines.text import untrusted

_SYNONYMS = {"id": "pid", "image": "images", "options": "choices"}
_CHARTQA = (
  *({"query", "label", "human_or_machine"}, {"imgname", "query", "label"}),
)
# A reply with more words is a demonstration, no text to compare with.
_MAX_REPLY_WORDS = 5
_LETTER = re.compile(r"\(?([A-Ha-h])[).:]?")


class Row(Protocol):
  """The values of a row, and how to read a file that it names."""

  @property
  def values(self) -> Mapping[str, Any]:
    """Column name to plain Python value."""
    ...

  @property
  def read(self) -> Callable[[str], bytes]:
    """Returns the bytes of a file that the row names."""
    ...


@dataclasses.dataclass(frozen=True)
class Settings:
  """How golds are read.

  Attributes:
    unchecked_answers: "keep" keeps records whose answer no rule can check.
    tolerance: Largest relative error of a right number; None for the source's.
  """

  unchecked_answers: str = "reject"
  tolerance: float | None = None


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which column of a source is which.

  Attributes:
    names: For each role its columns, with dots into structs.
    is_mathvista: True for MathVista's schema.
    index_base: The index of the first option, where answers are indices.
    tolerance: Largest relative error of a right number.
    known: The columns of the source.
    described: The columns in one line.
  """

  names: Mapping[str, tuple[str, ...]]
  is_mathvista: bool = False
  index_base: int | None = None
  tolerance: float = 0.0
  known: tuple[str, ...] = ()
  described: str = ""


def choose(
  sample: Sequence[Mapping[str, Any]], given: Mapping[str, str]
) -> Columns:
  """Guesses the columns from the first rows of a source.

  Args:
    sample: The rows, at most some hundred.
    given: Columns that are not to be guessed, by role; "" for no such column.

  Raises:
    SettingError: A given role or column is unknown, or none is the question.
  """
  known = guesses.paths(sample)
  everything = tuple(sorted(known.values()))
  fixed = {}
  for ours, path in given.items():
    role = _SYNONYMS.get(ours, ours)
    if role not in guesses.NAMES:
      raise _refusal(ours, path, ours, tuple(guesses.NAMES))
    if path and not guesses.is_there(sample, path):
      raise _refusal(ours, path, path, everything)
    fixed[role] = (path,) if path else ()
  if not given and mathvista.is_schema(sample):
    line = "Columns: MathVista's schema, with its official query."
    return Columns({}, is_mathvista=True, known=everything, described=line)
  names, notes = guesses.guess(sample, known, fixed)
  if not (names["question"] or names["chosen"]):
    raise validation.SettingError(
      f"columns must name the question, which none of {_listed(everything)} "
      "seems to be; set --columns=question=NAME."
    )
  base = _index_base(sample, names)
  if base is not None:
    notes.append(f"answers count the options from {base}")
  tolerance = 0.05 if any(x <= known.keys() for x in _CHARTQA) else 0.0
  if tolerance:
    notes.append("tolerance=0.05, as ChartQA is scored")
  notes += _conversation_notes(sample, names)
  line = _describe(names, everything, notes)
  return Columns(names, False, base, tolerance, everything, line)


def _refusal(
  ours: str, theirs: str, unknown: str, known: Sequence[str]
) -> validation.SettingError:
  pair = validation.printable(f"{ours}={theirs}")
  return validation.SettingError(
    f"columns ({pair}) must name what there is, but "
    f"{validation.printable(unknown)} is none of {_listed(known)}."
  )


def _describe(
  names: Mapping[str, guesses.Paths],
  known: Sequence[str],
  notes: Sequence[str],
) -> str:
  """The columns in one line, for the log."""
  used = {path for paths in names.values() for path in paths}
  pairs = [f"{role}={'+'.join(x)}" for role, x in names.items() if x]
  parts = [", ".join(pairs), *notes]
  # Not the inner columns of a struct that is one.
  others = {path.partition(".")[0] for path in known if path not in used}
  if others := sorted(others & set(known)):
    parts.append(f"metadata: {_listed(others)}")
  line = f"Columns: {'; '.join(parts)}. To change: --columns=ours=theirs,..."
  return validation.printable(line)


def _listed(names: Sequence[str]) -> str:
  more = f" and {len(names) - 40} more" if len(names) > 40 else ""
  return validation.printable(", ".join(names[:40]) or "no column") + more


def _index_base(
  sample: Sequence[Mapping[str, Any]], names: Mapping[str, guesses.Paths]
) -> int | None:
  rows = []
  for row in sample:
    try:
      found = _choices(row, names["choices"])
    except BadRecord:
      continue
    rows.append((_first(row, names["answer"]), found))
  return choices.index_base(rows)


def _conversation_notes(
  sample: Sequence[Mapping[str, Any]], names: Mapping[str, guesses.Paths]
) -> list[str]:
  """Sentences about what conversations lose."""
  several = systems = 0
  for row in sample:
    try:
      talk = _conversation(_first(row, names["question"]))
    except BadRecord:
      continue
    several += talk is not None and talk.is_cut
    systems += talk is not None and talk.system != ""
  notes = []
  if several:
    notes.append(
      f"{several} of the first {len(sample)} records have several questions, "
      "of which the first counts"
    )
  if systems:
    notes.append("texts of the system are metadata, not in the prompt")
  return notes


def to_problem(
  row: Row, columns: Columns, number: int, settings: Settings
) -> Problem:
  """The problem of a row.

  Args:
    row: The row.
    columns: The result of `choose` for its source.
    number: Names a row that has no id.
    settings: How golds are read.

  Raises:
    BadRecord: The row is no problem.
  """
  if columns.is_mathvista:
    problem = mathvista.to_problem(row.values, row.read)
    return _with_tolerance(problem, None, columns, settings)
  values, names = row.values, columns.names
  talk = _conversation(_first(values, names["question"]))
  completions = []
  for role, default in (("chosen", 1.0), ("rejected", 0.0)):
    reply, before = conversations.read_reply(_first(values, names[role]), role)
    talk = talk or before
    if reply:
      score = gold.to_float(_first(values, names[f"{role}_score"]))
      label = default if score is None else score
      completions.append(LabelledCompletion(reply, label))
  question = _question(values, names, talk)
  images, is_merged = _images(row, columns, talk)
  found = _choices(values, names["choices"])
  question, options, order = pictures.place_marks(
    question, found.texts, len(images), is_merged=is_merged
  )
  problem = Problem(
    pid=pid(values, columns, number),
    question=question,
    images=tuple(images[i] for i in order),
    image_path=_image_path(_first(values, names["images"])),
    choices=options,
    answer="",
    question_type="free_form",
    answer_type="unchecked",
    completions=tuple(completions),
    metadata=_others(values, names, talk),
  )
  answered = _with_answer(
    problem, found._replace(texts=options), values, columns, settings, talk
  )
  return dataclasses.replace(answered, query=records.plain_query(answered))


def pid(values: Mapping[str, Any], columns: Columns, number: int) -> str:
  """The name of a row: its id, or its number."""
  value = gold.plain(_first(values, columns.names.get("pid", ("pid",))))
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  return str(number) if gold.is_missing(value) else str(value).strip()


def _first(values: Mapping[str, Any], paths: Sequence[str]) -> Any:
  """The value of a role; None without a column."""
  return guesses.at(values, paths[0]) if paths else None


def _conversation(
  value: Any, *, last: bool = False
) -> conversations.Conversation | None:
  found = conversations.messages(value)
  return conversations.read(found, last=last) if found else None


def _question(
  values: Mapping[str, Any],
  names: Mapping[str, guesses.Paths],
  talk: conversations.Conversation | None,
) -> str:
  """The question, with the context that it needs."""
  value = _first(values, names["question"])
  if talk is not None:
    value = (
      talk.question
      if not isinstance(value, str) or value[:1] in "[{"
      else value
    )
  column = "+".join(names["question"])
  if gold.is_missing(value):
    detail = f"{column} is empty; fill it in or leave the record out"
    raise BadRecord("empty_question", detail)
  if not isinstance(value, str):
    kind = "a picture" if gold.is_picture(value) else untrusted.shorten(value)
    detail = (
      f"{column} holds {kind}; name the question: --columns=question=NAME"
    )
    raise BadRecord("not_text", detail)
  context = _first(values, names["context"])
  if isinstance(context, str) and context.strip():
    parts = (context, value)
    if "instruction" in map(guesses.normal, names["question"]):
      parts = (value, context)
    value = "\n".join(part.strip() for part in parts)
  return value.strip()


def _images(
  row: Row,
  columns: Columns,
  talk: conversations.Conversation | None,
) -> tuple[list[bytes], bool]:
  """The pictures, and whether one of them may stand for several."""
  names = columns.names
  found: list[bytes] = []
  paths = names["images"] or guesses.unseen_images(row.values, columns.known)
  for path in paths:
    found += pictures.read(guesses.at(row.values, path), path, row.read)
  if not found and talk is not None:
    found = pictures.read(
      list(talk.images), "+".join(names["question"]), row.read
    )
  value = gold.plain(_first(row.values, paths))
  is_list = isinstance(value, list | tuple) or len(paths) > 1
  return found, not is_list


def _image_path(value: Any) -> str:
  """The path of the first picture, where the source names one."""
  value = gold.plain(value)
  while isinstance(value, list | tuple) and value:
    value = value[0]
  if isinstance(value, Mapping):
    value = value.get("path")
  return value if isinstance(value, str) and len(value) < 200 else ""


def _choices(
  values: Mapping[str, Any], paths: Sequence[str]
) -> choices.Choices:
  """The options of a row, in one column or a column each."""
  name = "+".join(paths)
  if len(paths) < 2:
    return choices.read(_first(values, paths), name)
  found = [gold.plain(guesses.at(values, path)) for path in paths]
  return choices.read([x for x in found if not gold.is_missing(x)], name)


def _with_answer(
  problem: Problem,
  found: choices.Choices,
  values: Mapping[str, Any],
  columns: Columns,
  settings: Settings,
  talk: conversations.Conversation | None,
) -> Problem:
  """The problem with its gold, its worked answer and its demonstration.

  A gold column goes before the gold in a reply. A reply without a gold is a
  demonstration: no rule checks completions of its problem.
  """
  names = columns.names
  value = gold.plain(_first(values, names["answer"]))
  reply = "" if problem.completions else _reply(values, names, talk)
  from_reply = gold.is_missing(value) and reply != ""
  value = reply if from_reply else value
  around = gold.unwrap(value)[1] if isinstance(value, str) else ""
  worked = _first(values, names["solution"])
  worked = gold.without_tags(worked) if isinstance(worked, str) else ""
  worked = worked or around
  if len(worked) <= records.MAX_TEXT:
    problem = dataclasses.replace(problem, solution=worked)
  is_demonstration = reply != "" and not (from_reply and not around)
  try:
    column = "the reply" if from_reply else "+".join(names["answer"])
    answered = _checked(problem, found, value, column, columns)
    words = answered.answer.split() if answered.answer_type == "text" else ()
    if from_reply and not answered.choices and len(words) > _MAX_REPLY_WORDS:
      raise BadRecord("unreadable_answer", "the reply is a sentence")
  except BadRecord:
    has_completions = problem.completions or reply
    is_empty = from_reply or gold.is_missing(value)
    is_kept = settings.unchecked_answers == "keep"
    if not (is_kept or (is_empty and has_completions)):
      if not names["answer"]:
        listed = _listed(columns.known)
        detail = f"no column of {listed} seems to be the answer; name it with "
        detail += f"--columns=answer=NAME, {gold.KEEP}"
        raise BadRecord("missing_answer", detail) from None
      raise
    is_demonstration = reply != ""
    text = "" if is_empty else gold.as_text(value)[: records.MAX_TEXT]
    answered = dataclasses.replace(problem, answer=text)
  if is_demonstration:
    demonstration = LabelledCompletion(reply, 1.0)
    answered = dataclasses.replace(answered, completions=(demonstration,))
  return _with_measures(answered, values, columns, settings)


def _with_measures(
  problem: Problem,
  values: Mapping[str, Any],
  columns: Columns,
  settings: Settings,
) -> Problem:
  """The problem with the unit, precision and aliases of their columns."""
  names = columns.names
  unit = _first(values, names["unit"])
  if isinstance(unit, str) and unit.strip():
    problem = dataclasses.replace(problem, unit=unit.strip())
  precision = gold.to_float(_first(values, names["precision"]))
  if (
    precision and precision >= 1 and problem.answer_type in ("integer", "float")
  ):
    places = min(int(precision), records.MAX_PRECISION)
    problem = dataclasses.replace(
      problem, precision=places, answer_type="float"
    )
  if problem.is_checkable and not problem.choices:
    aliases = gold.aliases(problem.answer, _first(values, names["aliases"]))
    aliases = tuple(dict.fromkeys((*problem.aliases, *aliases)))
    problem = dataclasses.replace(problem, aliases=aliases)
  own = gold.to_float(_first(values, names["tolerance"]))
  return _with_tolerance(problem, own, columns, settings)


def _with_tolerance(
  problem: Problem, own: float | None, columns: Columns, settings: Settings
) -> Problem:
  """The problem with its own tolerance, else the asked, else the source's."""
  if problem.answer_type not in ("integer", "float"):
    return problem
  if own is None:
    own = settings.tolerance
  if own is None:
    own = columns.tolerance
  if not 0 <= own < 1:
    detail = f"tolerance {own} is no share from 0 to below 1; correct it"
    raise BadRecord("bad_tolerance", detail)
  return dataclasses.replace(problem, tolerance=own) if own else problem


def _checked(
  problem: Problem,
  found: choices.Choices,
  value: Any,
  column: str,
  columns: Columns,
) -> Problem:
  """The problem with a gold that rules can check."""
  if isinstance(value, list) and len(value) == 1:
    value = gold.plain(value[0])
  if not found.texts and isinstance(value, str):
    # The options may stand in the question: "A. 12 cm".
    named = _LETTER.match(gold.unwrap(value)[0])
    split = choices.split_lettered(problem.question) if named else None
    if named and split and named[1].upper() in dict(split[1]):
      letters, texts = zip(*split[1], strict=True)
      if not any(records.IMAGE_MARK in text for text in texts):
        found = choices.Choices(texts, letters)
        question = f"{split[0]}\n{split[2]}".strip()
        problem = dataclasses.replace(problem, question=question)
  if found.texts:
    return dataclasses.replace(
      problem,
      choices=found.texts,
      answer=choices.right_option(value, found, column, columns.index_base),
      answer_type="text",
      question_type="multi_choice",
    )
  right = gold.read(value, column)
  return dataclasses.replace(problem, **right._asdict())


def _reply(
  values: Mapping[str, Any],
  names: Mapping[str, guesses.Paths],
  talk: conversations.Conversation | None,
) -> str:
  """The reply that a row demonstrates, or ""."""
  value = _first(values, names["response"])
  reply, _ = conversations.read_reply(value, "+".join(names["response"]))
  return reply or (talk.reply.strip() if talk else "")


def _others(
  values: Mapping[str, Any],
  names: Mapping[str, guesses.Paths],
  talk: conversations.Conversation | None,
) -> dict[str, Any]:
  """The other columns as metadata."""
  used = {path for paths in names.values() for path in paths}
  others = {k: v for k, v in values.items() if k not in used}
  system = _first(values, names["system"]) or (talk.system if talk else "")
  if system:
    others["system"] = system
  return metadata.read(others)
