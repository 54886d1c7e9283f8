"""Preference pairs: one side is paid, the other is a plain mistake."""

import dataclasses
import re

import numpy as np
import pytest

from data_pipelines import preferences, records, verifier


def make_problem(answer, choices=(), answer_type="integer", precision=-1):
  return records.Problem(
    pid="1",
    question="",
    image_path="",
    image_bytes=b"",
    choices=choices,
    unit="",
    precision=precision,
    answer=answer,
    question_type="multi_choice" if choices else "free_form",
    answer_type="text" if choices else answer_type,
    query="",
    solution="One by one.",
    metadata={},
  )


PROBLEMS = {
  "integer": make_problem("12"),
  "zero": make_problem("0"),
  "negative": make_problem("-3"),
  "palindrome": make_problem("11"),
  "float": make_problem("1.25", answer_type="float", precision=2),
  "coarse float": make_problem("1.2", answer_type="float", precision=2),
  "small float": make_problem("0.0", answer_type="float", precision=1),
  "list": make_problem("[1, 2.5, 3]", answer_type="list"),
  "options": make_problem("blue", ("red", "blue", "green")),
  "two options": make_problem("Yes", ("Yes", "No")),
  "duplicates": make_problem("18", ("18", "12", "18")),
  "numeric options": make_problem("12", ("12", "12.0", "7")),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_verifier_pays_the_chosen_reply_alone(problem):
  for seed in range(50):
    chosen, rejected = preferences.pair(problem, np.random.default_rng(seed))
    assert verifier.verify(chosen, problem).correct
    verdict = verifier.verify(rejected, problem)
    assert verdict.answer is not None
    assert not verdict.correct


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_both_replies_differ_in_the_answer_alone(problem):
  chosen, rejected = preferences.pair(problem, np.random.default_rng(0))
  tag = re.compile("<answer>.*</answer>")
  assert tag.sub("", chosen) == tag.sub("", rejected) == "One by one. "


def test_a_draw_depends_on_the_generator_alone():
  pairs = [
    preferences.pair(PROBLEMS["integer"], np.random.default_rng([7, seed]))
    for seed in (0, 0, *range(20))
  ]
  assert pairs[0] == pairs[1]
  assert len(set(pairs)) > 3


def test_a_wrong_number_has_as_many_decimals_as_the_right_one():
  problem = make_problem("1.20", answer_type="float", precision=2)
  for seed in range(20):
    _, rejected = preferences.pair(problem, np.random.default_rng(seed))
    assert re.search(r">-?\d+\.\d\d<", rejected)


def test_every_other_option_is_rejected_at_times():
  rejected = {
    preferences.pair(PROBLEMS["options"], np.random.default_rng(seed))[1]
    for seed in range(40)
  }
  assert len(rejected) == 2


def test_a_wrong_count_is_not_below_nought():
  for seed in range(60):
    _, rejected = preferences.pair(
      make_problem("1"), np.random.default_rng(seed)
    )
    assert "-" not in rejected


@pytest.mark.parametrize(
  ("problem", "reason"),
  [
    (make_problem("5", ("5", "5")), "no_wrong_answer"),
    (make_problem("many"), "answer_not_verified"),
    (dataclasses.replace(make_problem("5"), answer=""), "answer_not_verified"),
  ],
)
def test_a_problem_without_a_pair_says_why(problem, reason):
  with pytest.raises(records.BadRecord) as error:
    preferences.pair(problem, np.random.default_rng(0))
  assert error.value.reason == reason
