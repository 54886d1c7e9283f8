r"""Reads gold answers as data sets write them, and infers their types.

A gold may be a number, a text, a list of accepted texts, or a worked answer
that marks its end by `<answer>`, `\boxed{}`, `####` or "The answer is".
"""

import contextlib
import decimal
import json
import math
import numbers as number_types
import re
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_pipelines import records
from data_pipelines.records import BadRecord
from data_pipelines.text import tables, untrusted
from data_pipelines.verifier import latex, numbers

# A longer text without a mark is an essay, which no rule compares.
MAX_CHARACTERS, MAX_WORDS = 200, 20
KEEP = "or keep it with --unchecked_answers=keep"

_TABLE = tables.read("data_pipelines.sources.rows", "columns.toml")["readings"]
_NOT_UNITS = frozenset(_TABLE["not_units"])
_INNER = ("value", "answer", "text", "target", "ground_truth", "answers")

_RE = tables.patterns("gold", "data_pipelines.sources.rows")
_MIN_CHARACTERS = 8
_FUNCTIONS = "|".join(_TABLE["functions"])
_SYMBOLS = re.compile(
  rf"(?:\d++(?:\.\d++)?|(?:{_FUNCTIONS})(?![a-z])|[A-Za-z](?![A-Za-z])"
  r"|(?<=\d)[a-z]{2,3}(?![A-Za-z])"
  r"|[-+*/^=<>(){}\[\],.|!_\s\u2212\u221a\u221e\u03c0\u03b8\u00b1\u00d7\u00f7"
  r"\u00b7\u00b2\u00b3\u2264\u2265\u2260\u222a\u2229\u00bd\u00bc\u00be\u00b0])++"
)
_OPERATOR = re.compile(
  r"[+*/^=<>\u221a\u221e\u03c0\u00b1\u00b2\u00b3\u2264\u2265\u00bd\u00bc\u00be!]"
  rf"|\A[-\u2212]|\d\s?[A-Za-z(]|\d\s?,|\(.*,|(?:{_FUNCTIONS})\s?\(?\w|[A-Za-z)]\s?[-\u2212]"
)


class Gold(NamedTuple):
  """A right answer, as the fields of a `records.Problem`."""

  answer: str
  answer_type: str = "text"
  unit: str = ""
  precision: int = -1
  aliases: tuple[str, ...] = ()


def read(value: Any, column: str) -> Gold:
  """The right answer that a value of a column gives; raises for none.

  A list of texts is several accepted answers; one of numbers is a list.
  """
  value = plain(value)
  if is_picture(value):
    detail = f"{column} holds a picture; name the answer: --columns=answer=NAME"
    raise BadRecord("unreadable_answer", detail)
  if isinstance(value, Mapping | list | tuple):
    if isinstance(value, Mapping):
      first, more = _inner(value), value.get("aliases")
    else:
      items = [x for x in map(plain, value) if not is_missing(x)]
      if len(items) > 1 and all(map(_is_number, items)):
        return Gold(f"[{', '.join(map(_number_text, items))}]", "list")
      first, more = items[0] if items else None, items[1:]
    gold = read(first, column)
    others = (*gold.aliases, *aliases(gold.answer, more))
    return gold._replace(aliases=tuple(dict.fromkeys(others)))
  if isinstance(value, bool):
    answer, alias = ("yes", "true") if value else ("no", "false")
    return Gold(answer, aliases=(alias,))
  if _is_number(value) and math.isfinite(value):
    return _from_text(_number_text(value), column)
  if is_missing(value):
    detail = f"{column} is empty; fill it in, leave the record out, {KEEP}"
    raise BadRecord("missing_answer", detail)
  if not isinstance(value, str):
    shown = untrusted.shorten(value)
    detail = f"{column} holds {shown}; give a text or a finite number"
    raise BadRecord("unreadable_answer", detail)
  return _from_text(unwrap(value)[0], column)


def plain(value: Any) -> Any:
  """The value as Python's own type; NumPy's numbers and arrays have others."""
  return value.tolist() if hasattr(value, "tolist") else value


