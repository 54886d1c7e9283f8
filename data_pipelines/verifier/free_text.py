"""Finds the answer in the prose of a completion without tag or box.

Rules for English and Chinese sentences, from "the answer is" down to the one
option or number in the last sentence. Refusals, lists of options and guesses at
several answers are no answer.
"""

import decimal
import functools
import itertools
import re

from data_pipelines.text import tables
from data_pipelines.verifier import numbers, phrases
from data_pipelines.verifier.options import Options, is_denied

_RE = tables.patterns("free_text")
# An answer in its canonical spelling, and the rule that found it.
type Found = tuple[str | None, str]
_NOTHING: Found = (None, "none")

# The answer must be this close to the words that announce it.
_MAX_BESIDE = 400
# More numbers or letters in one sentence are ignored.
_MAX_NUMBERS = 100
_MAX_BRACKETED = 50


def without_positions(text: str) -> str:
  """The text without the numbers of a list's items: 1., 2. and so on."""
  found = {int(x) for x in _RE.position.findall(text)}
  counted = {x for x in found if x == 1 or {x - 1, x + 1} & found}
  return _RE.position.sub(
    lambda match: "" if int(match[1]) in counted else match[0], text
  )


def is_hedged(text: str) -> bool:
  """True if a text only supposes several things."""
  found = _RE.hedged.findall(phrases.to_lower(text))
  return len(found) > 1 and not phrases.has_cue(text)


def without_listed_options(text: str) -> str:
  """The text without adjacent lines that list options."""
  if "\n" not in text:
    return text
  lines = text.split("\n")
  listed = [
    bool(_RE.listed_option.fullmatch(line))
    and not phrases.affirmed_letter(line)
    for line in lines
  ]
  return "\n".join(
    line
    for i, line in enumerate(lines)
    if not listed[i] or sum(listed[max(i - 1, 0) : i + 2]) == 1
  )


class _Conflict(Exception):
  """A letter has the text of another option beside it."""


def find_option(text: str, options: Options) -> Found:
  """The option that a free text chooses, and the rule that found it."""
  sentences = _join_letters(phrases.sentences(text), options)
  named = _remaining(sentences[-1][-400:], options) if sentences else None
  if named is not None:
    return named, "cue"
  ruled_out = sentences and _RE.ruled_out.search(sentences[0])
  if not ruled_out and options.names_several(text):
    return _NOTHING
  try:
    return (
      _from_cue(sentences, options)
      or _from_last_line(text, sentences, options)
      or _from_letter(text, sentences, options)
      or _from_statement(text, sentences, options)
    )
  except _Conflict:
    return _NOTHING


def _join_letters(sentences: list[str], options: Options) -> list[str]:
  """The sentences; a letter and a full stop go with an option's text."""
  joined: list[str] = []
  for sentence in sentences:
    if joined and _RE.ends_in_letter.search(joined[-1][-8:]):
      # A letter alone is another answer, and an equation is a step.
      is_text = len(sentence.strip()) > 2 and "=" not in sentence
      if (
        is_text
        and not phrases.has_cue(sentence)
        and options.from_answer(sentence)
      ):
        joined[-1] += f" {sentence}"
        continue
    joined.append(sentence)
  return joined


def _remaining(sentence: str, options: Options) -> str | None:
  """The option that is left after a sentence rules out others."""
  if match := _RE.left.search(sentence):
    return options.letters.get(match[match.lastindex or 0])
  match = _RE.remaining.fullmatch(sentence)
  if match is None or not (
    phrases.is_denial(match[1]) or _RE.excluded.search(match[1])
  ):
    return None
  denied = {"".join(groups) for groups in _RE.letter.findall(match[1])}
  is_last = denied and match[2] not in denied
  return options.letters.get(match[2]) if is_last else None


def _from_cue(sentences: list[str], options: Options) -> Found | None:
  """The option in the last sentence that announces an answer."""
  for i in range(len(sentences) - 1, -1, -1):
    affirmed = phrases.affirmed_letter(sentences[i])
    named = _option_of_letter(*affirmed, options) if affirmed else None
    after = None if named else phrases.text_after_cue(sentences, i)
    if after is not None:
      if options.names_several(after):
        return _NOTHING
      named = _first_option(after, options)
    if named is not None:
      return named, "cue"
  return None


def _from_last_line(
  text: str, sentences: list[str], options: Options
) -> Found | None:
  """The letter at the end of the last sentence, or the last line's answer."""
  if sentences and phrases.is_assertion(sentences[-1]):
    end = sentences[-1][-80:]
    match = _RE.final_letter.search(end)
    letter = match[1] if match else None
    others = {m[1] for m in _RE.bracketed.finditer(sentences[-1])} - {letter}
    if match and letter in options.letters and not others:
      if not is_denied(end, match.start(1)):
        return options.letters[match[1]], "cue"
  _, line_end, last_line = text.rstrip().rpartition("\n")
  named = options.from_answer(last_line) if line_end else None
  return None if named is None else (named, "letter")


