"""MathVista's own scoring, as far as possible without a language model.

For comparison only, never for training: every extraction, even an empty one,
counts as the option with the most similar spelling, so that an empty answer is
right in almost a third of the multiple-choice questions. Follows the published
rules with their faults: an integer is truncated and not rounded, and an option
that is itself "(b)" is read as the letter B.

References:
  Section 3.4 and appendix of https://arxiv.org/abs/2310.02255; the program:
  https://github.com/lupantech/MathVista (evaluation/).
"""

import re

from rapidfuzz.distance import Levenshtein

from data_pipelines import records

_LETTER = re.compile(r"\(([a-zA-Z])\)")
# The first group is atomic, so that a search takes time linear in the text.
_QUOTED = re.compile(r'(?m)^(?>.*?The answer is ")(.*)"\.')


def extraction(completion: str) -> str:
  """The answer in a completion, without a language model.

  Where the published program would ask a language model, the extraction is the
  whole completion. `normalize` then reads it as a number, or a bracketed letter
  anywhere in it, or else its spelling.
  """
  quoted = _QUOTED.search(completion)
  return quoted[1] if quoted else completion


def normalize(extraction: str, problem: records.Problem) -> str | None:
  """The extraction in the spelling of an answer; None if it is no number.

  For a multiple-choice question always one of the options.
  """
  if problem.question_type == "multi_choice":
    return _option(extraction.strip(), problem.choices)
  try:
    if problem.answer_type == "integer":
      return str(int(float(extraction)))
    if problem.answer_type == "float":
      return str(round(float(extraction), problem.precision))
  except (ValueError, OverflowError):
    return None
  return extraction


def is_right(extraction: str, problem: records.Problem) -> bool:
  """True if the normalized extraction is the problem's public answer."""
  return (
    problem.is_checkable and normalize(extraction, problem) == problem.answer
  )


def _option(extraction: str, choices: tuple[str, ...]) -> str:
  letter = _LETTER.search(extraction)
  if letter:
    extraction = letter[1].upper()
  lettered = {chr(ord("A") + i): text for i, text in enumerate(choices)}
  if extraction in lettered:
    return lettered[extraction]
  # The first of several equally similar options.
  return min(choices, key=lambda text: Levenshtein.distance(text, extraction))
