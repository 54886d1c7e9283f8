"""The options of a multiple-choice question, named by letter, text or value.

Knows nothing of sentences: other modules find the part of a completion that
names the answer.
"""

import decimal
import functools
import itertools
import re
from collections.abc import Iterable

from data_pipelines.text import tables
from data_pipelines.verifier import numbers

_RE = tables.patterns("options")
# Characters that are read beside a letter.
_MAX_BESIDE = 400
# Mentions that are read in one text.
_MAX_MENTIONS = 200

_YES = ("是", "是的", "对", "正确", "بله")
_NO = ("否", "不是", "不", "不对", "خیر")


def _fold(text: str) -> str:
  """A form of the text that is equal for two spellings of one option."""
  text = numbers.plain(text).casefold().replace("degrees", "\u00b0")
  text = text.replace("degree", "\u00b0").replace(" ", "")
  return text.strip("\"'*_ \t\n").rstrip(".").strip("\"'*_ \t\n")


class Options:
  """The options of one question, by each way to name them."""

  def __init__(self, choices: tuple[str, ...]):
    self.letters = {chr(65 + i): text for i, text in enumerate(choices)}
    exact = {text.strip(): text for text in reversed(choices)}
    brackets = {f"({letter})": text for letter, text in self.letters.items()}
    self.direct = self.letters | brackets | exact
    names = dict(zip(choices, _without_letters(choices), strict=True))
    self.folded = _unambiguous((_fold(name), x) for x, name in names.items())
    self.folded |= _unambiguous((_fold(text), text) for text in choices)
    # Points and variables, which a sentence may name.
    self.points = {x: t for t, x in names.items() if _RE.point.fullmatch(x)}
    values = [(numbers.only_number(name), x) for x, name in names.items()]
    self.values = _unambiguous((v, text) for v, text in values if v is not None)
    self.are_numbers = len(self.values) == len(exact)
    # A lone letter is no mention: it may be a letter or an article.
    plain = {text: numbers.plain(name) for text, name in names.items()}
    spaced = {
      _to_spaced(x) for x in plain.values() if not _RE.point.fullmatch(x)
    }
    ranked = sorted(spaced - {""}, key=lambda t: (-len(t), t))
    self.mention = re.compile(
      "|".join(map(_mention_pattern, ranked)) or r"(?!)"
    )
    self.spaced = _unambiguous((_to_spaced(plain[t]), t) for t in choices)
    self.are_yes_and_no = set(self.folded) == {"yes", "no"}
    if self.are_yes_and_no:
      self.folded |= dict.fromkeys(_YES, self.folded["yes"])
      self.folded |= dict.fromkeys(_NO, self.folded["no"])
    self.longest = _MAX_BESIDE + max(map(len, choices), default=0)

  def from_answer(self, text: str) -> str | None:
    """The option that a text names, if the text contains nothing else."""
    if len(text) > self.longest:
      return None
    text = text.strip()
    if text in self.direct:
      return self.direct[text]
    text = numbers.strip_lead_in(text).rstrip(".!")
    if text in self.direct:
      return self.direct[text]
    named = self.from_text(text) or self._from_number_text(text)
    if named is not None:
      return named
    match = _RE.lettered.match(text)
    lettered = self.letters.get(match[1].upper()) if match else None
    if lettered is None or match is None:
      return None
    rest = text[match.end() :]
    if not rest.strip(" .)\n"):
      return lettered
    names = dict.fromkeys((rest, rest.strip(" -()")))
    found = (self.from_text(x) or self._from_number_text(x) for x in names)
    also = next(filter(None, found), None)
    return lettered if also is not None and also == lettered else None

  def from_text(self, text: str) -> str | None:
    """The option with this text, whatever its spelling."""
    return self.folded.get(_fold(text)) if text else None

  def mentions(self, text: str) -> list[str]:
    """The different options that a plain text mentions and does not deny."""
    spaced = _to_spaced(text)
    found = (
      self.spaced.get(match[0])
      for match in itertools.islice(
        self.mention.finditer(spaced), _MAX_MENTIONS
      )
      if not is_denied(spaced, match.start())
      and not (match[0][0].isdigit() and _is_compared(spaced, match.start()))
    )
    return list(dict.fromkeys(option for option in found if option))

  def points_in(self, text: str) -> list[str]:
    """The different options of one letter that a plain text names."""
    if not self.points or _RE.letter_range.search(text):
      return []
    found = (
      self.points.get(match[1] or match[2])
      for match in itertools.islice(_RE.lone_letter.finditer(text), 200)
      if not is_denied(text, match.start())
      and not _is_compared(text, match.start())
    )
    return list(dict.fromkeys(option for option in found if option))

  def names_several(self, text: str) -> bool:
    """True if a text starts with several options, like a list or a guess.

    Examples: "A, B, C", "(A) or (B)", "(A) 5 (B) 6", "red and blue".
    """
    named = []
    rest = _to_spaced(text[:_MAX_BESIDE])
    while True:
      rest = rest.lstrip(" *_'\".,;:/&|-")
      joined = _RE.joined.match(rest) if named else None
      rest = rest[joined.end() :] if joined else rest
      lettered = _RE.low_letter.match(rest)
      mention = self.mention.match(rest)
      if mention and named and self.are_yes_and_no and not joined:
        # "Yes, no other bar is higher."
        if re.match(r"\s+\w", rest[mention.end() :]):
          break
      if mention and not (lettered and lettered.end() > mention.end()):
        named.append(self.spaced.get(mention[0], mention[0]))
        rest = rest[mention.end() :]
      elif lettered and lettered["letter"].upper() in self.letters:
        letter = self.letters[lettered["letter"].upper()]
        rest = rest[lettered.end() :].lstrip(" ):.,")
        beside = self.mention.match(rest)
        rest = rest[beside.end() :] if beside else rest
        named.append(letter)
      else:
        break
    return len(set(named)) > 1

  def from_start(self, text: str) -> str | None:
    """The option that a plain text starts with."""
    match = self.mention.match(_to_spaced(text))
    return self.spaced.get(match[0]) if match else None

  def from_end(self, text: str) -> str | None:
    """The option that a plain text ends with."""
    spaced = _to_spaced(text[-self.longest :])
    found = self.mention.finditer(spaced)
    ends = (x[0] for x in found if x.end() == len(spaced))
    return self.spaced.get(next(ends, ""))

  def from_value(self, value: decimal.Decimal | None, text: str) -> str | None:
    """The option with this value, and with the unit that the text gives it."""
    named = None if value is None else self.values.get(value)
    if named is None or value is None:
      return None
    unit = numbers.unit_of(numbers.plain(named))
    return None if numbers.has_other_unit(text, value, unit) else named

  def _from_number_text(self, text: str) -> str | None:
    return self.from_value(numbers.only_number(text), text)


