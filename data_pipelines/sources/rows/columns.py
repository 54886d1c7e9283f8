"""Finds which column of a source is which, and makes problems of its rows.

Knows nothing of files: a row is a dict of plain values, and names its pictures.
MathVista's own schema keeps its official query.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines import records, validation
from data_pipelines.records import BadRecord, LabelledCompletion, Problem
from data_pipelines.scoring.official import rules
from data_pipelines.sources import files
from data_pipelines.sources.rows import (
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
# A reply with more words is a demonstration, no text to compare with.
_MAX_REPLY_WORDS = 5
_LETTER = re.compile(r"\(?([A-Ha-h])(?:[).:\uff0e]|$)")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How golds are read."""

  unchecked_answers: str = "reject"  # "keep" keeps what no rule can check.
  tolerance: float | None = None  # Largest relative error; None as columns say.


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which column of a source is which."""

  names: Mapping[str, guesses.Paths]  # The columns of each role.
  is_mathvista: bool = False  # True for MathVista's schema.
  official_rule: str = ""  # The set's own rule of scoring, see `rules`.
  index_base: int | None = None  # Of the first option, if answers are indices.
  tolerance: float = 0.0  # Largest relative error of a right number.
  known: guesses.Paths = ()  # The columns of the source.
  described: str = ""  # The columns in one line.


def choose(
  sample: Sequence[Mapping[str, Any]], given: Mapping[str, str]
) -> Columns:
  """Guesses the columns from the first rows of a source.

  Columns that are `given` for a role are not guessed; "" is no such column.
  For `official_rule` the name of the rule is given.
  """
  known = guesses.paths(sample)
  everything = tuple(sorted(known.values()))
  given, fixed = dict(given), {}
  rule = given.pop("official_rule", None)
  if rule and rule not in rules.TITLES:
    raise _refusal("official_rule", rule, rule, tuple(rules.TITLES))
  for ours, path in given.items():
    role = _SYNONYMS.get(ours, ours)
    if role not in guesses.NAMES:
      raise _refusal(ours, path, ours, tuple(guesses.NAMES))
    if path and not guesses.is_there(sample, path):
      raise _refusal(ours, path, path, everything)
    fixed[role] = (path,) if path else ()
  if not given and mathvista.is_schema(sample):
    rule = "mathvista" if rule is None else rule
    notes = [f"official_rule={rule}"] if rule else []
    line = _describe({}, (), ["MathVista's schema and query", *notes])
    return Columns({}, True, rule, known=everything, described=line)
  names, notes = guesses.guess(sample, known, fixed)
  if not (names["question"] or names["chosen"]):
    held = [x for x in everything if guesses.holds_pictures(sample, x)]
    where = f" (pictures stand in {_list_names(held)})" if held else ""
    raise validation.SettingError(
      "columns must name the question, which none of "
      f"{_list_names(everything)} seems to be{where}; set "
      "--columns=question=NAME."
    )
  base, more = _survey(sample, names)
  notes += more
  rule = rules.find(sample, known) if rule is None else rule
  tolerance = 0.05 if rule == "chartqa" else 0.0
  if tolerance:
    notes.append("tolerance=0.05, as ChartQA is scored")
  if rule:
    notes.append(f"official_rule={rule} ({rules.TITLES[rule]})")
  line = _describe(names, everything, notes)
  return Columns(names, False, rule, base, tolerance, everything, line)


def _refusal(
  ours: str, theirs: str, unknown: str, known: Sequence[str]
) -> validation.SettingError:
  pair = validation.printable(f"{ours}={theirs}")
  return validation.SettingError(
    f"columns ({pair}) must name what there is, but "
    f"{validation.printable(unknown)} is none of {_list_names(known)}."
  )


def _describe(
  names: Mapping[str, guesses.Paths], known: Sequence[str], notes: Sequence[str]
) -> str:
  """The columns in one line, for the log."""
  used = {path for paths in names.values() for path in paths}
  pairs = [f"{role}={'|'.join(x)}" for role, x in names.items() if x]
  parts = [*([", ".join(pairs)] if pairs else ()), *notes]
  # Not the inner columns of a struct that is one.
  others = {path.partition(".")[0] for path in known if path not in used}
  if others := sorted(others & set(known)):
    parts.append(f"metadata: {_list_names(others)}")
  line = f"Columns: {'; '.join(parts)}. To change: --columns=ours=theirs,..."
  return validation.printable(line)


def _list_names(names: Sequence[str]) -> str:
  more = f" and {len(names) - 40} more" if len(names) > 40 else ""
  return validation.printable(", ".join(names[:40]) or "no column") + more


def _survey(
  sample: guesses.Rows, names: Mapping[str, guesses.Paths]
) -> tuple[int | None, list[str]]:
  """The index of the first option in answers, and notes on the records."""
  golds, several, systems = [], 0, 0
  for values in sample:
    row = _Row(files.Row(values, str.encode), Columns(names))  # Reads no file.
    try:
      talk = row.conversation()
      golds.append((row.get("answer"), row.options()))
    except BadRecord:
      continue
    several += talk is not None and talk.is_cut
    systems += talk is not None and talk.system != ""
  base, notes = choices.index_base(golds), []
  if base is not None:
    notes.append(f"answers count the options from {base}")
  if several:
    notes.append(
      f"{several} of the first {len(sample)} records have several questions, "
      "of which the first counts"
    )
  if systems:
    notes.append("texts of the system are metadata, not in the prompt")
  return base, notes


def to_problem(
  row: files.Row, columns: Columns, number: int, settings: Settings
) -> Problem:
  """The problem of a row; `number` names one that has no id."""
  reader = _Row(row, columns, settings)
  if columns.is_mathvista:
    problem = mathvista.to_problem(row.values, row.read)
    return reader.with_measures(problem)
  completions, talk = reader.preferences()
  images, is_merged = reader.images(talk)
  found = reader.options()
  question, options, order = pictures.place_marks(
    reader.question(talk), found.texts, len(images), is_merged=is_merged
  )
  problem = Problem(
    pid=pid(row.values, columns, number),
    question=question,
    images=tuple(images[i] for i in order),
    image_path=pictures.path_of(reader.get("images")),
    choices=options,
    answer="",
    question_type="free_form",
    answer_type="unchecked",
    completions=completions,
    metadata=reader.others(talk),
  )
  found = found._replace(texts=options)
  reply = "" if completions else reader.reply(talk)
  problem = reader.with_measures(reader.with_answer(problem, found, reply))
  return dataclasses.replace(problem, query=records.plain_query(problem))


def pid(values: Mapping[str, Any], columns: Columns, number: int) -> str:
  """The name of a row: its id if that is a text or a number, or its number."""
  paths = columns.names.get("pid", ("pid",))
  value = guesses.value_at(values, paths[0]) if paths else None
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  is_name = isinstance(value, str | int | float) and not gold.is_missing(value)
  is_long = isinstance(value, int) and value.bit_length() > 1000
  return str(value).strip() if is_name and not is_long else str(number)


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row whose values are known by their roles."""

  row: files.Row
  columns: Columns
  settings: Settings = Settings()

  def all(self, role: str) -> list[Any]:
    """The values of a role's columns, without missing ones."""
    paths = self.columns.names.get(role, ())
    found = (guesses.value_at(self.row.values, x) for x in paths)
    return [value for value in found if not gold.is_missing(value)]

  def get(self, role: str) -> Any:
    """The value of a role, from its first column that has one; else None."""
    return next(iter(self.all(role)), None)

  def name(self, role: str) -> str:
    """The columns of a role, for an error."""
    return "|".join(self.columns.names.get(role, ())) or role

  def conversation(self) -> conversations.Conversation | None:
    """The conversation that the question's column holds, if it does."""
    found = conversations.messages(self.get("question"))
    return conversations.read(found) if found else None

  def preferences(
    self,
  ) -> tuple[tuple[LabelledCompletion, ...], conversations.Conversation | None]:
    """The labelled completions, and the conversation before them."""
    talk = self.conversation()
    given = self.get("completions") or ()
    if isinstance(given, list | tuple):
      given = [
        (x.get("text"), x.get("label")) if isinstance(x, Mapping) else x
        for x in given
      ]
    name = self.name("completions")
    completions = list(records.to_completions(name, given))
    good = self.get("response_label")
    if isinstance(good, bool) and (reply := self.reply(None)):
      completions.append(LabelledCompletion(reply, float(good)))
    for role, default in (("chosen", 1.0), ("rejected", 0.0)):
      reply, before = conversations.read_reply(self.get(role), self.name(role))
      talk = talk or (None if self.get("question") else before)
      if reply:
        score = gold.to_float(self.get(f"{role}_score"))
        label = default if score is None else score
        completions.append(LabelledCompletion(reply, label))
    return tuple(completions), talk

  def reply(self, talk: conversations.Conversation | None) -> str:
    """The reply that the row demonstrates, or ""."""
    name = self.name("response")
    reply, _ = conversations.read_reply(self.get("response"), name)
    return reply or (talk.reply.strip() if talk else "")

  def question(self, talk: conversations.Conversation | None) -> str:
    """The question, with the context that it needs."""
    value = talk.question if talk else self.get("question")
    name = self.name("question")
    if gold.is_missing(value):
      detail = f"{name} is empty; fill it in or leave the record out"
      raise BadRecord("empty_question", detail)
    if not isinstance(value, str):
      kind = "a picture" if gold.is_picture(value) else untrusted.shorten(value)
      detail = f"{name} holds {kind}; name another: --columns=question=NAME"
      raise BadRecord("not_text", detail)
    context = self.get("context")
    parts = (context if isinstance(context, str) else "", value)
    if guesses.normal(name) == "instruction":
      parts = parts[::-1]
    return "\n".join(part.strip() for part in parts if part.strip())

  def images(
    self, talk: conversations.Conversation | None
  ) -> tuple[list[bytes], bool]:
    """The pictures, and whether one of them may stand for several."""
    values, read = self.row
    paths = self.columns.names["images"]
    paths = paths or guesses.unseen_images(values, self.columns.known)
    held = [guesses.value_at(values, path) for path in paths]
    parts = zip(held, paths, strict=True)
    found = [
      x for value, path in parts for x in pictures.read(value, path, read)
    ]
    if not found and talk is not None:
      found = pictures.read(list(talk.images), self.name("question"), read)
    is_single = len(held) == 1 and not isinstance(held[0], list | tuple)
    return found, is_single

  def options(self) -> choices.Choices:
    """The options, in one column or a column each."""
    is_list = len(self.columns.names["choices"]) > 1
    found = self.all("choices") if is_list else self.get("choices")
    return choices.read(found, self.name("choices"))

  def with_answer(
    self, problem: Problem, found: choices.Choices, reply: str
  ) -> Problem:
    """The problem with its gold, its worked answer and its demonstration.

    A gold column goes before the gold in a reply. A reply without a gold is a
    demonstration: no rule checks completions of its problem.
    """
    value, name = self.get("answer"), self.name("answer")
    from_reply = gold.is_missing(value) and reply != ""
    if from_reply:
      value, name = reply, "the reply"
    around = gold.unwrap(value)[1] if isinstance(value, str) else ""
    worked = self.get("solution")
    worked = gold.without_tags(worked) if isinstance(worked, str) else ""
    worked = worked or around
    if len(worked) <= records.MAX_TEXT:
      problem = dataclasses.replace(problem, solution=worked)
    is_demonstration = reply != "" and (not from_reply or around != "")
    try:
      answered = self._check_gold(problem, found, value, name)
      if from_reply and answered.answer_type == "text" and not answered.choices:
        if len(answered.answer.split()) > _MAX_REPLY_WORDS:
          raise BadRecord("unreadable_answer", "the reply is a sentence")
    except BadRecord:
      is_empty = from_reply or gold.is_missing(value)
      is_shown = is_empty and bool(problem.completions or reply)
      if self.settings.unchecked_answers != "keep" and not is_shown:
        if not self.columns.names["answer"]:
          raise BadRecord(
            "missing_answer",
            f"no column of {_list_names(self.columns.known)} seems to be the "
            f"answer; name it with --columns=answer=NAME, {gold.KEEP}",
          ) from None
        raise
      is_demonstration = reply != ""
      text = "" if is_empty else gold.as_text(value)[: records.MAX_TEXT]
      answered = dataclasses.replace(problem, answer=text)
    if is_demonstration:
      shown = (LabelledCompletion(reply, 1.0),)
      answered = dataclasses.replace(answered, completions=shown)
    return answered

  def _check_gold(
    self, problem: Problem, found: choices.Choices, value: Any, name: str
  ) -> Problem:
    """The problem with a gold that rules can check."""
    if isinstance(value, list) and len(value) == 1:
      value = gold.plain(value[0])
    named = None
    if not found.texts and isinstance(value, str):
      named = _LETTER.match(gold.unwrap(value)[0])
    # The options may stand in the question: "A. 12 cm".
    split = choices.split_lettered(problem.question) if named else None
    if named and split:
      letters, texts = zip(*split[1], strict=True)
      if not any(records.IMAGE_MARK in text for text in texts):
        found = choices.Choices(texts, letters)
        question = f"{split[0]}\n{split[2]}".strip()
        problem = dataclasses.replace(problem, question=question)
    if not found.texts:
      right = gold.read(value, name)
      return dataclasses.replace(problem, **right._asdict())
    base = self.columns.index_base
    return dataclasses.replace(
      problem,
      choices=found.texts,
      answer=choices.right_option(value, found, name, base),
      answer_type="text",
      question_type="multi_choice",
    )

  def with_measures(self, problem: Problem) -> Problem:
    """The problem with its unit, measures, aliases and official rule."""
    changes: dict[str, Any] = {}
    if rule := self.columns.official_rule:
      changes["metadata"] = {**problem.metadata, "official_rule": rule}
      if not self.columns.is_mathvista:
        value = self.get("answer")
        value = value[0] if isinstance(value, list) and value else value
        changes["metadata"]["official_answer"] = gold.as_text(value)
    unit = self.get("unit")
    if isinstance(unit, str) and unit.strip():
      changes["unit"] = unit.strip()
    if problem.is_checkable and not problem.choices:
      others = gold.aliases(problem.answer, self.get("aliases"))
      changes["aliases"] = tuple(dict.fromkeys((*problem.aliases, *others)))
    if problem.answer_type in ("integer", "float"):
      places = gold.to_float(self.get("precision")) or 0
      if places >= 1:
        changes["precision"] = min(int(places), records.MAX_PRECISION)
        changes["answer_type"] = "float"
      given = gold.to_float(self.get("tolerance")), problem.tolerance or None
      known = (*given, self.settings.tolerance, self.columns.tolerance)
      first = next(each for each in known if each is not None)
      changes["tolerance"] = records.to_tolerance("tolerance", first)
    return dataclasses.replace(problem, **changes)

  def others(self, talk: conversations.Conversation | None) -> dict[str, Any]:
    """The other columns."""
    used = {path for paths in self.columns.names.values() for path in paths}
    others = {k: v for k, v in self.row.values.items() if k not in used}
    if system := self.get("system") or (talk.system if talk else ""):
      others["system"] = system
    return metadata.read(others)
