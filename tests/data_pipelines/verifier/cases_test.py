"""Labelled responses by kind: the fixture's, and the project's own."""

import itertools
import json

import pytest

from data_pipelines import records
from data_pipelines.text import tables
from data_pipelines.verifier import verify

CASES = tables.read("tests.data_pipelines.verifier", "verdict_cases.toml")


def problem_of(gold, kind, choices, unit, precision):
  return records.Problem(
    pid="1",
    question="",
    choices=tuple(choices or ()),
    unit=unit or "",
    precision=-1 if precision is None else int(precision),
    answer=gold,
    question_type="multi_choice" if choices else "free_form",
    answer_type="text" if choices else kind,
  )


@pytest.mark.parametrize("kind", CASES)
def test_verdicts_by_kind(kind):
  wrong = []
  for group in CASES[kind]:
    problem = problem_of(
      group["gold"],
      group.get("type", "integer"),
      group.get("choices"),
      group.get("unit"),
      group.get("precision"),
    )
    labelled = [(True, text) for text in group["right"]]
    labelled += [(False, text) for text in group["wrong"]]
    forms = group.get("forms", ["<>"])
    for (label, text), form in itertools.product(labelled, forms):
      response = form.replace("<>", text)
      verdict = verify.verify(response, problem)
      if verdict.correct != label:
        wrong.append((label, problem.answer, response, verdict.answer))
  assert not wrong


def test_the_labelled_cases_are_judged_right(fixtures):
  """Others hold more cases of the same kinds."""
  path = fixtures / "verifier_cases" / "cases.jsonl"
  rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  missed = []
  for row in rows:
    fields = [row["gold"], row["answer_type"], row["choices"], row["unit"]]
    problem = problem_of(*fields, row["precision"])
    verdict = verify.verify(row["response"], problem)
    if verdict.correct != row["should_be_correct"]:
      missed.append((row["kind"], row["response"], verdict.answer))
  assert len(rows) == 441
  assert len(missed) <= 6, missed


SPRAYS = [
  "Answer: {}. Answer: {}. Answer: {}.",
  r"\boxed{{{}}} \boxed{{{}}} \boxed{{{}}}",
  "The answer is {}. The answer is {}. The answer is {}.",
  "It is {}. It is {}. It is {}.",
  "{}\n{}\n{}",
  "{} {} {}",
  "{}, {}, {}",
  "{} or {} or {}",
  "maybe {}, maybe {}, maybe {}",
  "It might be {}. It might be {}. It might be {}.",
  "<answer>{}</answer><answer>{}</answer><answer>{}</answer>",
  "<answer>{}, {}, {}</answer>",
  "<answer>{} or {} or {}</answer>",
  "<final>{}</final><final>{}</final><final>{}</final>",
  "x = {} or x = {} or x = {}",
  "{}/{}/{}",
  "{} ({}) ({})",
  "1. {}\n2. {}\n3. {}",
]


@pytest.mark.parametrize("spray", SPRAYS)
@pytest.mark.parametrize("wrap", ["{}", "<answer>{}</answer>"])
def test_no_spray_is_right_for_two_answers(spray, wrap):
  """It is worth one guess at most."""
  names = ("dog", "cat", "horse")
  for answers, choices in (
    (("4", "7", "9"), None),
    (("12 000", "12", "0"), None),
    (names, names),
    (("A", "B", "C"), ("B", "C", "A")),
  ):
    golds = choices or [text.replace(" ", "") for text in answers]
    problems = [problem_of(x, "integer", choices, "", None) for x in golds]
    for order in itertools.permutations(answers):
      response = wrap.format(spray.format(*order))
      right = [verify.verify(response, each).correct for each in problems]
      assert sum(right) <= 1, response


@pytest.mark.parametrize(
  ("response", "answer"),
  [
    ("There are 12 apples on the left, and then", None),
    ("The answer is 12", None),
    ("12", None),
    (r"\boxed{12", None),
    ("<answer>12", None),
    (r"So \boxed{12} is what", "12"),
    ("<answer>12</answer> because", "12"),
    ("\\boxed{12} is half.\nAnswer: 13", None),
  ],
)
def test_only_a_closed_answer_of_a_truncated_completion_counts(
  response, answer
):
  problem = problem_of("12", "integer", None, "", None)
  verdict = verify.verify(response, problem, truncated=True)
  assert verdict.answer == answer
  text = problem_of("12", "text", None, "", None)
  assert verify.verify(response, text, truncated=True).correct == bool(answer)
