"""Phrases that announce, affirm, deny or refuse an answer.

English, and the words before an answer in other languages. Every rule reads a
lower-case copy with the same indices as the text, in linear time. Knows nothing
of options or numbers.
"""

from data_pipelines.text import tables

_RE = tables.patterns("phrases")


def to_lower(text: str) -> str:
  """The text in lower case, with every character at its index."""
  low = text.lower()
  return low if len(low) == len(text) else text


def sentences(text: str) -> list[str]:
  """Sentences and lines in order, without empty ones."""
  return [part for part in _RE.sentence.split(text) if part and part.strip()]


def is_refusal(text: str) -> bool:
  """True if a text says anywhere that it cannot answer."""
  return _RE.refused.search(to_lower(text)) is not None


def is_denial(sentence: str) -> bool:
  """True if a sentence says that something is wrong, or only supposes it."""
  return _RE.denied.search(to_lower(sentence)) is not None


def is_assertion(sentence: str) -> bool:
  """True if a sentence is no question, denial or supposition."""
  return sentence.rstrip()[-1:] != "?" and not is_denial(sentence)


def has_cue(text: str) -> bool:
  """True if a text says "the answer is" or similar words."""
  return _RE.cue.search(to_lower(text)) is not None


def text_after_cue(parts: list[str], i: int) -> str | None:
  """The text after "the answer is" in sentence i, or else the next sentence."""
  low = to_lower(parts[i])
  if not _RE.cue_word.search(low):
    return None
  found = list(_RE.cue.finditer(low))
  # "Since A is wrong, the answer is B" denies its premise alone.
  start = found[0].start() if found and _RE.premise.match(low) else 0
  claim = _RE.reason.split(parts[i][start:], maxsplit=1)[0]
  if not found or not is_assertion(claim):
    return None
  end = found[-1].end()
  after = parts[i][end:]
  if not after.strip(" :*\"'") and i + 1 < len(parts):
    after = parts[i + 1]
  return after


def affirmed_letter(sentence: str) -> tuple[str, str] | None:
  """The letter that a sentence calls right, and the text after the letter."""
  if not _RE.praise.search(sentence):
    return None
  match = _RE.affirmed.search(sentence)
  if not match or is_denial(sentence):
    return None
  group = next(i for i in (1, 2, 3) if match[i])
  return match[group], sentence[match.end(group) :]
