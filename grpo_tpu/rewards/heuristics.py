"""Rewards for the form of the reasoning: length, connectives, whole sentences.

They cannot tell right reasoning from wrong, so their weights should be small.
Repetition and lists of connectives score nothing. English and Chinese; a
Chinese character counts as a word.
"""

import collections
import itertools
import re
from typing import NamedTuple

from data_pipelines.text import tables

MAX_LENGTH, MAX_REASONING_WORDS, MAX_COHERENCE = 0.5, 0.3, 0.2

# Trigrams for the full length reward, and words beyond which it fades to 0.
_ENOUGH_WORDS = 40
_TOO_MANY_WORDS = 800
# Different connectives for the full reward; other words needed per connective;
# uses above which a connective does not count.
_ENOUGH_CONNECTIVES = 3
_WORDS_PER_CONNECTIVE = 4
_MOST_USES = 4
_SENTENCE_WORDS = (4, 60)

_WORDS = tables.read(__package__, "connectives.toml")
_CONNECTIVES = frozenset(_WORDS["english"] + _WORDS["chinese"])
_WORD = re.compile(
  "|".join(_WORDS["chinese"])
  + r"|[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:'[a-z]+)?"
)
_SENTENCE = re.compile(
  r"[^.!?\u3002\uff01\uff1f\n]+(?:\.(?=\d)[^.!?\u3002\uff01\uff1f\n]+)*"
  r"[.!?\u3002\uff01\uff1f]?"
)
_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")


class Reasoning(NamedTuple):
  """The reasoning's sentences, and the words of each sentence."""

  sentences: list[str]
  words: list[list[str]]


def read(text: str) -> Reasoning:
  """Splits the reasoning into sentences and words."""
  found = (sentence.strip() for sentence in _SENTENCE.findall(text))
  sentences = [sentence for sentence in found if sentence]
  words = [_WORD.findall(sentence.casefold()) for sentence in sentences]
  return Reasoning(sentences, words)


def length(reasoning: Reasoning) -> float:
  """Up to 0.5 for enough text, measured in different trigrams.

  Each repeated trigram cancels a new one, and overlong text fades to 0.
  """
  words = list(itertools.chain.from_iterable(reasoning.words))
  if not words:
    return 0.0
  grams = list(zip(words, words[1:], words[2:], strict=False)) or [tuple(words)]
  different = len(set(grams))
  share = max(0, different - (len(grams) - different)) / _ENOUGH_WORDS
  overlong = max(0.0, len(words) / _TOO_MANY_WORDS - 1.0)
  return MAX_LENGTH * min(1.0, share) * max(0.0, 1.0 - overlong)


def reasoning_words(reasoning: Reasoning) -> float:
  """Up to 0.3 for different connectives that each join a few other words."""
  uses: collections.Counter[str] = collections.Counter()
  joining: set[str] = set()
  for words in reasoning.words:
    connectives = [word for word in words if word in _CONNECTIVES]
    uses.update(connectives)
    others = len(set(words)) - len(set(connectives))
    if others >= _WORDS_PER_CONNECTIVE * len(connectives):
      joining.update(connectives)
  count = sum(uses[word] <= _MOST_USES for word in joining)
  return MAX_REASONING_WORDS * min(1.0, count / _ENOUGH_CONNECTIVES)


def coherence(reasoning: Reasoning) -> float:
  """Up to 0.2 for the share of sentences that are whole and not repeated.

  A whole sentence starts with a capital, a digit or a Chinese character, ends
  with punctuation, and has a few words, most of them different. A broken or a
  repeated sentence cancels a whole one.
  """
  if not reasoning.sentences:
    return 0.0
  words = map(tuple, reasoning.words)
  distinct = dict(zip(words, reasoning.sentences, strict=True))
  whole = sum(itertools.starmap(_is_whole, distinct.items()))
  total = len(reasoning.sentences)
  return MAX_COHERENCE * max(0, 2 * whole - total) / total


def _is_whole(words: tuple[str, ...], sentence: str) -> bool:
  first = sentence[0]
  fewest, most = _SENTENCE_WORDS
  different = set(words) - _CONNECTIVES
  return (
    (first.isupper() or first.isdigit() or first >= "\u3400")
    and sentence.endswith(_ENDS)
    and fewest <= len(words) <= most
    and len(different) >= fewest - 1
    and 2 * len(different) >= len(words)
  )
