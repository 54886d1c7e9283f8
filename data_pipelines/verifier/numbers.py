"""Finds numbers in text, as people and models write them, with exact values.

Digits of several scripts, thousands separators, fractions, powers of ten,
LaTeX, units and number words. A number that is a part of a larger expression
has no value: "2 sqrt(3)", "5 ft 4 in". Every pattern is bounded, so the cost is
linear in the text. Knows nothing of questions or options.
"""

import decimal
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from data_pipelines.text import tables

# No answer has more digits, and longer runs are slow to read.
_MAX_DIGITS = 30
# Rounds of LaTeX replacement: nested fractions are replaced from inside.
_MAX_NESTING = 4

_RE = tables.patterns("numbers")
LEAD_IN = _RE.lead_in  # "The answer is".
_TABLES = tables.read("data_pipelines.verifier", "numbers.toml")
WORDS, _SCALES = _TABLES["words"], _TABLES["scales"]
_HAN_DIGITS, _HAN_TENS = _TABLES["han_digits"], _TABLES["han_tens"]
# Full-width ASCII characters follow ASCII's order.
FULL_WIDTH = {chr(0xFEE0 + i): chr(i) for i in range(0x21, 0x7F)}
_CHARACTERS = FULL_WIDTH | {
  character: ascii
  for ascii, characters in _TABLES["characters"].items()
  for character in characters
}
_CHARACTER = re.compile(f"[{re.escape(''.join(_CHARACTERS))}]")
_SIGNS = _TABLES["signs"]
_SIGN = re.compile("|".join(map(re.escape, sorted(_SIGNS, reverse=True))))
_RAISED = str.maketrans(_TABLES["raised"], "0123456789-")
_RAISED_RUN = re.compile(f"[{_TABLES['raised']}]+")
_UNIT_NAMES = {
  name: unit
  for unit, names in _TABLES["units"].items()
  for name in (unit, *names.split())
}
_NAMES = {
  "<word>": "|".join(sorted(WORDS, key=len, reverse=True)),
  "<unit>": "|".join(name for name in _UNIT_NAMES if name.isalpha()),
  "<han>": "".join(_HAN_DIGITS | _HAN_TENS),
}


