"""What a response without tag or box settles on, when it answers in prose.

Rules for English and Chinese sentences, from "the answer is" down to the one
option or number that the last sentence speaks of. Refusals, lists of options
and guesses at several answers settle on nothing.
"""

import decimal
import re

from data_pipelines import numerals
from data_pipelines import options as options_lib

# No answer is further from its announcement.
_REACH = 400
# Nor does a sentence argue with more numbers.
_MOST_NUMBERS = 100
_MARK = re.compile(r"\(\s*([A-Z])\s*\)")

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_CUE = re.compile(
  r"\b(?:answer|final value|final result"
  r"|(?:correct|right|best) (?:option|choice|letter|value|one))\b"
  r"[^\n:=]{0,80}?(?:\bis\b|\bare\b|\bwould be\b|\bmust be\b|:|=)"
  r"|\b(?:option|choice) (?:is|would be)\b"
  r"|答案(?:选项)?(?:应该|应)?(?:是|为|选|:)|选项(?:应该|应)?(?:是|为|:)?|[故应]选|选择",
  re.IGNORECASE,
)
_AFFIRMED = re.compile(
  r"(?:\(\s*([A-Z])\s*\)|\b(?:[Oo]ption|[Cc]hoice|选项)\s*([A-Z])\b|\A([A-Z])\b)"
  r"[^\n]{0,60}?(?:\bis (?:the )?(?:correct|right|best)\b|正确)"
)
_DENIED = re.compile(
  r"\bincorrect\b|\bnot (?:the )?(?:correct|right)\b|\bwrong\b|\bcannot be the"
  r"|\A\s*if\b|\brule[sd]? out\b|\beliminated?\b|错误|不正确",
  re.IGNORECASE,
)
_REFUSED = re.compile(
  r"\b(?:can(?:not|'t| not)|could not|couldn't|unable to|impossible to"
  r"|not possible to|difficult to|no way to|don't|do not)"
  r" (?:\w+ )?(?:be (?:\w+ )?)?"
  r"(?:determine|answer|tell|provide|calculate|identify|say|see|find|know"
  r"|compute|infer|have enough|have (?:\w+ )?information)"
  r"|\bplease provide\b|\b(?:i'm |i am )?sorry\b|\bapologi[sz]e\b"
  r"|\b(?:not|n't) (?:\w+ )?(?:enough|sufficient) (?:information|context)"
  r"|\binsufficient information\b|\bwithout (?:more|further|additional)\b"
  r"|\bmore (?:information|context)\b|\bn/a\b|无法|不能确定",
  re.IGNORECASE,
)
_LISTED_OPTION = re.compile(r"[ \t]*\(?[A-H][).:][^\n]*")
# Chinese characters are word characters, yet a letter may touch them.
_LETTER = re.compile(
  r"\(\s*([A-Z])\s*\)"
  r"|(?<![\w'(\u4e00-\u9fff])([A-Z])(?![\w'])"
  r"|(?<=[\u4e00-\u9fff])([A-Z])(?![\w'])"
  r"|(?<![\w'])([A-Z])(?=[\u4e00-\u9fff])"
)
_LEADING = re.compile(
  r"\s*(?:\(\s*([A-Z])\s*\)|([A-Z])(?:\s*[).:](?=\s|\Z)|\s*\n))"
)


def without_listed_options(text: str) -> str:
  """The text without two or more adjacent lines that list options."""
  if "\n" not in text:
    return text
  lines = text.split("\n")
  listed = [bool(_LISTED_OPTION.fullmatch(line)) for line in lines]
  kept = [
    line
    for i, line in enumerate(lines)
    if not (
      listed[i] and (listed[i - 1 : i] + listed[i + 1 : i + 2]).count(True)
    )
  ]
  return "\n".join(kept)


def _sentences(text: str) -> list[str]:
  """Sentences in order, without what a response ends them with."""
  text = text.removesuffix("</s>")
  return [part for part in _SENTENCE.split(text) if part and part.strip()]


