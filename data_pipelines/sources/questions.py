"""A question about a synthetic image, its answer and other possible answers."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about an image, before options are drawn for it."""

  text: str
  answer: str
  answer_type: str  # "text", "integer", "float" or "list".
  pool: tuple[str, ...]  # Other possible answers; () for no options.
  solution: str = ""  # The working, or "" where one look answers.
  unit: str = ""
  precision: int = -1  # Decimal places of a float.


def ask_word(
  text: str, answer: str, words: Iterable[str], solution: str = ""
) -> Question:
  """Asks for one of the words."""
  pool = tuple(word for word in words if word != answer)
  return Question(text, answer, "text", pool, solution)


def ask_integer(
  text: str,
  answer: int,
  values: Iterable[int],
  solution: str = "",
  unit: str = "",
) -> Question:
  """Asks for one of the whole numbers."""
  pool = tuple(str(value) for value in values if value != answer)
  return Question(text, str(answer), "integer", pool, solution, unit)


def ask_float(
  text: str,
  parts: int,
  values: Iterable[int],
  *,
  parts_of_one: int,
  precision: int,
  solution: str = "",
  unit: str = "",
) -> Question:
  """Asks for a number given in whole parts of one, which keeps it exact."""
  answer = f"{parts / parts_of_one:.{precision}f}"
  written = (f"{value / parts_of_one:.{precision}f}" for value in values)
  pool = tuple(other for other in dict.fromkeys(written) if other != answer)
  return Question(text, answer, "float", pool, solution, unit, precision)
