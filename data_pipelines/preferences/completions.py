"""Labelled completions of a problem, for training without sampling.

They are read from a file, or came with the problem, or are synthesized, one
right and the others wrong. Synthesized completions have about the same length
and the same style, so that neither reveals the label.

Kinds of wrong completions:
  distractor: another option.
  perturbation: another number, such as a slip would give.
  refusal: a phrase without an answer in the place of the answer.
  conflict: the letter of one option with the text of another.
  truncation: repeated reasoning that is cut before any answer.

docs/data.md shows a line of a file.
"""

import dataclasses
import decimal
import functools
import io
import os
import re
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines import records
from data_pipelines.text import chat_prompts, tables, untrusted
from data_pipelines.verifier import verify

KINDS = ("distractor", "perturbation", "refusal", "conflict", "truncation")
# These differ from the right completion only in the answer.
DEFAULT_KINDS = ("distractor", "perturbation")
# Kinds for multiple choice only, and for numbers only.
_CHOICE_KINDS, _NUMBER_KINDS = ("distractor", "conflict"), ("perturbation",)
# Answer types, apart from options, of which wrong completions can be made.
_ALTERED = ("integer", "float", "list")

# Draws per wrong completion, because rounding may undo a small change.
_TRIES = 32
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
# In many lengths, because one about as long as the answer is chosen.
_TABLE = tables.read("data_pipelines.preferences", "refusals.toml")
_NUM_NEAREST = 3


type Group = tuple[records.LabelledCompletion, ...]
# Gives the labelled completions of a problem.
type Source = Callable[[records.Problem, np.random.Generator], Group]


def synthesize(
  count: int,
  *,
  kinds: Sequence[str] = DEFAULT_KINDS,
  template: chat_prompts.Template = chat_prompts.TAGGED,
  has_reasoning: bool = True,
) -> Source:
  """Gives the problem's own completions, or makes some from its answer.

  It takes the best of its own completions, then the worst, the second best, and
  so on, if their labels differ. Else it makes one right completion and up to
  `count - 1` wrong ones. With "conflict" every completion gives letter and text
  of an option, because a letter alone would reveal the conflict. Without
  reasoning, it makes answers alone.
  """
  options = {"count": count, "kinds": kinds, "template": template}
  options |= {"has_reasoning": has_reasoning}
  return functools.partial(_synthesize_group, **options)


def demonstration(
  problem: records.Problem, *, template: chat_prompts.Template
) -> str:
  """The best of the problem's own completions, or else its worked answer.

  A lone completion counts with a positive label.
  """
  labels = [label for _, label in problem.completions]
  if labels and (max(labels) > 0 or max(labels) > min(labels)):
    return max(problem.completions, key=lambda each: each.label).text
  if problem.answer:
    return chat_prompts.demonstration(problem, template=template)
  raise records.BadRecord(
    "no_demonstration",
    f"{problem.pid} has neither an answer nor a completion with a label above "
    "0; give it one of the two",
  )


def _rank_own(problem: records.Problem, count: int) -> Group:
  """The problem's own completions; () unless texts and labels differ."""
  ranked = sorted(problem.completions, key=lambda each: -each.label)
  if any(len(set(values)) < 2 for values in zip(*ranked, strict=True)):
    return ()
  ends = zip(ranked, reversed(ranked), strict=True)
  order = [each for pair in ends for each in pair]
  return tuple(order[: min(count, len(ranked))])


def from_file(path: str | os.PathLike[str], count: int) -> Source:
  """Takes the first `count` completions of each problem from a file."""
  by_pid = _read(path)

  def source(problem: records.Problem, rng: np.random.Generator) -> Group:
    del rng
    if problem.pid in by_pid:
      return by_pid[problem.pid][:count]
    detail = f"none for {problem.pid} in {path}"
    raise records.BadRecord("no_completions", detail)

  return source


def _read(path: str | os.PathLike[str]) -> dict[str, Group]:
  by_pid: dict[str, Group] = {}
  try:
    content = untrusted.read_bytes(path, untrusted.MAX_JSON_BYTES)
    lines = list(io.StringIO(content.decode("utf-8"), newline=None))
  except (OSError, ValueError) as error:
    raise ValueError(
      f"data.preference_file ({str(path)!r}) must be a file of labelled "
      f"completions: {error}; name one, or leave the setting empty."
    ) from error
  for number, line in enumerate(lines, start=1):
    try:
      pid, group = _parse_line(line)
      if pid in by_pid:
        raise ValueError("an earlier line has the same pid")
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"data.preference_file ({str(path)!r}) line {number} must be "
        '{"pid": "...", "completions": [{"text": "...", "label": 1.0}, ...]} '
        "with two completions or more, each pid once, not "
        f"{line.strip()[:80]!r} ({error}); correct the line."
      ) from error
    by_pid[pid] = group
  return by_pid


def _parse_line(line: str) -> tuple[str, Group]:
  row = untrusted.parse_json(line, "it")
  pairs = [(x["text"], x["label"]) for x in row["completions"]]
  if len(pairs) < 2:
    raise ValueError("too few completions")
  group = records.to_completions("completions", pairs)
  for text, _ in group:
    records.check_text("text", text)
  if not isinstance(row["pid"], str | int):
    raise TypeError("a pid must be a string")
  return str(row["pid"]), group