def is_missing(value: Any) -> bool:
  """True for a null, NaN, or blank value."""
  if isinstance(value, float | decimal.Decimal):
    return value != value
  return value is None or (
    isinstance(value, str | list | tuple | Mapping)
    and not (value.strip() if isinstance(value, str) else value)
  )


def is_picture(value: Any) -> bool:
  """True for bytes, and for a struct of bytes and a path."""
  if isinstance(value, list | tuple) and value:
    value = value[0]
  if isinstance(value, Mapping):
    held = value.get("bytes", 0)
    return isinstance(held, bytes) or (held is None and "path" in value)
  return isinstance(value, bytes)


def unwrap(text: str) -> tuple[str, str]:
  """The final answer that a text marks, and the worked answer around it."""
  gold = text.rpartition("</think>")[2].strip() or text.strip()
  for _ in range(4):
    before, gold = gold, _inside(gold).strip()
    if gold == before:
      break
  around = _RE.marks.sub("", text.strip().replace(gold, "", 1))
  is_worked = sum(map(str.isalnum, around)) >= _MIN_CHARACTERS
  return gold, without_tags(text) if is_worked else ""


def without_tags(text: str) -> str:
  """The text without tags of thinking and answer."""
  return _RE.tags.sub("", text).strip()


def as_text(value: Any) -> str:
  """A value that no rule reads as a reference text; "" for a picture."""
  if isinstance(value, str):
    return value.strip()
  return "" if is_picture(value) else json.dumps(value, default=str)


def _inside(text: str) -> str:
  """The text inside the outermost mark of a final answer; itself without."""
  start, close = text.rfind("<answer>"), text.rfind("</answer>")
  if 0 <= start < close:
    return text[start + len("<answer>") : close]
  _, mark, end = text.rpartition("####")
  if mark and "\n" not in end.strip():
    return end
  for box in (r"\boxed", r"\fbox"):
    _, _, end = text.rpartition(box)
    opened = re.match(r"\s{0,2}\{", end) if end != text else None
    if opened and (close := latex.find_end(end, opened.end())) >= 0:
      return end[opened.end() : close]
  if match := _RE.cue.search(text[-1000:]):
    return _without_stop(match[1])
  match = _RE.wrap.fullmatch(text)
  return match[match.lastindex] if match else text


def _without_stop(text: str) -> str:
  """The text without the full stop of its sentence; "U.S." keeps its own."""
  end = text.removesuffix(".")
  return text if "." in end and end[-1:].isalpha() else end


def _from_text(text: str, column: str) -> Gold:
  """The gold that an unwrapped text is."""
  text = " ".join(text.split())
  if not text:
    return read(None, column)
  end = text.removesuffix(".")
  named = _RE.named.fullmatch(end)
  for candidate in (end, named[1] if named else end):
    if gold := _number(candidate.strip()):
      return gold
  if len(text) > MAX_CHARACTERS or len(text.split()) > MAX_WORDS:
    raise BadRecord(
      "unreadable_answer",
      f"{column} has {len(text)} characters and marks no final answer by "
      rf"<answer>, \boxed{{}} or ####; name another column, {KEEP}",
    )
  if end[:1] == "[" and end[-1] == "]" and "\\" not in end:
    return Gold(end, "list")
  if _is_expression(end):
    return Gold(end, "expression")
  text = _without_stop(text)
  is_word = re.fullmatch(r"[\d.,]*[-A-Za-z ]+", text) is not None
  value = numbers.only_number(text) if is_word else None
  others = () if value is None else (numbers.canonical(value),)
  return Gold(text, aliases=others)