def _from_letter(
  text: str, sentences: list[str], options: Options
) -> Found | None:
  """The letter at the start of the text, or the only letter in brackets."""
  letters = _bracketed_options(sentences, options)
  match = _RE.first_letter.match(text)
  if match and len(letters) < 2 and not phrases.is_denial(sentences[0]):
    rest = text[match.end() :]
    word = _RE.opener.match(rest) if options.are_yes_and_no else None
    if word and text[match.end(2) :].startswith(":"):  # "A: No" is an answer.
      return options.folded[word[1].casefold()], "letter"
    named = _option_of_letter(match[1] or match[2], rest, options)
    if named is not None:
      return named, "letter"
  if not letters:
    return None
  return (letters.pop() if len(letters) == 1 else None), "letter"


def _bracketed_options(sentences: list[str], options: Options) -> set[str]:
  """The options whose letters are in brackets and not denied."""
  found = set()
  for sentence in sentences:
    if "(" not in sentence or phrases.is_denial(sentence):
      continue
    letters = _RE.bracketed.finditer(sentence)
    for match in itertools.islice(letters, _MAX_BRACKETED):
      name = options.letters.get(match[1])
      before = sentence[: match.start()].rstrip().casefold()
      before = before.removesuffix((name or "").casefold())  # "not red (A)"
      if name is not None and not is_denied(before, len(before)):
        rest = sentence[match.end() :]
        if options.from_end(sentence[: match.start()]) not in (None, name):
          raise _Conflict
        found.add(_option_of_letter(match[1], rest, options) or "")
  return found


def _first_option(after: str, options: Options) -> str | None:
  """The first option named after words such as "the answer is"."""
  named = options.from_answer(after)
  if named is not None:
    return named
  if small := _RE.small_letter.match(after):
    letter = options.letters.get(small[1].upper())
    return options.points.get(small[1], letter)
  for match in _RE.letter.finditer(after[:_MAX_BESIDE]):
    letter = match[1] or match[2] or match[3] or match[4]
    if is_denied(after[:_MAX_BESIDE], match.start()):
      continue
    # After a colon "A" may open a sentence, as an article.
    article = match[2] == "A" and _RE.article.match(after)
    if letter in options.letters and not article:
      return _option_of_letter(letter, after[match.end() :], options)
  mentioned = options.mentions(after) or options.points_in(after)
  return mentioned[0] if mentioned else None


def _option_of_letter(letter: str, rest: str, options: Options) -> str | None:
  """The option of a letter.

  Raises:
    _Conflict: The text beside the letter is another option's.
  """
  named = options.letters.get(letter)
  beside = rest.split("\n", 1)[0][:_MAX_BESIDE].strip(" .()*:,")
  beside = beside.removeprefix("the ")
  other = options.from_text(beside) or options.from_start(beside)
  if named is not None and other not in (None, named):
    raise _Conflict
  return named


def _from_statement(text: str, sentences: list[str], options: Options) -> Found:
  """The only option that a text without letters mentions."""
  if options.are_yes_and_no:
    return _yes_or_no(sentences, options)
  unknown = [x for x in options.letters.values() if _RE.undecidable.search(x)]
  if len(unknown) == 1 and _RE.undecidable.search("".join(sentences[-1:])):
    if not _RE.unseen.search(text):
      return unknown[0], "statement"
  if phrases.is_refusal(text) or _RE.none_of_them.search(text):
    return _NOTHING
  sentences = [_RE.condition.sub("", sentence) for sentence in sentences]
  conclusion = _RE.conclusion.split("".join(sentences[-1:]))[-1:]
  for part in (conclusion, sentences[-1:], sentences[:1], sentences):
    mentioned = options.mentions(" ".join(part))
    mentioned += options.points_in(" ".join(part))
    if len(mentioned) == 1:
      return mentioned[0], "statement"
  value, _ = find_number(text) if options.are_numbers else _NOTHING
  named = options.from_value(decimal.Decimal(value), text) if value else None
  return (named, "statement") if named else _NOTHING


def _yes_or_no(sentences: list[str], options: Options) -> Found:
  """Yes or no by the word, or by the negation in a short statement."""
  if not sentences:
    return _NOTHING
  opener = _RE.opener.match(sentences[0])
  mentioned = options.mentions(sentences[-1])
  if opener:
    return options.folded[opener[1].casefold()], "statement"
  if len(mentioned) == 1 and not phrases.is_refusal(sentences[-1]):
    return mentioned[0], "statement"
  text, first = " ".join(sentences), sentences[0]
  if (
    len(sentences) > 3
    or len(first.split()) < 4
    or not phrases.is_assertion(first)
    or not _RE.asserted.search(first)
    or _RE.option.search(text)
    or phrases.is_refusal(text)
    or phrases.has_cue(text)
  ):
    return _NOTHING
  word = "no" if _RE.negated.search(first) else "yes"
  return options.folded[word], "statement"


