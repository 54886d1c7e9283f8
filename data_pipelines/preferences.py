"""Pairs of replies to one problem, of which the verifier pays just one.

Both replies reason in the same words and end in a tag, so that length and
style say nothing of which is which. Knows nothing of tokens or batches.
"""

import decimal
import re

import numpy as np

from data_pipelines import prompts, records, verifier

# Draws before a problem is given up: rounding may undo a small change.
_TRIES = 32
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)


def pair(problem: records.Problem, rng: np.random.Generator) -> tuple[str, str]:
  """A right and a wrong reply, chosen first.

  Args:
    problem: Has a public answer.
    rng: What draws the wrong answer, and nothing else.

  Returns:
    The demonstration, and the same with a wrong answer: another option, or a
    number that is no spelling of the right one.

  Raises:
    records.BadRecord: The problem has no wrong answer to offer, or its own
      answer does not verify.
  """
  chosen = prompts.demonstration(problem)
  if not verifier.verify(chosen, problem).correct:
    raise records.BadRecord(
      "answer_not_verified", f"{problem.answer!r} of {problem.pid}"
    )
  for _ in range(_TRIES):
    wrong = _wrong_answer(problem, rng)
    if wrong is None:
      break
    rejected = prompts.with_answer(problem, wrong)
    verdict = verifier.verify(rejected, problem)
    if verdict.answer is not None and not verdict.correct:
      return chosen, rejected
  raise records.BadRecord(
    "no_wrong_answer", f"none found for {problem.answer!r} of {problem.pid}"
  )


def _wrong_answer(
  problem: records.Problem, rng: np.random.Generator
) -> str | None:
  """An answer that looks like the right one; None if there is none."""
  if problem.question_type == "multi_choice":
    right = problem.answer.strip()
    others = [text for text in problem.choices if text.strip() != right]
    return others[rng.integers(len(others))] if others else None
  matches = list(_NUMBER.finditer(problem.answer))
  if not matches:
    return None
  match = matches[rng.integers(len(matches))]
  changed = _perturbed(match[0], _unit_in_last_place(problem), rng)
  return (
    problem.answer[: match.start()] + changed + problem.answer[match.end() :]
  )


def _unit_in_last_place(problem: records.Problem) -> decimal.Decimal:
  places = problem.precision if problem.answer_type == "float" else 0
  return decimal.Decimal(1).scaleb(-max(places, 0))


def _perturbed(
  number: str, unit: decimal.Decimal, rng: np.random.Generator
) -> str:
  """What a slip makes of a number: off by a few, tenfold, sign, digits."""
  value = decimal.Decimal(number)
  slips = [value + unit, value - unit, value + 2 * unit, value * 10, -value]
  if number.isdecimal():
    slips.append(decimal.Decimal(number[::-1]))
  # A count is rarely answered below nought; nor is the wrong one.
  lowest = min(value * 10, decimal.Decimal(0))
  slips = [slip for slip in slips if slip != value and slip >= lowest]
  places = len(number.partition(".")[2])
  return f"{slips[rng.integers(len(slips))]:.{places}f}"