def _number(text: str) -> Gold | None:
  """The gold of a number with or without a unit; None for anything else."""
  match = _RE.number.fullmatch(text) if len(text) <= 100 else None
  if not match:
    return None
  unit = _unit(match["unit"] or "")
  money = (match["before"] or match["money"] or "").strip("\\")
  if unit is None or (money and unit):
    return None
  digits = re.sub(r"\D", "", match["digits"]) or "0"
  sign = "-" if match["sign"] in ("-", "\u2212") else ""
  number = f"{sign}{digits}{(match['part'] or '').rstrip('.')}"
  if match["power"]:
    value = numbers.only_number(text)
    is_ordinary = value is not None and abs(value) < 10**15
    number = numbers.canonical(value) if value and is_ordinary else ""
  if not number or len(number) > 30:
    return Gold(text, "expression" if match["power"] else "text")
  unit = unit or money
  _, _, places = number.partition(".")
  if not places:
    return Gold(number, "integer", unit)
  if 0 < abs(decimal.Decimal(number)) < decimal.Decimal("1e-4"):
    return Gold(number, "expression", unit)  # No float has such precision.
  return Gold(number, "float", unit, min(len(places), records.MAX_PRECISION))


def _unit(text: str) -> str | None:
  """The unit behind a number in plain letters; None if it is no unit."""
  is_apart = text[:1].isspace() or text[:1] in "\\~"
  unit = _RE.degrees.sub("\u00b0", _RE.unit_text.sub(r" \1", text))
  unit = re.sub(r"\\[,;: !]|~", " ", unit).replace("\\%", "%")
  unit = re.sub(r"\^\s?\{(-?\d)\}", r"^\1", unit)
  unit = " ".join(unit.split()).rstrip(".")
  if not _RE.unit.fullmatch(unit) or _NOT_UNITS & set(unit.casefold().split()):
    return None
  # "5 m" is a length, "5x" and "5xy" are products.
  name = unit[: len(unit) - len(unit.lstrip(string.ascii_letters))]
  is_product = 0 < len(name) < (2 if is_apart else 4)
  known = _TABLE["apart" if is_apart else "joined"]
  return None if is_product and name not in known else unit


def _is_expression(text: str) -> bool:
  """True for LaTeX and for symbols, false for words."""
  if "\\" in text:
    rest = _RE.command.sub(" ", text)
    return not re.search(rf"(?!(?:{_FUNCTIONS})\b)\b[A-Za-z]{{4,}}", rest)
  if re.search(r"[A-Za-z]\.|\d(?:st|nd|rd|th|D)\b|^[-A-Z/]+$", text):
    return False  # Abbreviations, ordinals, and what joins names.
  has_operator = _OPERATOR.search(text) is not None
  return has_operator and _SYMBOLS.fullmatch(text) is not None


def aliases(answer: str, values: Any) -> tuple[str, ...]:
  """The texts of other accepted answers, without the answer itself."""
  values = plain(values)
  if isinstance(values, Mapping):
    values = values.get("aliases") or values.get("text")
  values = values if isinstance(values, list | tuple) else [values]
  texts = []
  for value in map(plain, values):
    if isinstance(value, Mapping):
      value = _inner(value)
    if _is_number(value):
      value = _number_text(value)
    if isinstance(value, str) and value.strip():
      texts.append(unwrap(value)[0])
  return tuple(text for text in dict.fromkeys(texts) if text != answer)


def _inner(value: Mapping[str, Any]) -> Any:
  return next((value[x] for x in _INNER if value.get(x) is not None), None)


def to_float(value: Any) -> float | None:
  """A number, also in digits; None for anything else."""
  value = plain(value)
  if not (isinstance(value, str) or _is_number(value)):
    return None
  with contextlib.suppress(ValueError, OverflowError):
    if math.isfinite(number := float(value)):
      return number
  return None


def _is_number(value: Any) -> bool:
  return isinstance(value, number_types.Real | decimal.Decimal) and not (
    isinstance(value, bool) or is_missing(value)
  )


def _number_text(value: Any) -> str:
  """A number in digits; 3.0 as "3", since readers of gaps make floats."""
  if isinstance(value, float):
    return str(int(value)) if value.is_integer() else repr(value)
  return f"{value:f}" if isinstance(value, decimal.Decimal) else str(value)
