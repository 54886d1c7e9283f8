"""Figures of answers that are written out by hand."""

import json

import pytest

from grpo_tpu.evaluation import scores as scorecard


def answer(index, got, *, gold="3", asked=True, stopped=True, **record):
  record = {
    "pid": f"p{index}",
    "question": "What?" if record.pop("is_read", True) else "",
    "choices": None,
    "precision": None,
    "answer": gold,
    "question_type": "free_form",
    "answer_type": "integer",
    "metadata": {"task": "counting"},
    "response": f"<answer>{got}</answer>",
    "extraction": got,
    "true_false": got == gold if gold else None,
  } | record
  return scorecard.Answer(index, record, asked, stopped)


RIGHT, WRONG = answer(0, "3"), answer(1, "4")
SILENT, CUT = answer(2, None), answer(3, None, stopped=False)
UNASKED = answer(4, None, asked=False)
DAMAGED = answer(
  5, None, gold="", asked=False, is_read=False, metadata={}, true_false=False
)
HIDDEN = answer(6, "3", gold="")
ALL = [RIGHT, WRONG, SILENT, CUT, UNASKED, DAMAGED, HIDDEN]


def scores(greedy, samples=(), ks=(), **ablated):
  found = scorecard.scores(greedy, samples=samples, ks=ks, ablated=ablated)
  assert json.loads(json.dumps(found)) == found
  return found


def test_every_answer_that_can_be_graded_counts_once():
  found = scores(ALL)
  assert (found["problems"], found["asked"], found["graded"]) == (7, 5, 6)
  assert found["accuracy"]["share"] == 1 / 6
  assert found["outcomes"] == {
    "right": 1,
    "wrong": 1,
    "no answer": 1,
    "cut off": 1,
    "not asked": 2,
  }


def test_what_is_damaged_is_of_no_sort_and_what_is_too_long_is():
  found = {(x["dimension"], x["name"]): x for x in scores(ALL)["slices"]}
  assert set(found) == {
    ("question_type", "free_form"),
    ("answer_type", "integer"),
    ("task", "counting"),
  }
  assert {x["problems"] for x in found.values()} == {5}
  assert {x["share"] for x in found.values()} == {0.2}


def test_without_answers_there_are_counts_and_a_note_alone():
  damaged = [DAMAGED, HIDDEN]
  assert scores(damaged, samples=[damaged], ks=(1,), removed=damaged) == {
    "problems": 2,
    "asked": 1,
    "graded": 0,
    "accuracy": None,
    "note": scorecard.NO_ANSWERS,
  }


def test_chance_is_of_guessing_among_the_options():
  options = [
    answer(0, "x", gold="x", choices=["x", "y"]),
    answer(1, "x", gold="x", choices=["x", "y", "x", "z"]),
    answer(2, "3"),
    answer(3, None, gold="x", choices=["x", "y"], asked=False),
  ]
  assert scores(options)["chance"] == pytest.approx((1 / 2 + 2 / 4) / 4)


def test_an_ablation_is_compared_problem_by_problem():
  real = [answer(i, "3" if i < 3 else "4") for i in range(4)]
  blind = [answer(i, "3" if i in (0, 3) else "4") for i in range(4)]
  found = scores([*real, HIDDEN], removed=[*blind, HIDDEN])["ablations"]
  assert set(found) == {"removed"}
  removed = found["removed"]
  assert removed["accuracy"]["share"] == 0.5
  assert removed["difference"] == pytest.approx(0.25)
  assert (removed["only_first"], removed["only_second"]) == (2, 1)
  assert removed["p_value"] == 1.0  # One of three coins, or further off.


def test_samples_are_judged_problem_by_problem():
  """Of two problems: right, wrong, wrong; and silent, right, right."""
  draws = [
    [answer(0, "3"), answer(1, None), HIDDEN],
    [answer(0, "4"), answer(1, "3"), HIDDEN],
    [answer(0, "4"), answer(1, "3"), HIDDEN],
  ]
  found = scores([RIGHT, WRONG, HIDDEN], samples=draws, ks=(1, 2, 3))["sampled"]
  assert found["num_samples"] == 3
  assert found["accuracy"]["share"] == pytest.approx((1 / 3 + 2 / 3) / 2)
  shares = {
    name: {k: x["share"] for k, x in found[name].items()}
    for name in ("pass_at_k", "maj_at_k")
  }
  # Pairs without a right one: 1 of 3, and 0 of 3.
  assert shares["pass_at_k"] == pytest.approx({"1": 1 / 2, "2": 5 / 6, "3": 1})
  # A tie falls to the first; silence casts no vote.
  assert shares["maj_at_k"] == pytest.approx({"1": 1 / 2, "2": 1, "3": 1 / 2})


def test_floats_that_round_alike_outvote_another():
  def near(got):
    return answer(
      0, got, gold="1.2", answer_type="float", precision=1, true_false=False
    )

  right = answer(0, "1.2", gold="1.2", answer_type="float", precision=1)
  draws = [[near("7.0")], [right], [near("1.21")], [near("7.3")]]
  found = scores([right], samples=draws, ks=(4,))["sampled"]
  assert found["maj_at_k"]["4"]["share"] == 1.0


def test_the_worst_slices_are_surely_worse_than_the_whole():
  def named(name, right, count):
    metadata = {"source": name}
    return [
      answer(i, "3" if i < right else "4", metadata=metadata)
      for i in range(count)
    ]

  answers = [
    *named("good", 190, 200),
    *named("bad", 20, 100),
    *named("worse", 0, 30),
    *named("small", 0, 4),
    *named("unsure", 2, 6),
  ]
  found = scores(answers)
  names = [
    x["name"] for x in scorecard.worst_slices(found, count=9, min_problems=5)
  ]
  assert names == ["worse", "bad"]
  assert [
    x["name"] for x in scorecard.worst_slices(found, count=9, min_problems=1)
  ] == ["worse", "bad", "small"]
  assert len(scorecard.worst_slices(found, count=1, min_problems=5)) == 1
  hidden = scores([HIDDEN])
  assert scorecard.worst_slices(hidden, count=9, min_problems=1) == []


def test_examples_are_failures_from_all_over_the_split():
  answers = [answer(i, "3" if i % 2 else "4") for i in range(20)]
  assert [x.index for x in scorecard.examples(answers, 5)] == [0, 4, 8, 12, 16]
  assert len(scorecard.examples(answers, 99)) == 10
  assert scorecard.examples(answers, 0) == []
  assert scorecard.examples([UNASKED, DAMAGED, WRONG], 9) == [WRONG]
  # Without public answers, whatever was said.
  assert scorecard.examples([DAMAGED, HIDDEN], 9) == [HIDDEN]