def find_number(text: str) -> Found:
  """The number that a free text concludes with, and the rule that found it."""
  sentences = phrases.sentences(text)
  if sentences and _RE.therefore.match(sentences[-1]):
    chosen = _concluding_number(sentences[-1])
    if _gives_several(sentences[-1]):
      return _NOTHING
    if chosen is not None and not phrases.has_cue(sentences[-1]):
      return _as_answer(chosen, "statement")
  for i in range(len(sentences) - 1, -1, -1):
    after = phrases.text_after_cue(sentences, i)
    if after is None:
      continue
    if phrases.is_refusal(after) or _gives_several(after):
      return _NOTHING
    only = numbers.only_number(after)
    if only is not None:
      return numbers.canonical(only), "cue"
    found = _find_numbers(after.rsplit("=", 1)[-1]) or _find_numbers(after)
    found = [n for n in found[:_MAX_NUMBERS] if not _follows(n, _RE.threshold)]
    if found:
      return _as_answer(found[0], "cue")
  if phrases.is_refusal(text):
    return _NOTHING
  if sentences and _RE.none_there.match(sentences[-1]):
    return "0", "statement"
  for sentence in reversed(sentences):
    if "|" in sentence:  # A row of a table is no conclusion.
      continue
    if _gives_several(sentence):
      return _NOTHING
    chosen = _concluding_number(sentence)
    if chosen is not None:
      return _as_answer(chosen, "statement")
    if _RE.range.search(sentence):
      return _NOTHING
  return _NOTHING


def _gives_several(sentence: str) -> bool:
  """True if a sentence ends on several values, as in "x = 3 or x = 5"."""
  conclusion = _RE.conclusion.split(sentence)[-1]
  return "=" in conclusion and bool(_RE.alternatives.search(conclusion))


def lists_numbers(text: str) -> bool:
  """True if a text contains several different numbers and no words."""
  if not _RE.mere_numbers.fullmatch(text):
    return False
  found = itertools.islice(numbers.numerals(text), _MAX_NUMBERS)
  return len({number.value for number in found}) > 1


def _as_answer(number: numbers.Numeral, how: str) -> Found:
  value = number.value
  return _NOTHING if value is None else (numbers.canonical(value), how)


def _is_year(number: numbers.Numeral) -> bool:
  """True for a number that looks like a year and follows a word like "in"."""
  return re.fullmatch("1[0-9]{3}|20[0-9]{2}", number.match[0]) is not None and (
    _follows(number, _RE.before_year)
  )


def _concluding_number(sentence: str) -> numbers.Numeral | None:
  """The number that a sentence concludes with."""
  if len(_RE.bracketed.findall(sentence)) > 1:
    return None
  supported, *reasons = _RE.reason.split(sentence, maxsplit=1)
  if _find_numbers(supported) and "=" not in "".join(reasons):
    sentence = supported
  parts = _RE.conclusion.split(sentence)
  if len(parts) > 1 and _find_numbers(parts[-1]):
    sentence = parts[-1]
  found = _find_numbers(sentence)
  found = found[:_MAX_NUMBERS] + found[_MAX_NUMBERS:][-_MAX_NUMBERS:]
  all_found, found = found, [n for n in found if not _is_year(n)]
  there_are = "=" not in sentence and _RE.there_are.match(sentence)
  if there_are:
    found = [n for n in found if not _follows(n, _RE.threshold)] or all_found
    words = itertools.islice(numbers.number_words(sentence), _MAX_NUMBERS)
    counts = [*found, *words]
    counts = [n for n in counts if n.start >= there_are.end()]
    counts.sort(key=lambda number: number.start)
    return next((n for n in counts if not _follows(n, _RE.threshold)), None)
  return _last_stated_number(found) or _last_stated_number(all_found)


def _last_stated_number(found: list[numbers.Numeral]) -> numbers.Numeral | None:
  """The last number after a verb such as "is", or else the last number."""
  stated = [n for n in reversed(found) if not _follows(n, _RE.threshold)]
  last = stated[0] if stated else None
  return next((n for n in stated if _follows(n, _RE.verb)), last)


def _follows(number: numbers.Numeral, pattern: re.Pattern[str]) -> bool:
  """True if the text right before a number matches the pattern."""
  text = number.match.string[max(0, number.start - 40) : number.start]
  return pattern.search(text) is not None


@functools.lru_cache(maxsize=256)
def _find_numbers(text: str) -> list[numbers.Numeral]:
  """The numbers of a text without ranges: digits, or else number words."""
  if "=" not in text:
    text = _RE.range.sub(lambda match: " " * len(match[0]), text)
  return list(numbers.numerals(text)) or list(numbers.number_words(text))
