r"""Finds an answer that is a text or an expression, and compares texts.

The most explicit answer counts: a tag, a field, a box, an answer line, a bare
answer, and last the formula that the last sentence ends on. Different answers
in tags or fields are no answer; several boxes side by side are one list.
"""

import unicodedata

from data_pipelines.text import tables
from data_pipelines.verifier import latex, numbers, options, phrases

_RE = tables.patterns("written")
# A longer answer is none. The answers of scorers may be whole grids.
_MAX_LENGTH = {"text": 1000, "expression": latex.MAX_LENGTH, "scored": 20_000}
_NONE = (None, "none")
_MAX_BARE = 200
# "Unknown" may be an answer; a longer refusal is none.
_MAX_WORD = 20


def find(text: str, kind: str) -> tuple[str | None, str]:
  """The answer in a completion without a tag, and the rule that found it.

  `kind` is "text", "expression" or "scored".
  """
  found = {clean(field, kind) for field in fields(text)}
  if found:
    return (found.pop() if len(found) == 1 else None), "json"
  boxes, end = last_boxes(text)
  if line := _RE.answer_line.findall(text[end:]) if boxes else None:
    return clean(line[-1], kind), "cue"
  if boxes:
    return clean(", ".join(boxes), kind), "boxed"
  if end:  # The last box is not closed.
    return _NONE
  text = numbers.open_headings(_RE.token.sub("", text)).strip()
  # A formula that is displayed, as one in a line.
  text = _RE.display.sub(
    lambda x: f"${' '.join((x[1] or x[2]).split())}$", text
  )
  parts = phrases.sentences(text)
  for i in range(len(parts) - 1, -1, -1):
    after = phrases.text_after_cue(parts, i)
    if after is not None:
      if phrases.is_refusal(after):
        return _NONE
      return clean(_read_announcement(after), kind), "cue"
  if kind == "scored":  # A scorer reads the whole of an answer, such as a grid.
    return clean(text, kind), "bare"
  if phrases.is_refusal(text) and (len(parts) > 1 or len(text) > _MAX_WORD):
    return _NONE
  if "\n" not in text and len(text) <= _MAX_BARE and text[-1:] != "?":
    if kind == "text" or _is_formula(text):
      return clean(text, kind), "bare"
  bold = bold_parts(text)
  if len(bold) == 1 and (kind == "text" or _is_formula(min(bold))):
    return clean(bold.pop(), kind), "bold"
  if kind == "expression" and parts:
    return _last_formula(text, parts[-1])
  return _NONE


def clean(text: str, kind: str) -> str | None:
  """The answer in a text that should contain nothing else, else None."""
  text = text.strip()
  if kind == "scored":
    return text if 0 < len(text) <= _MAX_LENGTH[kind] else None
  if len(text) > 2 * _MAX_LENGTH[kind]:
    return None
  if boxes := last_boxes(text)[0]:
    text = ", ".join(boxes)
  text = text.replace("**", "") if kind == "text" else text.strip("*` \n")
  match = numbers.LEAD_IN.match(text)
  if match and match.end() < len(text):
    text = text[match.end() :]
  text = text.strip(" \t\n\"'`")
  if kind == "expression":
    if not _is_formula(text) and (found := _last_formula(text, text)[0]):
      return found
    text = latex.normalize(text)
  return text if 0 < len(text) <= _MAX_LENGTH[kind] else None


def same_text(first: str, second: str) -> bool:
  """True if two texts differ only in case, articles, markup and spelling."""
  one, two = text_key(first), text_key(second)
  return one == two or (
    # A number alone may be a word: "three". Units and dates are exact.
    " " not in one + two
    and (value := numbers.only_number(one)) is not None
    and value == numbers.only_number(two)
    and not _RE.is_exact.search(one + " " + two)
  )


def text_key(text: str) -> str:
  """A text without case, articles, markup, quotes and final punctuation."""
  plain = unicodedata.normalize("NFKC", text).casefold()
  plain = _RE.text_command.sub(r"\1", plain)
  plain = _RE.markup.sub("", plain).translate(_QUOTES)
  plain = " ".join(_RE.article.sub(" ", f" {plain} ").split())
  plain = plain.strip(" \"'.,;:!?")
  return plain or " ".join(text.split())


_QUOTES = str.maketrans(
  "\u201c\u201d\u2018\u2019\u2013\u2014\u2212", "\"\"''---"
)


def fields(text: str) -> list[str]:
  """The values of fields "answer" in JSON."""
  found = _RE.field.findall(text)
  return [next(filter(None, x), "").replace("\\\\", "\\") for x in found]


def bold_parts(text: str) -> set[str]:
  """The parts in bold type of lines that assert something."""
  lines = [x for x in text.split("\n") if "**" in x and phrases.is_assertion(x)]
  return {part for line in lines for part in _RE.bold.findall(line)}


def last_boxes(text: str) -> tuple[list[str], int]:
  r"""The content of the last \boxed{...}, and of those right beside it.

  Also gives the index after the last box. A box that is not closed has no
  content, yet an index.
  """
  found: list[str] = []
  end, last = len(text), 0
  while len(found) < 16:
    start = max(text.rfind(name, 0, end) for name in _BOXES)
    if start < 0:
      break
    inside = text.index("{", start) + 1
    close = latex.find_end(text, inside) + 1
    last = last or max(close, 1)
    if not close:
      return found, last
    if found and not _RE.between_boxes.fullmatch(text[close:end]):
      break
    if content := text[inside : close - 1].strip():
      found.insert(0, content)
    end = start
  return found, last


_BOXES = r"\boxed{", r"\fbox{", r"\framebox{"


def _read_announcement(after: str) -> str:
  """The answer in the text after "the answer is"."""
  after = after.strip(" *:\uff1a")
  match = _RE.formula.match(after)
  if match and _RE.explains.match(after[match.end() :]):
    return match[0]
  return _RE.reason.split(after, maxsplit=1)[0]


def _is_formula(text: str) -> bool:
  """True for a text without words."""
  normal = latex.normalize(text)
  return bool(normal) and not _RE.prose.search(normal)


def _last_formula(text: str, sentence: str) -> tuple[str | None, str]:
  """The formula that the last sentence states, or the last line."""
  line = text.rpartition("\n")[2].strip()
  if line != text and _is_formula(line):
    return clean(line, "expression"), "statement"
  found = list(_RE.formula.finditer(sentence))
  if not phrases.is_assertion(sentence) or phrases.is_refusal(sentence):
    return _NONE
  if not found:
    match = _RE.stated.match(sentence[-400:])
    if match is None or not _is_formula(match[1]):
      return _NONE
    return clean(match[1], "expression"), "statement"
  texts, start = [found[-1][0]], found[-1].start()
  for each in reversed(found[:-1]):  # "x = 1 and x = 2" is one list.
    if not _RE.joined.fullmatch(sentence[each.end() : start]):
      break
    texts, start = [each[0], *texts], each.start()
  is_only = len(found) == len(texts) or _RE.states.search(sentence[:start])
  if not is_only or options.is_denied(sentence, start):
    return _NONE
  return clean(", ".join(texts), "expression"), "statement"


def yes_or_no(answer: str) -> tuple[str, tuple[str, str]] | None:
  """An answer that is yes, no, true or false, and the two options it is of."""
  pairs = ("Yes", "No"), ("True", "False")
  found = ((x, pair) for pair in pairs for x in pair)
  return next((x for x in found if x[0].casefold() == text_key(answer)), None)