def _without_letters(choices: tuple[str, ...]) -> tuple[str, ...]:
  """The texts without letters of their own, as in "A. 30" and "B. 45"."""
  found = [_RE.own_letter.match(text) for text in choices]
  for index, match in enumerate(found):
    if match is None or match[1] != chr(65 + index):
      return choices
  return tuple(m.string[m.end() :] for m in found if m)


def is_denied(text: str, start: int) -> bool:
  """True if the words before index `start` deny what follows."""
  before = text[max(0, start - 60) : start]
  return _RE.denied.search(before.casefold()) is not None


def _is_compared(text: str, start: int) -> bool:
  return _RE.compared.search(text[max(0, start - 20) : start]) is not None


def _mention_pattern(text: str) -> str:
  """The pattern of an option's text as a whole word or number."""
  # The look-behind follows the first character, so that a search can skip to
  # the next possible start of an option.
  first, rest = re.escape(text[0]), re.escape(text[1:])
  before = rf"(?<![\w\u221a.]{first})"
  if text[0].isdigit() or text[0] == "\u221a":
    before += rf"(?<![-/^]{first})(?<!- {first})"
  pattern = rf"{first}{before}{rest}(?![\w\u221a])"
  if text[-1].isalnum():
    pattern = rf"{pattern}(?!\.\d|,\d{{3}}(?!\d))"
  if "\u221a" in text or text[-1].isdigit():
    pattern = rf"{pattern}(?!\s?[/^*\u00d7\u00b7+\u00b1]\s?[\d\u221a(a-z])"
  return pattern


def _to_spaced(text: str) -> str:
  """A plain text in the form that mentions are searched in."""
  text = text.casefold()
  if "degree" in text:
    text = _RE.degrees.sub("\u00b0", text)
  if "will" in text or "would" in text:
    text = _RE.will.sub("", text)
  return " ".join(text.split()).strip(" .")


def _unambiguous(pairs: Iterable[tuple]) -> dict:
  """A dict of the pairs, without keys that two different texts share."""
  table: dict = {}
  for key, text in pairs:
    same = key not in table or (table[key] or "").strip() == text.strip()
    table[key] = text if same else None
  return {key: text for key, text in table.items() if text is not None}


@functools.lru_cache(maxsize=4096)
def parse_options(choices: tuple[str, ...]) -> Options:
  """Parses the options of a question, once for equal options."""
  return Options(choices)
