"""Labelled replies to one problem, to learn from without sampling.

They are made, one right and the others wrong by the verifier, or read from a
file. Those made are about as long as the right one and written as it is, so
that length and style say nothing of which is which. Knows nothing of tokens or
batches.

A wrong reply is of one of these kinds:
  distractor: another option.
  perturbation: another number, as a slip makes it.
  refusal: no answer, said where the answer belongs.
  conflict: the letter of one option with the text of another.
  truncation: reasoning that goes round until it is cut, before any answer.

A line of a file is
`{"pid": "12", "completions": [{"text": "...", "label": 1.0}, ...]}`: two
completions or more of the problem of that pid, the better with higher labels.
"""

import dataclasses
import decimal
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines import records
from data_pipelines.text import chat_prompts
from data_pipelines.verifier import verify

KINDS = ("distractor", "perturbation", "refusal", "conflict", "truncation")
# These differ from the right reply in the answer alone.
DEFAULT_KINDS = ("distractor", "perturbation")
# What options have, and what only answers without them have.
_OF_OPTIONS, _OF_NUMBERS = ("distractor", "conflict"), ("perturbation",)

# Draws before a problem is given up: rounding may undo a small change.
_TRIES = 32
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
# Of all lengths, for one is chosen that is about as long as the answer.
_REFUSALS = (
  "N/A",
  "unknown",
  "unclear",
  "not given",
  "not possible to say",
  "impossible to determine",
  "nothing that can be determined",
  "not possible to determine from this",
  "impossible to determine from the picture",
  "not something that the picture gives any answer to",
  "impossible to determine without more information than this",
  "not possible to determine, for the picture does not show what is needed",
)
_NUM_NEAREST = 3


class Reply(NamedTuple):
  """What was written, and how good it is said to be."""

  text: str
  label: float


# From a problem and what draws: its replies, no more than are asked for.
type Source = Callable[
  [records.Problem, np.random.Generator], tuple[Reply, ...]
]


def drawn(
  count: int,
  *,
  kinds: Sequence[str] = DEFAULT_KINDS,
  template: chat_prompts.Template = chat_prompts.TAGGED,
) -> Source:
  """Replies made from the problem: a right one, and `count - 1` wrong ones.

  Fewer where the problem has not so many different wrong replies to offer.

  Args:
    count: Replies of a group.
    kinds: Which of `KINDS` are drawn, each that the problem has equally often.
      With "conflict" every reply names an option by its letter and its text, or
      a letter alone would give the conflict away.
    template: How replies are written.
  """

  def replies(
    problem: records.Problem, rng: np.random.Generator
  ) -> tuple[Reply, ...]:
    lettered = "conflict" in kinds and problem.question_type == "multi_choice"
    writer = _Writer(problem, template, lettered)
    return _drawn(writer, rng, count, kinds)

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


@dataclasses.dataclass(frozen=True)
class _Writer:
  """How the replies of one group are written.

  Attributes:
    problem: What they answer.
    template: What they look like.
    lettered: Whether an option is named by its letter too.
  """

  problem: records.Problem
  template: chat_prompts.Template
  lettered: bool

  def option(self, letter: int, text: int) -> str:
    """An answer that names the options of these indices."""
    choice = self.problem.choices[text]
    return f"({chr(65 + letter)}) {choice}" if self.lettered else choice

  def reply(self, answer: str, reasoning: str | None = None) -> str:
    """The worked solution, or other reasoning, and the answer."""
    if reasoning is None:
      reasoning = self.problem.solution
    return chat_prompts.with_answer(reasoning, answer, template=self.template)

  @property
  def chosen(self) -> str:
    """The right reply."""
    answer = verify.final_answer(self.problem)
    if self.lettered and answer in self.problem.choices:
      right = self.problem.choices.index(answer)
      answer = self.option(right, right)
    return self.reply(answer)