def choice(text: str, options: options_lib.Options) -> tuple[str | None, str]:
  """The option that a free text settles on."""
  if options.names_several(text):
    return None, "none"
  sentences = _sentences(text)
  for i in range(len(sentences) - 1, -1, -1):
    named = _affirmed(sentences[i], options)
    after = _announced(sentences, i) if named is None else None
    if after is not None:
      if options.names_several(after):
        return None, "none"
      named = _first_named(after, options)
    if named is not None:
      return named, "cue"
  letters = _marked(sentences, options)
  match = _LEADING.match(text)
  if match and len(letters) < 2 and not _DENIED.search(sentences[0]):
    named = _with_text(match[1] or match[2], text[match.end() :], options)
    if named is not None:
      return named, "letter"
  if len(letters) == 1:
    return options.letters[letters.pop()], "letter"
  if letters:
    return None, "none"
  return _stated(text, sentences, options)


def _marked(sentences: list[str], options: options_lib.Options) -> set[str]:
  """The letters that stand in brackets, but for those that are denied."""
  return {
    match[1]
    for sentence in sentences
    if not _DENIED.search(sentence)
    for match in _MARK.finditer(sentence)
    if match[1] in options.letters
  }


def _affirmed(sentence: str, options: options_lib.Options) -> str | None:
  """The option of which a sentence says that it is the right one."""
  match = _AFFIRMED.search(sentence)
  if not match or _DENIED.search(sentence):
    return None
  return options.letters.get(match[1] or match[2] or match[3])


def _announced(sentences: list[str], i: int) -> str | None:
  """What sentence i, or the next one, says after "the answer is"."""
  cues = list(_CUE.finditer(sentences[i]))
  if not cues or _DENIED.search(sentences[i]):
    return None
  after = sentences[i][cues[-1].end() :]
  if not after.strip(" :*\"'") and i + 1 < len(sentences):
    after = sentences[i + 1]
  return after


def _first_named(after: str, options: options_lib.Options) -> str | None:
  """The option that the words after "the answer is" name first."""
  only = options.only(after)
  if only is not None:
    return only
  for match in _LETTER.finditer(after[:_REACH]):
    letter = match[1] or match[2] or match[3] or match[4]
    # "A" opens many a sentence as an article.
    article = letter == "A" and re.match(r"\s+[a-z]", after[match.end() :])
    if letter in options.letters and not article:
      return _with_text(letter, after[match.end() :], options)
  mentioned = options.mentioned(after)
  return mentioned[0] if mentioned else None


def _with_text(
  letter: str, rest: str, options: options_lib.Options
) -> str | None:
  """What a letter names, unless the text beside it is another option."""
  if letter not in options.letters:
    return None
  beside = rest.split("\n", 1)[0][:_REACH].strip(" .)*:,")
  other = options.written_as(beside) or options.opens(beside)
  return options.letters[letter] if other is None else other


def _stated(
  text: str, sentences: list[str], options: options_lib.Options
) -> tuple[str | None, str]:
  """The one option that a text without letters speaks of."""
  if options.are_yes_and_no:
    return _yes_or_no(sentences, options)
  if _REFUSED.search(text):
    return None, "none"
  sentences = [_CONDITION.sub("", sentence) for sentence in sentences]
  for part in (sentences[-1:], sentences[:1], sentences):
    mentioned = options.mentioned(" ".join(part))
    if len(mentioned) == 1:
      return mentioned[0], "statement"
  value, _ = quantity(text)
  named = options.worth(decimal.Decimal(value)) if value else None
  return (named, "statement") if named else (None, "none")


# What is supposed restates the question; it is not the answer.
_CONDITION = re.compile(r"\A\s*if\b[^,]{1,160},", re.IGNORECASE)
_ASSERTED = re.compile(
  r"\b(?:is|are|was|were|has|have|does|do|can|will)\b|n't\b", re.IGNORECASE
)
_NEGATED = re.compile(r"\b(?:not|no|never|neither|nor)\b|n't\b", re.IGNORECASE)