@dataclasses.dataclass(frozen=True)
class _Writer:
  """Writes the completions of one problem.

  A method for each of `KINDS` draws a wrong one, or gives None if there is
  none.
  """

  problem: records.Problem
  template: chat_prompts.Template
  lettered: bool  # True to give an option's letter beside its text.
  rng: np.random.Generator

  def write(self, answer: str) -> str:
    """Writes the answer after the worked solution."""
    solution, template = self.problem.solution, self.template
    return chat_prompts.with_answer(solution, answer, template=template)

  def _option(self, letter: int, text: int) -> str:
    """An answer with the letter of one option and the text of another."""
    choice = self.problem.choices[text]
    return f"({chr(65 + letter)}) {choice}" if self.lettered else choice

  @property
  def right_completion(self) -> str:
    """The completion with the right answer."""
    answer = self.problem.answer
    if self.lettered and answer in self.problem.choices:
      right = self.problem.choices.index(answer)
      answer = self._option(right, right)
    return self.write(answer)

  def _wrong_option(self) -> int | None:
    """Draws the index of a wrong option; None if all options are right."""
    right, choices = self.problem.answer.strip(), self.problem.choices
    others = [i for i, x in enumerate(choices) if x.strip() != right]
    return others[self.rng.integers(len(others))] if others else None

  def distractor(self) -> str | None:
    wrong = self._wrong_option()
    return None if wrong is None else self.write(self._option(wrong, wrong))

  def conflict(self) -> str | None:
    wrong = self._wrong_option()
    if wrong is None:
      return None
    right = self.problem.choices.index(self.problem.answer)
    pair = (right, wrong) if self.rng.integers(2) else (wrong, right)
    return self.write(self._option(*pair))

  def perturbation(self) -> str | None:
    problem, rng = self.problem, self.rng
    matches = list(_NUMBER.finditer(problem.answer))
    if not matches:
      return None
    match = matches[rng.integers(len(matches))]
    places = problem.precision if problem.answer_type == "float" else 0
    unit_in_last_place = decimal.Decimal(1).scaleb(-max(places, 0))
    changed = _perturb(match[0], unit_in_last_place, rng)
    before = problem.answer[: match.start()]
    return self.write(before + changed + problem.answer[match.end() :])

  def refusal(self) -> str:
    """Draws one of the refusals closest in length to the right completion.

    A refusal longer than the answer shortens the end of the reasoning.
    """
    solution, length = self.problem.solution, len(self.right_completion)
    texts = []
    for words in _TABLE["refusals"]:
      kept = solution
      excess = len(self.write(words)) - length
      if excess > 0:  # Cut at a word boundary.
        kept = kept[: max(0, len(kept) - excess) + 1].rpartition(" ")[0]
        kept = kept.rstrip()
      text = chat_prompts.with_answer(kept, words, template=self.template)
      texts.append(text)
    texts.sort(key=lambda text: (abs(len(text) - length), text))
    return texts[self.rng.integers(_NUM_NEAREST)]

  def truncation(self) -> str | None:
    """Repeats the solution or the question up to the right length."""
    problem, length = self.problem, len(self.right_completion)
    texts = [text for text in (problem.solution, problem.question) if text]
    if not texts:
      return None
    text = texts[self.rng.integers(len(texts))]
    repeated = f"{text} " * (length // len(text) + 1)
    return f"{self.template.reasoning[0]}{repeated}"[:length].rstrip()


def _synthesize_group(
  problem: records.Problem,
  rng: np.random.Generator,
  *,
  count: int,
  kinds: Sequence[str],
  template: chat_prompts.Template,
  has_reasoning: bool,
) -> Group:
  if own := _rank_own(problem, count):
    return own
  if not has_reasoning:
    problem = dataclasses.replace(problem, solution="")
  is_choice = problem.question_type == "multi_choice"
  if not is_choice and problem.answer_type not in _ALTERED:
    raise records.BadRecord(
      "no_completions",
      f"{problem.pid} has no different completions with different labels, and "
      f"no wrong ones can be made of its {problem.answer_type} answer; give it "
      "a chosen and a rejected completion, or name a data.preference_file",
    )
  writer = _Writer(problem, template, "conflict" in kinds and is_choice, rng)
  chosen = writer.right_completion
  detail = f"{problem.answer!r} of {problem.pid}"
  if not verify.verify(chosen, problem).correct:
    raise records.BadRecord("answer_not_verified", detail)
  others = _NUMBER_KINDS if is_choice else _CHOICE_KINDS
  left = [kind for kind in KINDS if kind in kinds and kind not in others]
  rejected: list[str] = []
  for _ in range(_TRIES * (count - 1)):
    if not left or len(rejected) == count - 1:
      break
    kind = left[rng.integers(len(left))]
    text = getattr(writer, kind)()
    if text is None:
      left.remove(kind)
      continue
    verdict = verify.verify(text, problem)
    answers = verdict.answer is not None or kind not in DEFAULT_KINDS
    if answers and not verdict.correct and text not in rejected:
      rejected.append(text)
  if not rejected:
    raise records.BadRecord("no_wrong_answer", f"none found for {detail}")
  wrong = (records.LabelledCompletion(text, 0.0) for text in rejected)
  return (records.LabelledCompletion(chosen, 1.0), *wrong)


def _perturb(
  number: str, unit: decimal.Decimal, rng: np.random.Generator
) -> str:
  """Draws a slip: off by one or two units, tenfold, sign, digits reversed."""
  value = decimal.Decimal(number)
  slips = [value + unit, value - unit, value + 2 * unit, value * 10, -value]
  if number.isdecimal():
    slips.append(decimal.Decimal(number[::-1]))
  # A wrong count is not negative either.
  lowest = min(value * 10, decimal.Decimal(0))
  slips = [slip for slip in slips if slip != value and slip >= lowest]
  places = len(number.partition(".")[2])
  return f"{slips[rng.integers(len(slips))]:.{places}f}"
