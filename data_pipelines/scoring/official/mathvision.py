r"""MathVision's rules: a letter, a phrase or a box, compared to two places.

Follows the published program with its faults: `\frac{1}{2}` is 0.5, so is
0.504, and the phrase "the answer is" wins over what follows it in another line.
Its parser of LaTeX is replaced by another one, in a worker process, for
expressions of limited size.

References:
  https://github.com/mathllm/MATH-V (evaluation/).
"""

import contextlib
import math
import re

from data_pipelines import records
from data_pipelines.scoring.official.golds import official_answer
from data_pipelines.text import tables
from data_pipelines.verifier import comparisons, latex

_SAME_VALUE = f"{__name__}:same_value"
_TABLE = tables.read("data_pipelines.scoring.official", "mathvision.toml")
_BOX = re.compile(r"oxed\{(.*)\}", re.DOTALL)
_ROUND, _CURLY = re.compile(r"\(([a-e])\)"), re.compile(r"\{([a-e])\}")
# What makes a number a float for Python, even if it is whole.
_FRACTIONAL = re.compile(r"\\(?!cdot|times)|[/.]")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_SLASH = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")


def extraction(completion: str) -> str:
  """The answer in small letters, in the published program's spelling."""
  text = completion.strip()
  for letter in "ABCDE":
    ends = (f" {letter}.", f" ({letter}).")
    starts = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
    if text.endswith(ends) or text.startswith(starts):
      text = letter
  with contextlib.suppress(ValueError):
    last = text.split("is ")[-1].rstrip(".")
    float(last)
    text = last
  if "oxed{" not in text:
    for phrase in _TABLE["phrases"]:
      for cue in (phrase, phrase.replace("the", "The")):
        _, found, rest = text.rpartition(cue)
        text = rest.strip()
        if found:
          text = text.split("\n")[0].split(". ")[0]
  elif text.count("oxed{") > 1:
    text = rf"\boxed{{{text.split('oxed{')[-1]}"
  text = _CURLY.sub(r"\1", _ROUND.sub(r"\1", _clean(text.lower())))
  return text.rstrip(".").lstrip(":").strip()


def _clean(text: str) -> str:
  """The content of the box, if any, behind "=", without units and layout."""
  text = text.replace("{}", "")
  if boxes := _BOX.findall(text):
    text = boxes[-1]
  if "}" in text.split("{")[0]:
    text = text.split("}")[0]
  text = text.split("=")[-1].split(r"\approx")[-1]
  for old, new in _TABLE["replacements"]:
    text = text.replace(old, new)
  text = f"0{text}" if text[:1] == "." else text
  if "sqrt" in text:
    text = re.sub(r"\\sqrt(?!\\sqrt)([^{])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{])(?=\{)", r"\\frac{\1}", text)
  if text == "0.5":
    return r"\frac{1}{2}"
  return _SLASH.sub(r"\\frac{\1}{\2}", text) if _SLASH.fullmatch(text) else text


def is_right(extraction: str, problem: records.Problem) -> bool:
  """True if the extraction is the gold, or the text of its option."""
  option = [problem.answer] if problem.choices else []
  golds = {x.lower().strip() for x in [official_answer(problem), *option]}
  answer = extraction.lower().strip()
  if not answer or answer in golds:
    return bool(answer)
  return any(_has_value(answer, gold) for gold in sorted(golds - {""}))


def _has_value(answer: str, gold: str) -> bool:
  if _NUMBER.fullmatch(gold) and _NUMBER.fullmatch(answer):
    return round(float(gold), 2) == round(float(answer), 2)
  if not (latex.is_readable(gold) and latex.is_readable(answer)):
    return False
  comparison = comparisons.start(_SAME_VALUE, gold, answer)
  return comparisons.is_right(comparison) is True


def same_value(gold: str, answer: str) -> bool:
  """True if two texts, or tuples of texts, have one value to two places.

  Runs in a worker process: the parser may hang.
  """
  texts = [_rounded_items(text) for text in (gold, answer)]
  values = [_value(text) for text in texts]
  return texts[0] == texts[1] or (
    None not in values and len({round(x or 0, 2) for x in values}) == 1
  )


def _rounded_items(text: str) -> str:
  """A tuple or list with the value of each item; other text unchanged."""
  items = text[1:-1].split(",")
  if text[:1] + text[-1:] not in ("()", "[]") or len(items) < 2:
    return text
  for i, item in enumerate(items):
    if "infty" not in item and item not in ("a", "-a"):
      if (value := _value(item)) is None:
        return text
      items[i] = str(round(value, 2))
  return f"{text[0]}{','.join(items)}{text[-1]}"


def _value(text: str) -> int | float | None:
  """The real number that a text stands for; None if it stands for none."""
  if "circ" in text:  # The published program cannot read degrees.
    return None
  from data_pipelines.verifier import expressions  # For workers alone.

  try:
    found = expressions.read(text.replace("$", "").replace(":", "/"))
    names = {"e": math.e, "pi": math.pi}
    value = found.subs({x: names[str(x)] for x in found.free_symbols})
    is_whole = value.is_integer and not _FRACTIONAL.search(text)
    number = int(value) if is_whole else float(value)
    return number if math.isfinite(number) else None
  except Exception:  # The parser raises nearly every kind of exception.
    return None
