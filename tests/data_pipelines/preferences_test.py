"""Labelled replies: the first drawn is paid, the others are plain mistakes."""

import dataclasses
import json
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


def pair(problem, seed):
  """The texts of the right reply and the wrong one."""
  rng = np.random.default_rng(seed)
  (chosen, better), (rejected, worse) = preferences.drawn(2)(problem, rng)
  assert (better, worse) == (1.0, 0.0)
  return chosen, rejected


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_verifier_pays_the_chosen_reply_alone(problem):
  for seed in range(50):
    chosen, rejected = pair(problem, seed)
    assert verifier.verify(chosen, problem).correct
    verdict = verifier.verify(rejected, problem)
    assert verdict.answer is not None
    assert not verdict.correct


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_both_replies_differ_in_the_answer_alone(problem):
  chosen, rejected = pair(problem, 0)
  tag = re.compile("<answer>.*</answer>")
  assert tag.sub("", chosen) == tag.sub("", rejected) == "One by one. "


def test_a_draw_depends_on_the_generator_alone():
  pairs = [pair(PROBLEMS["integer"], [7, seed]) for seed in (0, 0, *range(20))]
  assert pairs[0] == pairs[1]
  assert len(set(pairs)) > 3


def test_a_wrong_number_has_as_many_decimals_as_the_right_one():
  problem = make_problem("1.20", answer_type="float", precision=2)
  for seed in range(20):
    _, rejected = pair(problem, seed)
    assert re.search(r">-?\d+\.\d\d<", rejected)


def test_every_other_option_is_rejected_at_times():
  rejected = {pair(PROBLEMS["options"], seed)[1] for seed in range(40)}
  assert len(rejected) == 2


def test_a_wrong_count_is_not_below_nought():
  for seed in range(60):
    _, rejected = pair(make_problem("1"), seed)
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
    preferences.drawn(2)(problem, np.random.default_rng(0))
  assert error.value.reason == reason


# How many different wrong answers there are, of the three that are asked for:
# of zero 1 and 2, for ten times nought is right and -1 below it.
NUM_WRONG = {
  "integer": 3,
  "float": 3,
  "list": 3,
  "zero": 2,
  "options": 2,
  "two options": 1,
  "duplicates": 1,
}


@pytest.mark.parametrize("name", NUM_WRONG)
def test_a_group_is_one_right_reply_and_as_many_wrong_as_there_are(name):
  problem, replies = PROBLEMS[name], preferences.drawn(4)
  for seed in range(20):
    first, *others = replies(problem, np.random.default_rng(seed))
    assert first.label == 1.0
    assert verifier.verify(first.text, problem).correct
    assert [label for _, label in others] == [0.0] * NUM_WRONG[name]
    assert len({text for text, _ in others}) == NUM_WRONG[name]
    for text, _ in others:
      assert verifier.verify(text, problem).answer is not None
      assert not verifier.verify(text, problem).correct


def line_of(pid="1", labels=(0.5, 2.0, -1.0)):
  """A line of a file whose replies to a problem are "a", "b", ..."""
  completions = [
    {"text": text, "label": label}
    for text, label in zip("abcdef", labels, strict=False)
  ]
  return json.dumps({"pid": pid, "completions": completions})


def read(path, *lines, count=2):
  """The replies that a file of such lines has for the problem "1"."""
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  replies = preferences.from_file(path, count)
  return replies(make_problem("12"), np.random.default_rng(0))


@pytest.mark.parametrize("count", [2, 3, 9])
def test_the_first_replies_of_a_file_are_taken_as_they_stand(tmp_path, count):
  """Unsorted, unverified, and their labels kept."""
  wanted = (("a", 0.5), ("b", 2.0), ("c", -1.0))
  path = tmp_path / "replies.jsonl"
  lines = line_of("2", (7.0, 8.0)), line_of("1")
  assert read(path, *lines, count=count) == wanted[:count]


def test_a_problem_that_a_file_does_not_know_says_so(tmp_path):
  path = tmp_path / "replies.jsonl"
  with pytest.raises(records.BadRecord, match=f"1 in {path}") as error:
    read(path, line_of("2"))
  assert error.value.reason == "no_completions"


BAD_LINES = {
  "not json": "{",
  "empty": "",
  "not an object": "3",
  "no pid": line_of().replace("pid", "PID"),
  "no completions": '{"pid": "1"}',
  "no text": line_of().replace("text", "TEXT"),
  "no label": line_of().replace("label", "LABEL"),
  "one completion": line_of("1", (1.0,)),
  "none at all": line_of("1", ()),
  "twice": line_of("2"),
  "not a number": line_of("1", (1.0, float("nan"))),
  "endless": line_of("1", (float("inf"), 0.0)),
  "a word": line_of("1", (1.0, "bad")),
  "null": line_of("1", (1.0, None)),
  "a quoted number": line_of("1", (1.0, "1")),
  "huge": line_of("1", (1.0, 10**400)),
  "no string": line_of().replace('"a"', "null"),
  "no name": line_of().replace('"1"', "null"),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line):
  path = tmp_path / "replies.jsonl"
  with pytest.raises(ValueError, match="mend the line") as error:
    read(path, line_of("2"), line, line_of("3"))
  said = str(error.value)
  assert said.startswith(f"data.preference_file ({str(path)!r}) line 2 must be")
  assert repr(line[:80]) in said


def test_a_file_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(
    ValueError, match=r"^data.preference_file \('.*none'\) must be a file"
  ):
    preferences.from_file(tmp_path / "none", 2)
