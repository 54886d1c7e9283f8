"""Figures of completions that are written out by hand."""

import json

import pytest

from grpo_tpu.evaluation import scores


def answer(index, got, *, gold="3", asked=True, stopped=True, **record):
  record = {
    "pid": f"p{index}",
    "question": "What?",
    "choices": None,
    "precision": None,
    "answer": gold,
    "question_type": "free_form",
    "answer_type": "integer",
    "metadata": {"task": "counting"},
    "response": f"<answer>{got}</answer>",
    "strict_answer": got,
    "strict_true_false": got == gold if gold else None,
  } | record
  return scores.GradedCompletion(index, record, asked, stopped)


RIGHT, WRONG = answer(0, "3"), answer(1, "4")
SILENT, CUT = answer(2, None), answer(3, None, stopped=False)
UNASKED = answer(4, None, asked=False)
DAMAGED = answer(
  *(5, None),
  pid="unreadable:5",
  gold="",
  asked=False,
  metadata={},
  strict_true_false=False,
)
HIDDEN = answer(6, "3", gold="")
ALL = [RIGHT, WRONG, SILENT, CUT, UNASKED, DAMAGED, HIDDEN]


def compute(greedy, samples=(), ks=(), **ablated):
  found = scores.compute(greedy, samples=samples, ks=ks, ablated=ablated)
  assert json.loads(json.dumps(found)) == found
  return found


def test_every_answer_that_can_be_graded_counts_once():
  found = compute(ALL)
  assert (found["problems"], found["asked"], found["graded"]) == (7, 5, 6)
  assert found["accuracy"]["share"] == 1 / 6
  assert found["outcomes"] == {
    "right": 1,
    "wrong": 1,
    "no answer": 1,
    "cut off": 1,
    "not asked": 2,
  }


def test_a_damaged_record_is_in_no_slice_but_a_long_problem_is():
  found = {(x["dimension"], x["name"]): x for x in compute(ALL)["slices"]}
  assert set(found) == {
    ("question_type", "free_form"),
    ("answer_type", "integer"),
    ("task", "counting"),
  }
  assert {x["problems"] for x in found.values()} == {5}
  assert {x["share"] for x in found.values()} == {0.2}


def test_without_answers_there_are_counts_and_a_note_alone():
  damaged = [DAMAGED, HIDDEN]
  assert compute(damaged, samples=[damaged], ks=(1,), removed=damaged) == {
    "problems": 2,
    "asked": 1,
    "graded": 0,
    "accuracy": None,
    "note": scores.NO_ANSWERS,
  }


def test_chance_is_of_guessing_among_the_options():
  options = [
    answer(0, "x", gold="x", choices=["x", "y"]),
    answer(1, "x", gold="x", choices=["x", "y", "x", "z"]),
    answer(2, "3"),
    answer(3, None, gold="x", choices=["x", "y"], asked=False),
  ]
  assert compute(options)["chance"] == pytest.approx((1 / 2 + 2 / 4) / 4)


def test_an_ablation_is_compared_problem_by_problem():
  real = [answer(i, "3" if i < 3 else "4") for i in range(4)]
  blind = [answer(i, "3" if i in (0, 3) else "4") for i in range(4)]
  found = compute([*real, HIDDEN], removed=[*blind, HIDDEN])["ablations"]
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
  found = compute([RIGHT, WRONG, HIDDEN], samples=draws, ks=(1, 2, 3))[
    "sampled"
  ]
  assert found["num_samples"] == 3
  assert found["accuracy"]["share"] == pytest.approx((1 / 3 + 2 / 3) / 2)
  shares = {
    name: {k: x["share"] for k, x in found[name].items()}
    for name in ("pass_at_k", "maj_at_k")
  }
  # Pairs without a right one: 1 of 3, and 0 of 3.
  assert shares["pass_at_k"] == pytest.approx({"1": 1 / 2, "2": 5 / 6, "3": 1})
  # The first vote wins a tie; no answer casts no vote.
  assert shares["maj_at_k"] == pytest.approx({"1": 1 / 2, "2": 1, "3": 1 / 2})


def test_floats_that_round_alike_outvote_another():
  def near(got):
    return answer(
      0,
      got,
      gold="1.2",
      answer_type="float",
      precision=1,
      strict_true_false=False,
    )

  right = answer(0, "1.2", gold="1.2", answer_type="float", precision=1)
  draws = [[near("7.0")], [right], [near("1.21")], [near("7.3")]]
  found = compute([right], samples=draws, ks=(4,))["sampled"]
  assert found["maj_at_k"]["4"]["share"] == 1.0


def test_the_worst_slices_are_significantly_worse_than_the_whole():
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
  found = compute(answers)
  names = [
    x["name"] for x in scores.worst_slices(found, count=9, min_problems=5)
  ]
  assert names == ["worse", "bad"]
  assert [
    x["name"] for x in scores.worst_slices(found, count=9, min_problems=1)
  ] == ["worse", "bad", "small"]
  assert len(scores.worst_slices(found, count=1, min_problems=5)) == 1
  hidden = compute([HIDDEN])
  assert scores.worst_slices(hidden, count=9, min_problems=1) == []


def test_examples_are_failures_from_all_over_the_split():
  answers = [answer(i, "3" if i % 2 else "4") for i in range(20)]
  assert [x.index for x in scores.examples(answers, 5)] == [0, 4, 8, 12, 16]
  assert len(scores.examples(answers, 99)) == 10
  assert scores.examples(answers, 0) == []
  assert scores.examples([UNASKED, DAMAGED, WRONG], 9) == [WRONG]
  # Without public answers, any completion.
  assert scores.examples([DAMAGED, HIDDEN], 9) == [HIDDEN]