def _drawn(
  writer: _Writer, rng: np.random.Generator, count: int, kinds: Sequence[str]
) -> tuple[Reply, ...]:
  problem, chosen = writer.problem, writer.chosen
  if not verify.verify(chosen, problem).correct:
    raise records.BadRecord(
      "answer_not_verified", f"{problem.answer!r} of {problem.pid}"
    )
  is_choice = problem.question_type == "multi_choice"
  others = _OF_NUMBERS if is_choice else _OF_OPTIONS
  left = [kind for kind in KINDS if kind in kinds and kind not in others]
  rejected: list[str] = []
  for _ in range(_TRIES * (count - 1)):
    if not left or len(rejected) == count - 1:
      break
    kind = left[rng.integers(len(left))]
    text = _MAKERS[kind](writer, rng)
    if text is None:
      left.remove(kind)
      continue
    verdict = verify.verify(text, problem)
    answers = verdict.answer is not None or kind not in DEFAULT_KINDS
    if answers and not verdict.correct and text not in rejected:
      rejected.append(text)
  if not rejected:
    raise records.BadRecord(
      "no_wrong_answer", f"none found for {problem.answer!r} of {problem.pid}"
    )
  return (Reply(chosen, 1.0), *(Reply(text, 0.0) for text in rejected))


def _wrong_option(
  problem: records.Problem, rng: np.random.Generator
) -> int | None:
  """The index of an option that is not right; None if all are."""
  right = problem.answer.strip()
  others = [i for i, x in enumerate(problem.choices) if x.strip() != right]
  return others[rng.integers(len(others))] if others else None


def _distractor(writer: _Writer, rng: np.random.Generator) -> str | None:
  wrong = _wrong_option(writer.problem, rng)
  return None if wrong is None else writer.reply(writer.option(wrong, wrong))


def _perturbation(writer: _Writer, rng: np.random.Generator) -> str | None:
  problem = writer.problem
  matches = list(_NUMBER.finditer(problem.answer))
  if not matches:
    return None
  match = matches[rng.integers(len(matches))]
  changed = _perturbed(match[0], _unit_in_last_place(problem), rng)
  return writer.reply(
    problem.answer[: match.start()] + changed + problem.answer[match.end() :]
  )


def _refusal(writer: _Writer, rng: np.random.Generator) -> str | None:
  """One of those that are nearest to the right reply in length.

  What the words cost more than the answer is cut off the reasoning's end.
  """
  solution, length = writer.problem.solution, len(writer.chosen)
  texts = []
  for words in _REFUSALS:
    excess = max(0, len(writer.reply(words)) - length)
    texts.append(writer.reply(words, _without_end(solution, excess)))
  texts.sort(key=lambda text: (abs(len(text) - length), text))
  return texts[rng.integers(_NUM_NEAREST)]


def _without_end(text: str, length: int) -> str:
  """The text without so many characters, and without half a word."""
  if not length:
    return text
  kept = text[: max(0, len(text) - length) + 1]
  return kept.rpartition(" ")[0].rstrip()


def _conflict(writer: _Writer, rng: np.random.Generator) -> str | None:
  wrong = _wrong_option(writer.problem, rng)
  if wrong is None:
    return None
  right = writer.problem.choices.index(writer.problem.answer)
  letter, text = (right, wrong) if rng.integers(2) else (wrong, right)
  return writer.reply(writer.option(letter, text))


def _truncation(writer: _Writer, rng: np.random.Generator) -> str | None:
  """As long as the right reply: solution or question, over and over."""
  problem, length = writer.problem, len(writer.chosen)
  said = [text for text in (problem.solution, problem.question) if text]
  if not said:
    return None
  text = said[rng.integers(len(said))]
  around = f"{text} " * (length // len(text) + 1)
  return f"{writer.template.reasoning[0]}{around}"[:length].rstrip()


_MAKERS: Mapping[str, Callable[[_Writer, np.random.Generator], str | None]] = {
  "distractor": _distractor,
  "perturbation": _perturbation,
  "refusal": _refusal,
  "conflict": _conflict,
  "truncation": _truncation,
}


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
