"""Reads the options of a question, and finds the one that a gold names."""

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines import records
from data_pipelines.records import BadRecord
from data_pipelines.sources.rows import gold
from data_pipelines.text import tables, untrusted
from data_pipelines.verifier import numbers, options

_RE = tables.patterns("choices", "data_pipelines.sources.rows")
_TEXT_KEYS = ("text", "content", "value", "option", "answer")
_LETTER_KEYS = ("label", "key", "letter", "id")
_MAX_CHARACTERS = 50_000
# Characters of a question in which options are looked for, and letters A.
_MAX_LETTERED, _MAX_STARTS = 20_000, 50


class Choices(NamedTuple):
  """The texts of the options, and the names that the source gives them."""

  texts: tuple[str, ...] = ()
  letters: tuple[str, ...] = ()


def read(value: Any, column: str) -> Choices:
  """The options in a value: a list, an object, or a text of either.

  Letters before the texts ("A. 12 cm") are taken off, if all have one.
  """
  value = gold.plain(value)
  if isinstance(value, str):
    value = _from_text(value.strip())
  if isinstance(value, Mapping):
    # {"A": "12 cm"} or {"text": [...], "label": [...]}.
    texts, letters = (gold.plain(value.get(x)) for x in ("text", "label"))
    if isinstance(texts, list):
      pairs = zip(letters or [""] * len(texts), texts, strict=True)
    else:
      pairs = sorted((str(k), v) for k, v in value.items() if v is not None)
    value = [{"label": letter, "text": text} for letter, text in pairs]
  items = list(value) if isinstance(value, list | tuple) else value
  while items and isinstance(items, list) and gold.is_missing(items[-1]):
    items.pop()
  if gold.is_missing(items):
    return Choices()
  is_list = isinstance(items, list) and len(items) <= records.MAX_CHOICES
  pairs = [_item(gold.plain(each)) for each in items] if is_list else []
  texts = [text for _, text in pairs if text is not None]
  if not pairs or len(texts) < len(pairs):
    raise BadRecord(
      "bad_choices",
      f"{column} holds {untrusted.shorten(value)}; give a list of at most "
      f"{records.MAX_CHOICES} options, an object of letters and options, or "
      "name another: --columns=choices=NAME",
    )
  letters = [letter or chr(65 + i) for i, (letter, _) in enumerate(pairs)]
  found = [match for text in texts if (match := _RE.lettered.match(text))]
  own = [match[1] for match in found]
  if len(own) == len(texts) and own == sorted(set(own)):
    letters = own
    texts = [match.string[match.end() :].strip() for match in found]
  return Choices(tuple(texts), tuple(letters))


def _from_text(text: str) -> Any:
  """The options in JSON, in Python's spelling, or one after another."""
  if len(text) > _MAX_CHARACTERS or text[:1] + text[-1:] in ("[]", "{}"):
    # NumPy prints a list without commas.
    spaced = _RE.quotes.sub(r"\1, \2", text[:_MAX_CHARACTERS])
    for parse, spelling in ((json.loads, text), (ast.literal_eval, spaced)):
      with contextlib.suppress(ValueError, SyntaxError, RecursionError):
        return parse(spelling)
    return text
  if found := split_lettered(text):
    return [{"label": x, "text": y} for x, y in found[1]]
  mark = next((mark for mark in "\n;|\t," if mark in text), None)
  return text.split(mark) if mark else text


def _item(value: Any) -> tuple[str, str | None]:
  """The letter, or "", and the text of an option; None if it is no text."""
  letter = ""
  if isinstance(value, Mapping):
    letter = next((str(value[k]) for k in _LETTER_KEYS if k in value), "")
    value = next((value[k] for k in _TEXT_KEYS if k in value), None)
  if isinstance(value, int | float):
    value = str(value)
  return letter.strip(), value.strip() if isinstance(value, str) else None


