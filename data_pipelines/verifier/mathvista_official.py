"""MathVista's own scoring, as far as it goes without a language model.

For comparison only, never to train on: whatever an extraction says, even
nothing, is taken for the option that is spelt most like it, so that an empty
answer is right in almost a third of the multiple-choice questions. Follows the
published rules, their faults included: an integer is cut off and not rounded,
and an option that is itself "(b)" is read as the letter B.

References:
  Section 3.4 and appendix of https://arxiv.org/abs/2310.02255; the program:
  https://github.com/lupantech/MathVista (evaluation/).
  The distance: Myers 1999, https://doi.org/10.1145/316542.316550, in the form
  of Hyyro 2003, "A bit-vector algorithm for computing Levenshtein and Damerau
  edit distances".
"""

import re

from data_pipelines import records

_LETTER = re.compile(r"\(([a-zA-Z])\)")
_OPENING, _CLOSING = 'The answer is "', '".'


def extraction(response: str, problem: records.Problem) -> str:
  """The answer in a response, where finding it needs no language model.

  What the published program would send to one is its own extraction here, as
  is an option's text: the normaliser then reads a bracketed letter anywhere in
  it, else its spelling.
  """
  try:
    if problem.answer_type == "integer":
      return str(int(response))
    if problem.answer_type == "float":
      return str(float(response))
  except ValueError:
    pass
  quoted = _quoted(response)
  return response if quoted is None else quoted


def _quoted(response: str) -> str | None:
  """What stands in `The answer is "..."`, up to the last end of its line."""
  for line in response.split("\n"):
    _, opened, rest = line.partition(_OPENING)
    inside, closed, _ = rest.rpartition(_CLOSING)
    if opened and closed:
      return inside
  return None


def normalized(extraction: str, problem: records.Problem) -> str | None:
  """The extraction as an answer is spelt; None for what is no number.

  Of a multiple-choice question it is always an option.
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
  """Whether the extraction is normalised to exactly the answer.

  Without a public answer nothing is right.
  """
  return (
    problem.has_answer and normalized(extraction, problem) == problem.answer
  )


def _option(extraction: str, choices: tuple[str, ...]) -> str:
  letter = _LETTER.search(extraction)
  if letter:
    extraction = letter[1].upper()
  lettered = {chr(ord("A") + i): text for i, text in enumerate(choices)}
  if extraction in lettered:
    return lettered[extraction]
  # Of equals the first.
  return min(choices, key=lambda text: edit_distance(text, extraction))


def edit_distance(first: str, second: str) -> int:
  """The fewest insertions, deletions and changes that make one the other.

  A column of the table of distances is held as two integers, whose bits say
  where it goes up and where down: linear in `second` while `first` is short.
  """
  where: dict[str, int] = {}
  for i, char in enumerate(first):
    where[char] = where.get(char, 0) | 1 << i
  ones, last = (1 << len(first)) - 1, 1 << len(first) >> 1
  up, down, distance = ones, 0, len(first)
  for char in second:
    same = where.get(char, 0)
    diagonal = (((same & up) + up) ^ up) | same | down
    right_up, right_down = down | ~(diagonal | up), up & diagonal
    distance += bool(right_up & last) - bool(right_down & last)
    right_up, right_down = right_up << 1 | 1, right_down << 1
    up = (right_down | ~(diagonal | right_up)) & ones
    down = right_up & diagonal & ones
  return distance if first else len(second)
