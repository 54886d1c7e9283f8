"""Numbers as people and models write them: found in text, and read exactly.

Digits of several scripts, thousands separators, fractions, powers of ten,
LaTeX, units and number words. Every pattern is bounded, so the cost is linear
in the text. Knows nothing of questions or options.
"""

import decimal
import re
from collections.abc import Iterator
from typing import NamedTuple

# More digits than any answer has; longer runs are noise, and dear to read.
_MAX_DIGITS = 30
# Fractions in fractions are undone from the inside.
_MAX_NESTING = 4

WORDS = {
  word: value
  for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty".split()
  )
} | {
  word: 10 * value
  for value, word in enumerate(
    "thirty forty fifty sixty seventy eighty ninety hundred".split(), start=3
  )
}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9}

_SINGLE = (
  {ord("\u06f0") + i: str(i) for i in range(10)}  # Persian digits.
  | {ord("\u0660") + i: str(i) for i in range(10)}  # Arabic-Indic digits.
  | {0xFEE0 + i: chr(i) for i in range(0x21, 0x7F)}  # Full-width ASCII.
  | {ord(char): "-" for char in "\u2212\u2013\u2012\u2010\u2011\ufe63"}
  | {ord(char): " " for char in "\u00a0\u2009\u202f\u2007\u3000"}
  | {ord(char): '"' for char in "\u201c\u201d"}
  | {ord(char): "'" for char in "\u2018\u2019"}
  | {ord(char): None for char in "\u200b\u200c\u200d\u200e\u200f\ufeff"}
  | {
    ord("\u066b"): ".",  # Arabic decimal separator.
    ord("\u066c"): ",",  # Arabic thousands separator.
    ord("\u2044"): "/",
    ord("\u00ba"): "\u00b0",
    ord("\u02da"): "\u00b0",
    ord("\u3002"): ". ",
    ord("\u221a"): "\u221a",
  }
)
_LATEX = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"\\(?:left|right|displaystyle|,|!)", ""),
    (r"\{,\}", ","),
    (r"\^\s?\{?\s?\\circ\s?\}?|\\degree|\\deg\b", "\u00b0"),
    (
      r"\\(?:text|mathrm|mathbf|textbf|mathit|textit|operatorname)"
      r"\s?\{([^{}]{0,200})\}",
      r"\1",
    ),
    (r"\\sqrt\s?\{([^{}]{1,60})\}", "\u221a\\1"),
    (
      r"\\[dt]?frac\s?\{([^{}]{1,60})\}\s?\{([^{}]{1,60})\}",
      r"\1/\2",
    ),
    (r"\\sqrt\s?", "\u221a"),
    (r"\u221a\s?[({]([^(){}]{1,60})[)}]", "\u221a\\1"),
    ("\\*\\s?\u00b0", "\u00b0"),
    (r"\\(?:times|cdot)\b\s?", "\u00d7"),
    (r"\\pi\b", "\u03c0"),
    (r"\\approx\b", "\u2248"),
    (r"\\%", "%"),
    (r"\\[()\[\];:]|\\\\|\\q?quad\b|~", " "),
  )
)

_NUMBER = re.compile(
  r"""
  (?P<sign>(?<![\w.)\]}%\u00b0])[-+])?
  (?<![A-Za-z0-9_.^\u221a])(?<!\d:)
  (?>
    (?P<whole>\d{1,3}(?:,\d{3})++(?!\d)|\d++)
    (?:\.(?P<part>\d++))?
    | \.(?P<bare_part>\d++)
  )
  (?!\.\d)
  (?:\s?[\u00d7x*]\s?10\s?\^\s?\{?(?P<power>-?\d{1,3})\}?
    | [eE](?P<exponent>[-+]?\d{1,3})(?![\w.])
    | \s?/\s?(?P<divisor>\d{1,30}(?:\.\d{1,30})?)
  )?
  (?![\^\u221a\u03c0]|[eE][-+]?\d|:\d)
  """,
  re.VERBOSE | re.ASCII,
)
_WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
_UNIT = re.compile(
  r"\s?(?:%|\u00b0\s?[CF]?|[A-Za-z\u00b5\u03a9\u4e00-\u9fff][^\d,;:()=\n]{0,40}"
  r"(?:\^\{?-?[23]\}?|\u00b2|\u00b3)?)?\s?[.!]?\s*\Z"
)
_NAME = re.compile(
  r"\s*(?:[^\d=\n]{0,40}[=\u2248])?\s*(?:about |approximately |~)?"
  r"[$\u00a3\u20ac\u00a5]?\s*"
)