def _yes_or_no(
  sentences: list[str], options: options_lib.Options
) -> tuple[str | None, str]:
  """Yes or no by the word itself, or by whether a short reply denies."""
  if not sentences:
    return None, "none"
  opener = re.match(r"\W*(yes|no)\b", sentences[0], re.IGNORECASE)
  said = options.mentioned(sentences[-1])
  if opener:
    return options.folded[opener[1].casefold()], "statement"
  if len(said) == 1:
    return said[0], "statement"
  text = " ".join(sentences)
  if len(sentences) > 3 or _REFUSED.search(text) or _CUE.search(text):
    return None, "none"
  if len(sentences[0].split()) < 4 or not _ASSERTED.search(sentences[0]):
    return None, "none"
  word = "no" if _NEGATED.search(sentences[0]) else "yes"
  return options.folded[word], "statement"


_VERB = re.compile(
  r"(?:\b(?:is|are|was|were|be|been|equals?|has|have|had|to|gives?|of"
  r"|approximately|about|around|get|makes?|leaves?|left with)\b"
  r"|[=\u2248]|为|是|有)"
  r"[\s(]*(?:(?:a|an|the|total|of|only|about|approximately|around|exactly"
  r"|still|now|be|equal|to)\s+){0,4}[\s(]*\Z",
  re.IGNORECASE,
)
_THERE_ARE = re.compile(
  r"\s*(?:\w+,? ){0,4}there (?:is|are|was|were|will be|would be)\b",
  re.IGNORECASE,
)


def quantity(text: str) -> tuple[str | None, str]:
  """The number that a free text settles on."""
  sentences = _sentences(text)
  for i in range(len(sentences) - 1, -1, -1):
    after = _announced(sentences, i)
    if after is None:
      continue
    if _REFUSED.search(after):
      return None, "none"
    found = _numbers(after.rsplit("=", 1)[-1]) or _numbers(after)
    if found:
      return _spelt(found[0], "cue")
  if _REFUSED.search(text):
    return None, "none"
  for sentence in reversed(sentences):
    chosen = _concluded(sentence)
    if chosen is not None:
      return _spelt(chosen, "statement")
  return None, "none"


_MERE_NUMBERS = re.compile(r"(?:[-+\d.,;:/%$\s]|\bor\b|\band\b)*+")


def lists_numbers(text: str) -> bool:
  """Whether a text is nothing but several different numbers."""
  if not _MERE_NUMBERS.fullmatch(text):
    return False
  return len({number.value for number in numerals.numerals(text)}) > 1


def _spelt(number: numerals.Numeral, how: str) -> tuple[str | None, str]:
  value = number.value
  return (None, "none") if value is None else (numerals.canonical(value), how)


def _concluded(sentence: str) -> numerals.Numeral | None:
  """The number that a sentence is about."""
  found = _numbers(sentence)
  if "=" not in sentence and _THERE_ARE.match(sentence):
    counts = [*found, *numerals.number_words(sentence)]
    counts.sort(key=lambda number: number.start)
    counts = counts[:_MOST_NUMBERS]
    return next((n for n in counts if not _before(n, _THRESHOLD)), None)
  last = None
  for number in reversed(found[-_MOST_NUMBERS:]):
    if _before(number, _THRESHOLD):
      continue
    if _before(number, _VERB):
      return number
    last = last or number
  return last


def _before(number: numerals.Numeral, pattern: re.Pattern[str]) -> bool:
  """Whether what stands right before a number matches."""
  text = number.match.string[max(0, number.start - 40) : number.start]
  return pattern.search(text) is not None


_THRESHOLD = re.compile(
  r"\b(?:than|below|above|under|over|at least|at most|exceed(?:s|ing)?|out of"
  r"|between|exactly)\s*\Z",
  re.IGNORECASE,
)
_RANGE = re.compile(
  r"\d%?\s?(?:-|\bto\b|\bor\b)\s?\d[\d.,]*|\bbetween \d[\d.,%]* and \d[\d.,]*"
)


def _numbers(text: str) -> list[numerals.Numeral]:
  """The numbers of a text, without ranges; those in words if there are none."""
  if "=" not in text:
    text = _RANGE.sub(lambda match: " " * len(match[0]), text)
  return list(numerals.numerals(text)) or list(numerals.number_words(text))
