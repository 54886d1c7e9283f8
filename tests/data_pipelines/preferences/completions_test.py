"""Labelled completions: the first is right, the others are plain mistakes."""

import dataclasses
import json
import re

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.preferences import completions as preferences
from data_pipelines.sources import files
from data_pipelines.sources.drawn import synthetic
from data_pipelines.text import chat_prompts
from data_pipelines.verifier import verify


def make_problem(answer, choices=(), answer_type="integer", precision=-1):
  return records.Problem(
    pid="1",
    question="",
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


RIGHT = "One by one. <answer>12</answer>"


def pair(problem, seed):
  """The texts of the right and of the wrong completion."""
  rng = np.random.default_rng(seed)
  (chosen, better), (rejected, worse) = preferences.synthesize(2)(problem, rng)
  assert (better, worse) == (1.0, 0.0)
  return chosen, rejected


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_verifier_accepts_only_the_right_completion(problem):
  for seed in range(50):
    chosen, rejected = pair(problem, seed)
    assert verify.verify(chosen, problem).correct
    verdict = verify.verify(rejected, problem)
    assert verdict.answer is not None
    assert not verdict.correct


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_completions_differ_only_in_the_answer(problem):
  chosen, rejected = pair(problem, 0)
  tag = re.compile("<answer>.*</answer>")
  assert tag.sub("", chosen) == tag.sub("", rejected) == "One by one. "


def test_a_draw_depends_only_on_the_generator():
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


def test_a_wrong_count_is_not_negative():
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
def test_a_problem_without_a_pair_gives_the_reason(problem, reason):
  with pytest.raises(records.BadRecord) as error:
    preferences.synthesize(2)(problem, np.random.default_rng(0))
  assert error.value.reason == reason


def with_own(problem: records.Problem, *labels: float) -> records.Problem:
  """The problem with a completion for each label, named by its place."""
  own = (records.LabelledCompletion(f"{i}.", x) for i, x in enumerate(labels))
  return dataclasses.replace(problem, completions=tuple(own))


@pytest.mark.parametrize(
  ("labels", "count", "places"),
  [
    ((0.0, 1.0), 2, "10"),
    ((0.2, 0.9, -1.0, 0.5), 2, "12"),
    ((0.2, 0.9, -1.0, 0.5), 3, "123"),
    ((0.2, 0.9, -1.0, 0.5), 9, "1230"),
    ((1.0, 1.0, 0.0), 2, "02"),
    ((3.0, 2.0, 1.0), 3, "021"),
  ],
)
@pytest.mark.parametrize("answer_type", ["integer", "text", "unchecked"])
def test_own_completions_are_given_from_both_ends(
  labels, count, places, answer_type
):
  problem = make_problem("5", answer_type=answer_type)
  given = preferences.synthesize(count)(
    with_own(problem, *labels), np.random.default_rng(0)
  )
  assert "".join(text[0] for text, _ in given) == places
  assert [label for _, label in given] == [labels[int(i)] for i in places]


@pytest.mark.parametrize("labels", [(), (1.0,), (0.5, 0.5)])
def test_without_two_labels_completions_are_made_where_they_can_be(labels):
  rng = np.random.default_rng(0)
  given = preferences.synthesize(2)(with_own(PROBLEMS["integer"], *labels), rng)
  assert given[0].text == RIGHT
  for kind in ("text", "expression", "scored", "unchecked"):
    problem = with_own(make_problem("x", answer_type=kind), *labels)
    with pytest.raises(records.BadRecord, match=f"its {kind} answer") as error:
      preferences.synthesize(2)(problem, rng)
    assert error.value.reason == "no_completions"


def test_equal_texts_are_no_pair():
  own = (
    records.LabelledCompletion("5.", 1.0),
    records.LabelledCompletion("5.", 0.0),
  )
  problem = make_problem("five", answer_type="text")
  problem = dataclasses.replace(problem, completions=own)
  with pytest.raises(records.BadRecord, match="no different completions"):
    preferences.synthesize(2)(problem, np.random.default_rng(0))


@pytest.mark.parametrize(
  ("labels", "place"),
  [((0.5, 2.0, 2.0), "1"), ((-3.0, -1.0), "1"), ((1.0,), "0")],
)
def test_the_best_own_completion_is_the_demonstration(labels, place):
  problem = with_own(PROBLEMS["integer"], *labels)
  text = preferences.demonstration(problem, template=chat_prompts.TAGGED)
  assert text == f"{place}."


@pytest.mark.parametrize("labels", [(), (0.0,), (-1.0, -1.0)])
def test_completions_of_no_worth_demonstrate_nothing(labels):
  problem = with_own(PROBLEMS["integer"], *labels)
  text = preferences.demonstration(problem, template=chat_prompts.TAGGED)
  assert text == RIGHT
  problem = dataclasses.replace(problem, answer="", answer_type="unchecked")
  with pytest.raises(records.BadRecord, match="no_demonstration"):
    preferences.demonstration(problem, template=chat_prompts.TAGGED)


# The number of different wrong answers, up to the three that are asked for:
# zero has only 1 and 2, because ten times zero is right and -1 is negative.
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
def test_a_group_is_one_right_completion_and_the_possible_wrong_ones(name):
  problem, completions = PROBLEMS[name], preferences.synthesize(4)
  for seed in range(20):
    first, *others = completions(problem, np.random.default_rng(seed))
    assert first.label == 1.0
    assert verify.verify(first.text, problem).correct
    assert [label for _, label in others] == [0.0] * NUM_WRONG[name]
    assert len({text for text, _ in others}) == NUM_WRONG[name]
    for text, _ in others:
      assert verify.verify(text, problem).answer is not None
      assert not verify.verify(text, problem).correct


# Draws of the default kinds, from before other kinds and templates existed.
DRAWN = {
  "integer": ("12", "21", "11", "14"),
  "float": ("1.25", "12.50", "1.24", "1.27"),
  "list": ("[1, 2.5, 3]", "[1, 2.5, 2]", "[1, 4.5, 3]", "[1, 3.5, 3]"),
  "options": ("blue", "green", "red"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_default_draws_never_change(name):
  rng = np.random.default_rng([5, 7, 2])
  assert [
    text for text, _ in preferences.synthesize(4)(PROBLEMS[name], rng)
  ] == [f"One by one. <answer>{answer}</answer>" for answer in DRAWN[name]]


@pytest.mark.parametrize("name", DRAWN)
def test_without_reasoning_the_same_answers_are_drawn_alone(name):
  rng = np.random.default_rng([5, 7, 2])
  source = preferences.synthesize(4, has_reasoning=False)
  assert [text for text, _ in source(PROBLEMS[name], rng)] == [
    f"<answer>{answer}</answer>" for answer in DRAWN[name]
  ]


@pytest.fixture(scope="module")
def problems(fixtures):
  """Published problems with an answer, and synthetic ones."""
  rows = files.find(fixtures / "mathvista_schema").readers["testmini"]()
  published = [records.from_result(row.values) for row in rows]
  spec = synthetic.Spec(
    num_problems=150,
    seed=0,
    difficulty=3,
    kinds=synthetic.KINDS,
    image_size=32,
    multi_choice_share=0.3,
    min_options=2,
    max_options=8,
  )
  return [*published[:150], *synthetic.problems(spec)]


# For each kind: the share of problems that have such a wrong completion, and
# its length minus that of the right one in characters, the mean and the mean
# size. As measured, rounded up. A refusal is longer than a one-digit answer.
SHARES_AND_LENGTHS = {
  "distractor": (0.4, 0.5, 2.0),
  "perturbation": (0.5, 0.5, 0.5),
  "refusal": (0.99, 3.0, 4.5),
  "conflict": (0.4, 0.5, 2.0),
  "truncation": (0.97, 0.5, 0.5),
}


@pytest.mark.parametrize("template", chat_prompts.TEMPLATES)
@pytest.mark.parametrize("kind", preferences.KINDS)
def test_a_wrong_completion_of_any_kind_is_wrong_and_no_longer(
  problems, kind, template
):
  share, mean, mean_size = SHARES_AND_LENGTHS[kind]
  completions = preferences.synthesize(
    2, kinds=(kind,), template=chat_prompts.TEMPLATES[template]
  )
  differences = []
  for index, problem in enumerate(problems):
    try:
      (better, label), (worse, no_label) = completions(
        problem, np.random.default_rng(index)
      )
    except records.BadRecord as error:
      assert error.reason in ("no_wrong_answer", "answer_not_verified")
      continue
    assert (label, no_label) == (1.0, 0.0)
    assert verify.verify(better, problem).correct
    verdict = verify.verify(worse, problem)
    assert not verdict.correct
    if kind in preferences.DEFAULT_KINDS:
      assert verdict.answer is not None
    if kind != "conflict":
      assert better == chat_prompts.demonstration(
        problem, template=chat_prompts.TEMPLATES[template]
      )
    differences.append(len(worse) - len(better))
  assert len(differences) >= share * len(problems)
  assert abs(np.mean(differences)) <= mean
  assert np.mean(np.abs(differences)) <= mean_size


def drawn_wrong(problem, *kinds, count=2, seeds=30, template="tagged"):
  """Every wrong completion of some draws."""
  completions = preferences.synthesize(
    count, kinds=kinds, template=chat_prompts.TEMPLATES[template]
  )
  return {
    text
    for seed in range(seeds)
    for text, _ in completions(problem, np.random.default_rng(seed))[1:]
  }


def test_a_refusal_gives_no_answer_in_the_place_of_the_answer():
  for problem in (PROBLEMS["integer"], PROBLEMS["options"]):
    found = drawn_wrong(problem, "refusal")
    assert len(found) == 3
    for text in found:
      assert verify.verify(text, problem).answer is None
      assert re.search("<answer>.*[a-zA-Z]{3}.*</answer>|N/A", text)


def test_a_long_refusal_shortens_the_reasoning():
  """By whole words: a part of "One by one." remains, or nothing."""
  kept = {
    text.partition("<answer>")[0]
    for text in drawn_wrong(PROBLEMS["integer"], "refusal")
  }
  assert kept <= {"", "One ", "One by ", "One by one. "} and len(kept) > 1


def test_a_conflict_is_a_letter_with_the_text_of_another_option():
  problem = dataclasses.replace(PROBLEMS["options"], solution="")
  wrong = drawn_wrong(problem, "conflict", seeds=60)
  pairs = [("A", "blue"), ("C", "blue"), ("B", "red"), ("B", "green")]
  assert wrong == {f"<answer>({x}) {y}</answer>" for x, y in pairs}


def test_with_conflicts_every_completion_has_a_letter():
  """Otherwise the letter alone would reveal a conflict."""
  problem = dataclasses.replace(PROBLEMS["options"], solution="")
  completions = preferences.synthesize(3, kinds=("distractor", "conflict"))
  found = set()
  for seed in range(40):
    (chosen, _), *others = completions(problem, np.random.default_rng(seed))
    assert chosen == "<answer>(B) blue</answer>"
    found |= {text for text, _ in others}
  assert {"<answer>(A) red</answer>", "<answer>(C) green</answer>"} < found
  assert len(found) == 6


def test_a_truncation_is_cut_before_its_answer():
  problem = dataclasses.replace(PROBLEMS["integer"], question="How many?")
  assert drawn_wrong(problem, "truncation") == {
    # As long as "One by one. <answer>12</answer>" without a space.
    "One by one. One by one. One by",
    "How many? How many? How many? H",
  }
  (text, other) = sorted(
    drawn_wrong(problem, "truncation", template="reasoned")
  )
  assert text.startswith("<reasoning>How many? How")
  assert other.startswith("<reasoning>One by one. One")


def test_only_the_wanted_kinds_are_drawn_with_equal_probability():
  problem = dataclasses.replace(PROBLEMS["integer"], question="How many?")
  kinds = ("perturbation", "refusal", "truncation")
  completions, counts = (
    preferences.synthesize(2, kinds=kinds),
    dict.fromkeys("pr", 0),
  )
  for seed in range(600):
    text = completions(problem, np.random.default_rng(seed))[1].text
    if "<answer>" in text:
      numeric = verify.verify(text, problem).answer is not None
      counts["p" if numeric else "r"] += 1
  assert all(150 < count < 250 for count in counts.values()), counts


@pytest.mark.parametrize(
  ("name", "kinds"),
  [("integer", ("distractor", "conflict")), ("options", ("perturbation",))],
)
def test_a_problem_without_completions_of_the_kinds_is_rejected(name, kinds):
  with pytest.raises(records.BadRecord) as error:
    preferences.synthesize(2, kinds=kinds)(
      PROBLEMS[name], np.random.default_rng(0)
    )
  assert error.value.reason == "no_wrong_answer"


def line_of(pid="1", labels=(0.5, 2.0, -1.0)):
  """A line of a file with the completions "a", "b", ... of a problem."""
  completions = [
    {"text": text, "label": label}
    for text, label in zip("abcdef", labels, strict=False)
  ]
  return json.dumps({"pid": pid, "completions": completions})


def read(path, *lines, count=2):
  """The completions of problem "1" in a file of such lines."""
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  completions = preferences.from_file(path, count)
  return completions(make_problem("12"), np.random.default_rng(0))


@pytest.mark.parametrize("count", [2, 3, 9])
def test_the_first_completions_of_a_file_are_taken_unchanged(tmp_path, count):
  """Unsorted, unverified, with their labels."""
  wanted = (("a", 0.5), ("b", 2.0), ("c", -1.0))
  path = tmp_path / "completions.jsonl"
  lines = line_of("2", (7.0, 8.0)), line_of("1")
  assert read(path, *lines, count=count) == wanted[:count]


def test_a_problem_that_a_file_lacks_is_rejected(tmp_path):
  path = tmp_path / "completions.jsonl"
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
  "nested": "[" * 100_000,
  "surrogate": line_of().replace('"a"', '"\\ud800"'),
  "zero byte": line_of().replace('"a"', '"\\u0000"'),
  "digits": line_of("1", (1.0, 2)).replace("2", "2" * 5000),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line):
  path = tmp_path / "completions.jsonl"
  with pytest.raises(ValueError, match="correct the line") as error:
    read(path, line_of("2"), line, line_of("3"))
  said = str(error.value)
  assert said.startswith(f"data.preference_file ({str(path)!r}) line 2 must be")
  assert repr(line[:80]) in said
  assert len(said) < 1000


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(
    ValueError, match=r"^data.preference_file \('.*none'\) must be a file"
  ):
    preferences.from_file(tmp_path / "none", 2)
  with pytest.raises(ValueError, match="must be a regular file"):
    preferences.from_file("/dev/zero", 2)
