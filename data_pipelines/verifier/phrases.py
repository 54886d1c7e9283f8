"""Phrases that announce, affirm, deny or refuse an answer.

English, Chinese and Persian. Every rule reads a lower-case copy with the same
indices as the text, in linear time. Knows nothing of options or numbers.
"""

import re

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_CUE = re.compile(
  r"\b(?:(?:answer|final value|final result|ans"
  r"|(?:correct|right|best|final|selected|chosen) "
  r"(?:option|choice|letter|value|one|match))\b"
  r"[^\n:=]{0,80}?(?:\b(?:is|are|(?:would|must|should|has to) be)\b|:|=)"
  r"|(?:option|choice) (?:is|would be)\b|答:)"
  r"|答案(?:选项)?(?:应该|应)?】?(?:是|为|选|:|(?<=】))|选项(?:应该|应)?(?:是|为|:)?"
  r"|选(?<!不选)(?!项|[一-龥])|[故应]选|选择"
  r"|(?:پاسخ|جواب)(?: (?:صحیح|درست|نهایی))?(?: گزینه|:|(?= ))|گزینه"
)
# A quick test: every cue contains one of these.
_CUE_WORD = re.compile(
  "ans|final|correct|right|best|selected|chosen|option|choice"
  "|答|选|پاسخ|جواب|گزینه"
)
_AFFIRMED = re.compile(
  r"(?:\(\s*([A-Z])\s*\)|\b(?:[Oo]ption|[Cc]hoice|选项)\s*([A-Z])\b"
  r"|(?:\A|(?<=, )|(?<=\b[Ss]o )|(?<=\b[Hh]ence )|(?<=\b[Tt]hus ))([A-Z])\b)"
  r"[^\n]{0,60}?(?:\bis (?:therefore |thus |clearly )?(?:the )?"
  r"(?:(?:correct|right|best)\b|(?:final )?answer\b)|正确)"
)
_PRAISE = re.compile("correct|right|best|answer|正确")
_DENIED = re.compile(
  r"\b(?:incorrect\b|not (?:the |an? )?(?:correct|right|answer)\b|wrong\b"
  r"|cannot be (?:the|right|correct)\b|rul(?:e[sd]?|ing) out\b"
  r"|eliminat(?:ed?|es|ing)\b)"
  r"|n't (?:the |an? )?(?:correct|right|answer)\b|错误|不正确|不选|\A\s*if\b"
)
_REFUSED = re.compile(
  r"\b(?:(?:can(?:not|'t| not)|could not|couldn't|unable to|impossible to"
  r"|not possible to|difficult to|no way to|don't|do not)"
  r" (?:\w+ )?(?:be (?:\w+ )?)?"
  r"(?:determine|answer|tell|provide|calculate|identify|say|see|find|know"
  r"|compute|infer|have enough|have (?:\w+ )?information|view|access|process"
  r"|assist|help|judge|read|decide|conclude|count|estimate)"
  r"|not (?:\w+ )?(?:sure|certain)\b|unsure\b|uncertain\b"
  r"|(?:image|picture|photo)(?:'s| is| was) (?:\w+ )?(?:missing|not|attached)"
  r"|no (?:image|picture|photo|answer|comment|idea|information)\b"
  r"|not visible\b|not clear\b|unclear\b|illegible\b"
  r"|please (?:provide|upload|share|attach|send|clarify)\b"
  r"|sorry\b|apologi[sz]e\b|insufficient information\b|n/a\b"
  r"|not (?:\w+ )?(?:enough|sufficient) (?:information|context)"
  r"|without (?:more|further|additional)\b|more (?:information|context)\b)"
  r"|n't (?:\w+ )?(?:enough|sufficient) (?:information|context)"
  r"|无法|不能|抱歉"
)


def to_lower(text: str) -> str:
  """The text in lower case, with every character at its index."""
  low = text.lower()
  return low if len(low) == len(text) else text


def sentences(text: str) -> list[str]:
  """Sentences and lines in order, without empty ones."""
  return [part for part in _SENTENCE.split(text) if part and part.strip()]


def is_refusal(text: str) -> bool:
  """True if a text says anywhere that it cannot answer."""
  return _REFUSED.search(to_lower(text)) is not None


def is_denial(sentence: str) -> bool:
  """True if a sentence says that something is wrong, or only supposes it."""
  return _DENIED.search(to_lower(sentence)) is not None


def is_assertion(sentence: str) -> bool:
  """True if a sentence is no question, denial or supposition."""
  return sentence.rstrip()[-1:] != "?" and not is_denial(sentence)


def has_cue(text: str) -> bool:
  """True if a text says "the answer is" or similar words."""
  return _CUE.search(to_lower(text)) is not None


def text_after_cue(parts: list[str], i: int) -> str | None:
  """The text after "the answer is" in sentence i, or else the next sentence."""
  low = to_lower(parts[i])
  if not _CUE_WORD.search(low):
    return None
  end = None
  for match in _CUE.finditer(low):
    end = match.end()
  if end is None or not is_assertion(parts[i]):
    return None
  after = parts[i][end:]
  if not after.strip(" :*\"'") and i + 1 < len(parts):
    after = parts[i + 1]
  return after


def affirmed_letter(sentence: str) -> tuple[str, str] | None:
  """The letter that a sentence calls right, and the text after the letter."""
  if not _PRAISE.search(sentence):
    return None
  match = _AFFIRMED.search(sentence)
  if not match or is_denial(sentence):
    return None
  group = next(i for i in (1, 2, 3) if match[i])
  return match[group], sentence[match.end(group) :]