def split_lettered(text: str) -> tuple[str, list[tuple[str, str]], str] | None:
  """A text before options lettered from A on, each with its letter, after."""
  if len(text) > _MAX_LETTERED:
    return None
  marks = [(m[m.lastgroup or 0], m) for m in _RE.marker.finditer(text)]
  starts = [i for i, (letter, _) in enumerate(marks) if letter == "A"]
  for start in starts[:-_MAX_STARTS:-1]:
    chain = [marks[start][1]]
    for letter, mark in marks[start + 1 :]:
      if letter == chr(65 + len(chain)):
        chain.append(mark)
    ends = [mark.start() for mark in chain[1:]] + [len(text)]
    parts = [text[m.end() : e] for m, e in zip(chain, ends, strict=True)]
    parts[-1], _, rest = parts[-1].partition("\n")
    parts = [part.strip().rstrip(";,|").strip() for part in parts]
    if len(chain) > 1 and all(parts):
      before = _RE.heading.sub("", text[: chain[0].start()]).rstrip()
      lettered = [(chr(65 + i), part) for i, part in enumerate(parts)]
      return before, lettered, rest.strip()
  return None


def right_option(
  value: Any, choices: Choices, column: str, index_base: int | None
) -> str:
  """The text of the option that a gold names by text, letter or index.

  `index_base` is the index of the first option, where the golds are indices.
  """
  value = gold.plain(value)
  if isinstance(value, list | tuple) and len(value) == 1:
    value = gold.plain(value[0])
  if isinstance(value, Mapping) and not gold.is_picture(value):
    keys = (*_LETTER_KEYS, *_TEXT_KEYS, "ground_truth")
    value = next((value[k] for k in keys if value.get(k) is not None), None)
  if gold.is_missing(value) or gold.is_picture(value):
    gold.read(value, column)
  index = to_index(value)
  if index_base is not None and index is not None:
    if 0 <= index - index_base < len(choices.texts):
      return choices.texts[index - index_base]
    raise _no_option(value, choices, column)
  named = gold.unwrap(str(value))[0] if isinstance(value, str) else str(value)
  # A text that is written as it stands goes before any letter.
  for text in (str(value).strip(), named):
    if text in choices.texts:
      return text
  by_letter = dict(zip(choices.letters, choices.texts, strict=True))
  core = named.strip("()[]. :").strip()
  for letter in (core, core.upper()):
    if letter in by_letter:
      return by_letter[letter]
  match = _RE.lettered.match(named)
  parsed = options.parse_options(choices.texts)
  if match and match[1] in by_letter:
    also = parsed.from_text(named[match.end() :])
    found = by_letter[match[1]]
    found = found if also in (None, found) else None
  else:
    found = parsed.from_answer(named)
  if found is None:
    raise _no_option(value, choices, column)
  return found


def to_index(value: Any) -> int | None:
  """A whole number, also in digits; None for anything else."""
  value = gold.plain(value)
  if isinstance(value, str) and value.strip().isdecimal() and len(value) < 9:
    return int(value)
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return int(value) if is_number and value % 1 == 0 else None


def index_base(rows: Sequence[tuple[Any, Choices]]) -> int | None:
  """The index of the first option in golds that count their options.

  None unless more of the golds are indices than equal an option.
  """
  found = []
  for value, choices in rows:
    if choices.texts:
      if (index := to_index(value)) is None:
        return None
      found.append((index, choices))
  named = sum(
    str(index) in choices.letters
    or any(index == numbers.only_number(text) for text in choices.texts)
    for index, choices in found
  )
  beyond = sum(index > len(choices.texts) for index, choices in found)
  if 2 * named >= len(found) or 10 * beyond > len(found):
    return None
  has_last = any(index == len(choices.texts) for index, choices in found)
  return 1 if has_last and all(index for index, _ in found) else 0


def _no_option(value: Any, choices: Choices, column: str) -> BadRecord:
  listed = untrusted.shorten(list(choices.texts), 120)
  return BadRecord(
    "answer_not_in_choices",
    f"{column} holds {untrusted.shorten(value)}, which is none of the options "
    f"{listed}, no letter or index of one; correct it",
  )