class Numeral(NamedTuple):
  """Where a number stands in a text; its value is worked out when asked."""

  match: re.Match[str]

  @property
  def start(self) -> int:
    """The index of its first character."""
    return self.match.start()

  @property
  def value(self) -> decimal.Decimal | None:
    """What it is worth; None for a run of digits too long to mean much."""
    return _value(self.match)


def plain(text: str) -> str:
  """The text with ASCII digits and signs, and its LaTeX and markup undone."""
  if not text.isascii():
    text = text.translate(_SINGLE)
  if "\\" in text or "{,}" in text or "\u221a" in text:
    before = None
    for _ in range(_MAX_NESTING):
      if text == before:
        break
      before = text
      for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
  return text.replace("$", "").replace("**", "").replace("`", "")


_DRESSING = re.compile(
  r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?"
  r"(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)"
  r"(?:\s+is\b|\s*[:=])?\s*|答案(?:是|为|:)?\s*",
  re.IGNORECASE,
)


def undressed(text: str) -> str:
  """The plain text without "The answer is" and quotes around what is left."""
  text = plain(text).strip()
  match = _DRESSING.match(text)
  if match and match.end() < len(text):
    text = text[match.end() :]
  return text.strip(" \t\n\"'*_").removesuffix("</s>")


def numerals(text: str) -> Iterator[Numeral]:
  """Every number of a plain text that is written in digits, in order."""
  return map(Numeral, _NUMBER.finditer(text))


def number_words(text: str) -> Iterator[Numeral]:
  """Every number of a plain text that is written as a word, in order."""
  return map(Numeral, _WORD.finditer(text))


def only_number(text: str) -> decimal.Decimal | None:
  """What a text is worth that is one number, maybe with a name and a unit.

  "5", "-1,000.0", "x = 5 cm", "about $7.50", "3/4", "five apples"; None for
  anything with two numbers in it, and for what is no finite number.
  """
  text = plain(text[:200]) if len(text) <= 200 else ""
  name = _NAME.match(text)
  match = _NUMBER.match(text, name.end()) if name else None
  if match:
    value, rest = _value(match), text[match.end() :]
  else:
    match = _WORD.match(text.lstrip())
    if not match:
      return None
    value, rest = _value(match), text.lstrip()[match.end() :]
  if value is None or not _UNIT.match(rest):
    return None
  words = rest.split()
  if len(words) > 4 or _WORD.search(rest):
    return None
  scale = _SCALES.get(words[0].casefold(), 0) if words else 0
  return value.scaleb(scale)


def canonical(value: decimal.Decimal) -> str:
  """One spelling for each value: "5" for 5.0, "0.25" for 1/4."""
  if value == value.to_integral_value():
    value = value.to_integral_value()
  else:
    value = value.normalize()
  return f"{value:f}" if value else "0"


def _value(match: re.Match[str]) -> decimal.Decimal | None:
  """The value of a match of `_NUMBER` or `_WORD`."""
  if match.re is _WORD:
    return decimal.Decimal(WORDS[match[0].casefold()])
  whole = (match["whole"] or "0").replace(",", "")
  part = match["part"] or match["bare_part"] or ""
  if len(whole) + len(part) > _MAX_DIGITS:
    return None
  value = decimal.Decimal(f"{match['sign'] or ''}{whole}.{part or '0'}")
  exponent = int(match["power"] or match["exponent"] or 0)
  if abs(exponent) > _MAX_DIGITS:
    return None
  if match["divisor"] is not None:
    divisor = decimal.Decimal(match["divisor"])
    return value / divisor if divisor else None
  return value.scaleb(exponent)
