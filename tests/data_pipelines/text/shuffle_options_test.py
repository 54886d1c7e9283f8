"""In another order the letters move; the answer and the texts stay."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.sources import files
from data_pipelines.sources.drawn import synthetic
from data_pipelines.text import shuffle_options
from data_pipelines.verifier import verify

SPEC = synthetic.Spec(
  num_problems=200,
  seed=3,
  difficulty=3,
  kinds=synthetic.KINDS,
  image_size=32,
  multi_choice_share=0.7,
  min_options=2,
  max_options=8,
)


def make_problem(
  choices=("red", "blue", "green"), question="Which colour?", solution=""
):
  problem = records.Problem(
    pid="1",
    question=question,
    choices=tuple(choices),
    unit="",
    precision=-1,
    answer=choices[0] if choices else "3",
    question_type="multi_choice" if choices else "free_form",
    answer_type="text" if choices else "integer",
    query="",
    solution=solution,
    metadata={},
  )
  query = records.official_query(problem)
  return dataclasses.replace(problem, query=query)


def shuffled(problem, seed=0):
  return shuffle_options.shuffle(problem, np.random.default_rng(seed))


@pytest.fixture(scope="module", params=["fixture", "synthetic"])
def problems(request):
  """All answered multiple-choice problems of a source."""
  if request.param == "synthetic":
    found = list(synthetic.problems(SPEC))
  else:
    folder = request.getfixturevalue("fixtures") / "mathvista_schema"
    rows = files.find(folder).readers["testmini"]()
    found = [records.from_result(row.values) for row in rows]
  return [p for p in found if p.choices and p.is_checkable]


def letter_of(problem, text):
  return chr(65 + problem.choices.index(text))


def test_the_letter_of_the_answer_is_right_and_no_other(problems):
  moved = 0
  for seed, problem in enumerate(problems):
    changed = shuffled(problem, seed)
    gold = letter_of(changed, problem.answer)
    moved += gold != letter_of(problem, problem.answer)
    for index, text in enumerate(changed.choices):
      for written in ("<answer>{}</answer>", "The answer is ({})."):
        reply = written.format(chr(65 + index))
        right = text.strip() == problem.answer.strip()
        assert verify.verify(reply, changed).correct == right, (reply, text)
  # The right one of n options keeps its letter once in n.
  assert moved > len(problems) / 3


def test_nothing_but_the_order_and_the_query_changes(problems):
  for seed, problem in enumerate(problems):
    changed = shuffled(problem, seed)
    assert sorted(changed.choices) == sorted(problem.choices)
    same = {"choices": problem.choices, "query": problem.query}
    assert dataclasses.replace(changed, **same) == problem


def test_the_query_is_the_official_one_with_its_option_lines_moved(problems):
  for seed, problem in enumerate(problems):
    changed = shuffled(problem, seed)
    assert changed.query == records.official_query(changed)
    # By hand: the lines of the options are the last of the query.
    ahead = problem.query.rpartition("\nChoices:\n")[0]
    lines = [
      f"({letter}) {text}"
      for letter, text in zip("ABCDEFGH", changed.choices, strict=False)
    ]
    assert changed.query == "\n".join([ahead, "Choices:", *lines]).strip()


def test_most_problems_can_be_shuffled(problems):
  fixed = sum(map(shuffle_options.is_fixed, problems))
  assert fixed <= 0.15 * len(problems)


def test_every_order_is_as_likely_as_another():
  problem, draws = make_problem(), 6000
  orders = collections.Counter(
    shuffled(problem, seed).choices for seed in range(draws)
  )
  assert set(orders) == set(itertools.permutations(problem.choices))
  # Six orders, 1000 each, with a standard deviation of 29.
  assert all(abs(count - draws / 6) < 150 for count in orders.values())


@pytest.mark.parametrize(
  "problem",
  [
    make_problem(choices=()),
    make_problem(choices=("red",)),
    make_problem(question="Is option B the tallest?"),
    make_problem(question="Which is like figure (A)?"),
    make_problem(question="Which is like Figure B?"),
    make_problem(question="Which is like figure (b)?"),
    make_problem(question="Which? (A) or (B)"),
    make_problem(question="Which?\nA) the first\nB) the second"),
    make_problem(question="Is the first option right?"),
    make_problem(question="选项A是什么颜色?"),
    make_problem(solution="It is red, so the answer is A."),
    make_problem(solution="Therefore B."),
    make_problem(solution="Option A is right."),
    make_problem(solution="It is red. A"),
    make_problem(choices=("A", "B", "C")),
    make_problem(choices=("B)", "A)", "C)")),
    make_problem(choices=("Person A", "Person B")),
    make_problem(choices=("red", "blue", "A and B")),
    make_problem(choices=("red", "blue", "None of the above")),
    make_problem(choices=("red", "blue", "both")),
    make_problem(choices=("red", "blue", "以上都不是")),
    dataclasses.replace(make_problem(), query="Which? A: red, B: blue"),
    make_problem(choices=("<image>", "<image>", "a square")),
  ],
  ids=lambda p: f"{p.question} {p.choices} {p.solution}"[:60],
)
def test_a_problem_whose_words_depend_on_the_order_keeps_it(problem):
  assert shuffle_options.is_fixed(problem)
  assert all(shuffled(problem, seed) is problem for seed in range(8))


@pytest.mark.parametrize(
  "problem",
  [
    make_problem(question="In triangle ABC, how long is AB?"),
    make_problem(question="Sets A and B are shown. How large is A?"),
    make_problem(question="Which option is correct?"),
    make_problem(question="What does the figure show?"),
    make_problem(solution="A ball is red, so is a bat."),
    make_problem(choices=("A ball falls", "a bat flies")),
    make_problem(choices=("P", "Q", "R")),
    make_problem(choices=("CO2", "H2O")),
  ],
  ids=lambda p: f"{p.question} {p.choices} {p.solution}"[:60],
)
def test_a_letter_that_names_no_option_is_no_hindrance(problem):
  assert not shuffle_options.is_fixed(problem)


def test_a_plain_query_is_rewritten_as_a_plain_one():
  """Here by hand; marks of pictures stay in the question."""
  problem = make_problem(
    choices=("red", "blue"), question="Is <image> more like <image>?"
  )
  problem = dataclasses.replace(
    problem,
    unit="cm",
    query="Is <image> more like <image>? (Unit: cm)\n(A) red\n(B) blue",
  )
  queries = {shuffled(problem, seed).query for seed in range(20)}
  assert queries == {
    problem.query,
    "Is <image> more like <image>? (Unit: cm)\n(A) blue\n(B) red",
  }