def _compile(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
  """A pattern, in which "<word>" is any number word, "<unit>" any unit."""
  for name, names in _NAMES.items():
    pattern = pattern.replace(name, names)
  return re.compile(pattern, flags)


_HEADINGS, _MARKUP, _LATEX, _SPELLINGS = (
  [(mark, _compile(pattern), to) for mark, pattern, to in _TABLES[name]]
  for name in ("headings", "markup", "latex", "spellings")
)
_NUMBER, _PART_AFTER, _PART_BEFORE, _JOINED_BEFORE, _UNIT_AFTER = (
  _compile(_TABLES[name], re.VERBOSE | re.ASCII)
  for name in ("number", "part_after", "part_before", "joined_before", "unit")
)
_WORD = _compile(_TABLES["word"], re.VERBOSE | re.IGNORECASE)
_HAN = _compile(_TABLES["han"])


class Numeral(NamedTuple):
  """A number in a text; its value is computed when asked for."""

  match: re.Match[str]

  @property
  def start(self) -> int:
    """The index of its first character."""
    return self.match.start()

  @property
  def value(self) -> decimal.Decimal | None:
    """The value; None for too many digits or an impossible fraction."""
    return _value(self.match)


def raise_digits(text: str) -> str:
  """The text with raised digits as powers: "x^2" for an x and a raised 2."""
  return _RAISED_RUN.sub(lambda m: "^" + m[0].translate(_RAISED), text)


@functools.lru_cache(maxsize=256)
def plain(text: str) -> str:
  """The text with ASCII digits and signs, without LaTeX and markup."""
  text = open_headings(text)
  if not text.isascii():
    text = raise_digits(text)
    text = _CHARACTER.sub(lambda m: _CHARACTERS[m[0]], text)
  text = _replace(text, _MARKUP)
  if any(mark in text for mark in ("\\", "{", "\u221a", "sqrt")):
    before = None
    for _ in range(_MAX_NESTING):
      if text != before:
        before, text = text, _replace(text, _LATEX)
  if any(mark in text for mark in ("\\", "<=", ">=", "!=")):
    text = _SIGN.sub(lambda m: _SIGNS[m[0]], text)
  return _replace(text, _SPELLINGS)


def _replace(text: str, rules: list[tuple[str, re.Pattern[str], str]]) -> str:
  """The text after each rule whose mark is in it."""
  for mark, pattern, to in rules:
    if mark in text:
      text = pattern.sub(to, text)
  return text


def open_headings(text: str) -> str:
  """The text with headings as lines; a heading "Answer" becomes "Answer:"."""
  return _replace(text, _HEADINGS)


def strip_lead_in(text: str) -> str:
  """The plain text without a leading "The answer is", and without quotes."""
  text = plain(text).strip()
  match = _RE.lead_in.match(text)
  if match and match.end() < len(text):
    text = text[match.end() :]
  return text.strip(" \t\n\"'*_\u2705\U0001f449")


def numerals(text: str) -> Iterator[Numeral]:
  """Every number in digits of a plain text, in order; no "Figure 2"."""
  return _without_labels(_NUMBER.finditer(text))


def number_words(text: str) -> Iterator[Numeral]:
  """Every number in words of a plain text, in order; no "step two"."""
  return _without_labels(_WORD.finditer(text))


def _without_labels(found: Iterator[re.Match[str]]) -> Iterator[Numeral]:
  return (Numeral(x) for x in found if not _is_label(_text_before(x)))


def _is_label(before: str) -> bool:
  """True if the text before a number ends with a noun such as "Figure"."""
  is_word = before.rstrip(" .(#")[-1:].isalpha()
  return is_word and _RE.label.search(before[-20:]) is not None


def _text_before(match: re.Match[str]) -> str:
  return match.string[max(0, match.start() - 40) : match.start()]


def has_other_unit(text: str, value: decimal.Decimal, unit: str) -> bool:
  """True if a plain text last gives this value another unit than this one."""
  asked = _unit_name(unit or "")
  if not asked:
    return False
  found = [*numerals(text), *number_words(text)]
  found = [number for number in found if number.value == value]
  last = max(found, key=lambda number: number.start, default=None)
  return _unit_after(last) not in ("", asked)


def unit_of(text: str) -> str:
  """The unit of the first number in a plain text, or ""."""
  return _unit_after(next(numerals(text), None))


def _unit_after(number: Numeral | None) -> str:
  """The unit right after a number, or ""."""
  match = number and number.match
  word = match and _RE.unit_word.match(match.string, match.end())
  return _unit_name(word[1]) if word else ""


def _unit_name(word: str) -> str:
  """The unit with a spelling, as in "cm^2" for "square centimeters", or ""."""
  base, _, power = raise_digits(word.strip()).partition("^")
  kind, _, rest = base.rpartition(" ")
  if kind in _TABLES["powers"]:
    base, power = rest, _TABLES["powers"][kind]
  name = _UNIT_NAMES.get(base.strip()) or _UNIT_NAMES.get(base.casefold(), "")
  return f"{name}^{power}" if name and power else name


def only_number(text: str) -> decimal.Decimal | None:
  """The value of a text that is one number, maybe with a name and a unit.

  Examples: "5", "-1,000.0", "x = 5 cm", "about $7.50", "3/4", "five apples".
  None for two numbers, and for anything that is no finite number.
  """
  text = plain(text).strip() if len(text) <= 200 else ""
  if text[:2] == "- ":
    text = f"-{text[2:]}"
  name = _RE.name.match(text)
  match = name and (
    _NUMBER.match(text, name.end()) or _WORD.match(text, name.end())
  )
  if match:
    value = _value(match)
  else:
    match = _HAN.match(text)
    value = _han_value(match[0]) if match else None
  if match is None or value is None:
    return None
  rest = _RE.aside.sub("", text[match.end() :])
  if not _RE.unit.match(rest) or len(rest.split()) > 4 or _WORD.search(rest):
    return None
  return value


def canonical(value: decimal.Decimal) -> str:
  """The only spelling of a value: "5" for 5.0, "0.25" for 1/4."""
  if value == value.to_integral_value():
    value = value.to_integral_value()
  else:
    value = value.normalize()
  return f"{value:f}" if value else "0"


def _value(match: re.Match[str]) -> decimal.Decimal | None:
  """The value of a match of `_NUMBER` or `_WORD`, if nothing belongs to it."""
  text, before, end = match.string, _text_before(match), match.end()
  if _PART_AFTER.match(text, end) or _PART_BEFORE.search(before):
    return None
  if _UNIT_AFTER.match(text, end) and _JOINED_BEFORE.search(before):
    return None
  if match.re is _WORD:
    return _words_value(match)
  whole = _RE.separators.sub("", match["whole"] or "0")
  part = match["part"] or match["bare_part"] or match["comma_part"] or ""
  if match["comma_part"] and before[-1:] in tuple("[({,;"):  # A list.
    return None
  if len(whole) + len(part) > _MAX_DIGITS:
    return None
  value = decimal.Decimal(f"{match['sign'] or ''}{whole}.{part or '0'}")
  exponent = int(match["power"] or match["exponent"] or 0)
  if match["of_ten"] is not None:
    exponent = int(match["of_ten"]) - 1
  if abs(exponent) > _MAX_DIGITS:
    return None
  if match["divisor"] is not None:
    divisor = decimal.Decimal(match["divisor"])
    return value / divisor if divisor else None
  if match["denominator"] is not None:
    above, below = int(match["numerator"]), int(match["denominator"])
    if part or above >= below:
      return None
    fraction = decimal.Decimal(above) / below
    return value - fraction if match["sign"] == "-" else value + fraction
  if match["scale"] is not None:
    scale = match["scale"].strip().casefold()
    return value * _SCALES[scale.removesuffix("s")]
  return value.scaleb(exponent)


def _words_value(match: re.Match[str]) -> decimal.Decimal | None:
  """The value of number words together; None if they are several numbers."""
  total, group, above = 0, None, 10**15
  words = re.split(r"[\s-]+", match[0].casefold().strip("-"))
  for word in words:
    if word == "and" or word == "dozen":
      continue
    scale = _SCALES.get(word)
    if scale == 100:
      if group is not None and not 0 < group < 100:
        return None
      group = 100 * (group or 1)
    elif scale is not None:
      if group is None or scale >= above:
        return None
      total, group, above = total + group * scale, None, scale
    else:
      value = WORDS[word]
      room = 100 if group is not None and not group % 100 else 10
      if group is not None and (
        not group
        or not value
        or value >= room
        or group % room
        or group % 100 == 10
      ):
        return None
      group = value + (group or 0)
  total += group or 0
  if match["dozen"]:
    total *= 12
  return decimal.Decimal(-total if match["minus"] else total)


def _han_value(text: str) -> decimal.Decimal | None:
  """The value of Chinese numerals below ten thousand."""
  total, digit = 0, None
  for char in text:
    if char in _HAN_TENS:
      total += _HAN_TENS[char] * (1 if digit is None else digit)
      digit = None
    elif digit:
      return None
    else:
      digit = _HAN_DIGITS[char]
  return decimal.Decimal(total + (digit or 0))
