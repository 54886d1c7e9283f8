"""Rewards for how a reasoning reads: length, connectives, whole sentences.

None of them knows whether the reasoning is right, so none should weigh much;
they are built so that repetition and lists of magic words earn nothing.
English and Chinese; a Chinese character counts as a word.
"""

import collections
import re
from collections.abc import Sequence

MAX_LENGTH, MAX_REASONING_WORDS, MAX_COHERENCE = 0.5, 0.3, 0.2

# Words that earn the whole length reward, and those past which it fades out.
_ENOUGH_WORDS = 40
_TOO_MANY_WORDS = 800
# Different connectives that earn the whole reward; words that each must join;
# uses after which one is a tic.
_ENOUGH_CONNECTIVES = 3
_WORDS_PER_CONNECTIVE = 4
_MOST_USES = 4
_SENTENCE_WORDS = (4, 60)

_CONNECTIVES = frozenset(
  "because since therefore thus hence so if then first second next finally "
  "however so consequently given implies means".split()
)
_CHINESE_CONNECTIVES = (
  "\u56e0\u4e3a",  # Because.
  "\u6240\u4ee5",  # So.
  "\u56e0\u6b64",  # Therefore.
  "\u7531\u4e8e",  # Since.
  "\u9996\u5148",  # First.
  "\u7136\u540e",  # Then.
  "\u6700\u540e",  # Finally.
  "\u5982\u679c",  # If.
)
_WORD = re.compile(
  "|".join(_CHINESE_CONNECTIVES)
  + r"|[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:'[a-z]+)?"
)
_SENTENCE = re.compile(
  r"[^.!?\u3002\uff01\uff1f\n]+(?:\.(?=\d)[^.!?\u3002\uff01\uff1f\n]+)*"
  r"[.!?\u3002\uff01\uff1f]?"
)
_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")


def length(reasoning: str) -> float:
  """Up to 0.5 for saying enough, measured in trigrams not said before.

  A trigram said again takes back what one earned, and what goes on too long
  fades to nothing.
  """
  words = _words(reasoning)
  if not words:
    return 0.0
  grams = list(zip(words, words[1:], words[2:], strict=False)) or [tuple(words)]
  fresh = len(set(grams))
  earned = max(0, fresh - (len(grams) - fresh)) / _ENOUGH_WORDS
  overlong = max(0.0, len(words) / _TOO_MANY_WORDS - 1.0)
  return MAX_LENGTH * min(1.0, earned) * max(0.0, 1.0 - overlong)


def reasoning_words(reasoning: str) -> float:
  """Up to 0.3 for different connectives that each join a few other words."""
  uses: collections.Counter[str] = collections.Counter()
  joining: set[str] = set()
  for sentence in _sentences(reasoning):
    words = _words(sentence)
    connectives = [word for word in words if _is_connective(word)]
    uses.update(connectives)
    others = len(set(words)) - len(set(connectives))
    if others >= _WORDS_PER_CONNECTIVE * len(connectives):
      joining.update(connectives)
  earned = sum(uses[word] <= _MOST_USES for word in sorted(joining))
  return MAX_REASONING_WORDS * min(1.0, earned / _ENOUGH_CONNECTIVES)


def coherence(reasoning: str) -> float:
  """Up to 0.2 for the share of sentences that are whole and said once.

  A whole sentence opens with a capital, a digit or a Chinese character, ends
  with its mark, and has a few words, most of them different. A broken or a
  repeated one takes back what a whole one earned.
  """
  sentences = _sentences(reasoning)
  if not sentences:
    return 0.0
  whole = sum(map(_is_whole, {sentence.casefold(): sentence for sentence in sentences}.values()))
  earned = max(0, 2 * whole - len(sentences))
  return MAX_COHERENCE * earned / len(sentences)


def _words(text: str) -> list[str]:
  return _WORD.findall(text.casefold())


def _sentences(text: str) -> list[str]:
  found = (sentence.strip() for sentence in _SENTENCE.findall(text))
  return [sentence for sentence in found if sentence]


def _is_connective(word: str) -> bool:
  return word in _CONNECTIVES or word in _CHINESE_CONNECTIVES


def _is_whole(sentence: str) -> bool:
  words: Sequence[str] = _words(sentence)
  fewest, most = _SENTENCE_WORDS
  different = {word for word in words if not _is_connective(word)}
  opens = sentence[0].isupper() or sentence[0].isdigit() or sentence[0] >= "\u3400"
  return (
    opens
    and sentence.endswith(_ENDS)
    and fewest <= len(words) <= most
    and len(different) >= fewest - 1
    and 2 * len(different) >= len(words)
  )
