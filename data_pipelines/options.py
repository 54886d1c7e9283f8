"""The options of a multiple-choice question, and the ways to name one.

By letter, by text, by both, or by value. Knows nothing of sentences: which
part of a response names the answer is found elsewhere.
"""

import decimal
import functools
import re
from collections.abc import Iterable

from data_pipelines import numerals

# What stands beside a letter is looked at so far.
_MAX_BESIDE = 400

_LETTERED = re.compile(
  r"\(?\s*([A-Za-z])\s*(?:[).:,]+|\Z|(?=\s))\)?\s*", re.ASCII
)
_LOW_LETTER = re.compile(r"\(?\s*([a-z])(?![\w'])\s*\)?")
_JOINED = re.compile(r"(?:or|and|nor|then)\b\s*|或|和|、")


def _folded(text: str) -> str:
  """What two spellings of one option share."""
  text = numerals.plain(text).casefold().replace("degrees", "\u00b0")
  text = text.replace("degree", "\u00b0").replace(" ", "")
  return text.strip("\"'*_ \t\n").rstrip(".").strip("\"'*_ \t\n")


class Options:
  """The options of one question, and the ways to name one of them."""

  def __init__(self, choices: tuple[str, ...]):
    self.texts = choices
    self.letters = {chr(65 + i): text for i, text in enumerate(choices)}
    self.exact = {text.strip(): text for text in reversed(choices)}
    self.folded = _unambiguous((_folded(text), text) for text in choices)
    values = [(numerals.only_number(text), text) for text in choices]
    self.values = _unambiguous((v, text) for v, text in values if v is not None)
    self.direct = {}
    for letter, text in self.letters.items():
      self.direct |= {letter: text, f"({letter})": text}
    self.direct |= self.exact
    # A lone letter is a letter, and "a" an article: neither is a mention.
    spaced = {_spaced(t) for t in choices if not re.fullmatch("[A-Za-z]", t)}
    ranked = sorted(spaced - {""}, key=lambda t: (-len(t), t))
    self.mention = re.compile(
      "|".join(rf"(?<![\w\u221a.]){re.escape(t)}(?![\w\u221a])" for t in ranked)
      or r"(?!)"
    )
    self.spaced = _unambiguous((_spaced(text), text) for text in choices)
    self.are_yes_and_no = set(self.folded) == {"yes", "no"}
    self.longest = _MAX_BESIDE + max(map(len, choices), default=0)

  def only(self, text: str) -> str | None:
    """The option that a text names which should hold nothing else."""
    if len(text) > self.longest:
      return None
    text = text.strip()
    if text in self.direct:
      return self.direct[text]
    text = numerals.undressed(text).removesuffix(".")
    if text in self.direct:
      return self.direct[text]
    named = self.written_as(text) or self._of_value(text)
    if named is not None:
      return named
    match = _LETTERED.match(text)
    lettered = self.letters.get(match[1].upper()) if match else None
    if lettered is None or match is None:
      return None
    rest = text[match.end() :]
    if not rest.strip(" .)\n"):
      # A lone small letter may be a word or a variable, in brackets not.
      return lettered if match[1].isupper() or "(" in match[0] else None
    also = self.written_as(rest) or self._of_value(rest)
    return lettered if also is not None and also == lettered else None

  def written_as(self, text: str) -> str | None:
    """The option whose text this is, spelling apart."""
    return self.folded.get(_folded(text)) if text else None

  def mentioned(self, text: str) -> list[str]:
    """The different options whose texts stand in a plain text, in order."""
    found = (
      self.spaced.get(m[0]) for m in self.mention.finditer(_spaced(text))
    )
    return list(dict.fromkeys(option for option in found if option))

  def names_several(self, text: str) -> bool:
    """Whether a text starts with several options, as a list or a guess would.

    "A, B, C", "(A) or (B)", "(A) 5 (B) 6", "red and blue".
    """
    named = []
    rest = _spaced(text[:_MAX_BESIDE])
    while True:
      rest = rest.lstrip(" *_'\".,;:/&|-")
      joined = _JOINED.match(rest) if named else None
      rest = rest[joined.end() :] if joined else rest
      lettered = _LOW_LETTER.match(rest)
      mention = self.mention.match(rest)
      if mention and not (lettered and lettered.end() > mention.end()):
        named.append(self.spaced.get(mention[0], mention[0]))
        rest = rest[mention.end() :]
      elif lettered and lettered[1].upper() in self.letters:
        letter = self.letters[lettered[1].upper()]
        rest = rest[lettered.end() :].lstrip(" ):.,")
        beside = self.mention.match(rest)
        rest = rest[beside.end() :] if beside else rest
        named.append(letter)
      else:
        break
    return len(set(named)) > 1

  def opens(self, text: str) -> str | None:
    """The option whose text a plain text starts with."""
    match = self.mention.match(_spaced(text))
    return self.spaced.get(match[0]) if match else None

  def worth(self, value: decimal.Decimal) -> str | None:
    """The option of a value, if every option is a number."""
    numeric = len(self.values) == len(self.exact)
    return self.values.get(value) if numeric else None

  def _of_value(self, text: str) -> str | None:
    value = numerals.only_number(text)
    return None if value is None else self.values.get(value)


def _spaced(text: str) -> str:
  """A plain text as options are looked for in it."""
  text = numerals.plain(text).casefold()
  text = re.sub(r"\s?degrees?\b", "\u00b0", text)
  return " ".join(text.split()).strip(" .")


def _unambiguous(pairs: Iterable[tuple]) -> dict:
  """The pairs as a dict, without keys that two different texts share."""
  table: dict = {}
  for key, text in pairs:
    same = key not in table or (table[key] or "").strip() == text.strip()
    table[key] = text if same else None
  return {key: text for key, text in table.items() if text is not None}


@functools.lru_cache(maxsize=4096)
def options_of(choices: tuple[str, ...]) -> Options:
  """The options of a question, worked out once."""
  return Options(choices)
