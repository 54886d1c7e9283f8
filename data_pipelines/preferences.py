"""Labelled replies to one problem, to learn from without sampling.

They are made, one right and the others wrong by the verifier, or read from a
file. Those made reason in the same words and end in a tag, so that length and
style say nothing of which is which. Knows nothing of tokens or batches.

A line of a file is
`{"pid": "12", "completions": [{"text": "...", "label": 1.0}, ...]}`: two
completions or more of the problem of that pid, the better with higher labels.
"""

import decimal
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from data_pipelines import prompts, records, verifier

# Draws before a problem is given up: rounding may undo a small change.
_TRIES = 32
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)


class Reply(NamedTuple):
  """What was written, and how good it is said to be."""

  text: str
  label: float


# From a problem and what draws: its replies, no more than are asked for.
type Source = Callable[
  [records.Problem, np.random.Generator], tuple[Reply, ...]
]


def drawn(count: int) -> Source:
  """Replies made from the problem: a right one, and `count - 1` wrong ones.

  Fewer where the problem has not so many different wrong answers to offer.
  """

  def replies(
    problem: records.Problem, rng: np.random.Generator
  ) -> tuple[Reply, ...]:
    return _drawn(problem, rng, count)

  return replies


def from_file(path: str | os.PathLike[str], count: int) -> Source:
  """The first `count` replies that a file has for the problem, as they stand.

  Raises:
    ValueError: The file is missing, or a line is not as it should be.
  """
  by_pid = _read(path)

  def replies(
    problem: records.Problem, rng: np.random.Generator
  ) -> tuple[Reply, ...]:
    del rng
    if problem.pid not in by_pid:
      raise records.BadRecord(
        "no_completions", f"none for {problem.pid} in {path}"
      )
    return by_pid[problem.pid][:count]

  return replies


def _read(path: str | os.PathLike[str]) -> Mapping[str, tuple[Reply, ...]]:
  by_pid: dict[str, tuple[Reply, ...]] = {}
  try:
    with open(path, encoding="utf-8") as file:
      lines = list(file)
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"data.preference_file ({str(path)!r}) must be a file of labelled "
      f"completions: {error}; name one, or leave it empty."
    ) from error
  for number, line in enumerate(lines, start=1):
    try:
      pid, replies = _parsed(line)
      if pid in by_pid:
        raise ValueError("the pid has a line already")
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"data.preference_file ({str(path)!r}) line {number} must be "
        '{"pid": "...", "completions": [{"text": "...", "label": 1.0}, ...]} '
        "with two completions or more, each pid once, not "
        f"{line.strip()[:80]!r} ({error}); mend the line."
      ) from error
    by_pid[pid] = replies
  return by_pid


def _parsed(line: str) -> tuple[str, tuple[Reply, ...]]:
  row = json.loads(line)
  replies = tuple(
    Reply(each["text"], each["label"]) for each in row["completions"]
  )
  if len(replies) < 2:
    raise ValueError("too few completions")
  for reply in replies:
    number = isinstance(reply.label, int | float)
    if not isinstance(reply.text, str) or not number:
      raise TypeError("a text must be a string, and a label a number")
    # What float32 can hold.
    if not abs(reply.label) < 1e38:
      raise ValueError("a label must be finite")
  if not isinstance(row["pid"], str | int):
    raise TypeError("a pid must be a string")
  return str(row["pid"]), replies


def _drawn(
  problem: records.Problem, rng: np.random.Generator, count: int
) -> tuple[Reply, ...]:
  chosen = prompts.demonstration(problem)
  if not verifier.verify(chosen, problem).correct:
    raise records.BadRecord(
      "answer_not_verified", f"{problem.answer!r} of {problem.pid}"
    )
  rejected: list[str] = []
  for _ in range(_TRIES * (count - 1)):
    wrong = _wrong_answer(problem, rng)
    if wrong is None:
      break
    text = prompts.with_answer(problem, wrong)
    verdict = verifier.verify(text, problem)
    if verdict.answer is None or verdict.correct or text in rejected:
      continue
    rejected.append(text)
    if len(rejected) == count - 1:
      break
  if not rejected:
    raise records.BadRecord(
      "no_wrong_answer", f"none found for {problem.answer!r} of {problem.pid}"
    )
  return (Reply(chosen, 1.0), *(Reply(text, 0.0) for text in rejected))


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
