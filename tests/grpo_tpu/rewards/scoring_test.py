"""Scores: the weighted sum, the gate, and rows on which a reward fails."""

import dataclasses
import math
import time

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.verifier import verify
from grpo_tpu.config import defaults
from grpo_tpu.config.schema import Config
from grpo_tpu.rewards import heuristics, scoring, settings

CONFIG = dataclasses.replace(
  Config.from_config_dict(defaults.get_config()).rewards,
  preset="gated",
  accuracy=1.0,
  format=0.5,
  length=0.25,
  reasoning_words=0.125,
  coherence=2.0,
  gate_heuristics=True,
  num_workers=0,
  max_error_fraction=1.0,
  error_window=1000,
)
REASONED = (
  "I see three red circles and two blue squares in the picture. Because three "
  "and two make five, there are five shapes. <answer>{}</answer>"
)


def make_problem(answer="5"):
  return records.Problem(
    pid="1",
    question="",
    choices=(),
    unit="",
    precision=-1,
    answer=answer,
    question_type="free_form",
    answer_type="integer",
    query="",
    solution="",
    metadata={},
  )


def scores(*completions, config=CONFIG, answer="5"):
  problems = [make_problem(answer)] * len(completions)
  return scoring.score(completions, problems, config)


def test_the_total_is_the_weighted_sum_of_the_components():
  found = scores(REASONED.format(5), REASONED.format(6), "5", "")
  expected = sum(
    getattr(CONFIG, name) * values for name, values in found.components.items()
  )
  np.testing.assert_allclose(found.total, expected, rtol=1e-6)
  assert found.total.dtype == np.float32
  assert len(set(found.total.tolist())) == 4


def test_components_have_a_fixed_order():
  names = ("accuracy", "format", "length", "reasoning_words", "coherence")
  assert settings.COMPONENTS == names
  assert tuple(scores("").components) == names
  assert tuple(CONFIG.weights) == names


def test_a_preset_gives_the_weights_that_are_None():
  """With the full preset the heuristics sum to at most 1."""
  unset = dict.fromkeys((*settings.COMPONENTS, "gate_heuristics"))
  full = dataclasses.replace(CONFIG, **unset, preset="full")
  assert list(full.weights.values()) == [1.0, 0.1, 1.0, 1.0, 1.0]
  assert full.is_gated
  assert scores(REASONED.format(5), config=full).total[0] > 1.5
  assert scores(REASONED.format("unclear"), config=full).total[0] < 0.11
  gated = dataclasses.replace(full, preset="gated", length=0.0)
  assert list(gated.weights.values()) == [1.0, 0.1, 0.0, 0.02, 0.02]
  answer = dataclasses.replace(full, preset="answer", gate_heuristics=False)
  assert list(answer.weights.values()) == [1.0, 0.1, 0.0, 0.0, 0.0]
  assert not answer.is_gated


def test_a_right_tagged_answer_scores_accuracy_and_format():
  found = scores("<answer>5</answer>", "The answer is 5.", "<answer>6</answer>")
  np.testing.assert_array_equal(found.components["accuracy"], [1, 1, 0])
  np.testing.assert_array_equal(found.components["format"], [1, 0, 1])
  assert found.answers == ["5", "5", "6"]
  np.testing.assert_array_equal(found.valid, [True] * 3)


def test_gated_heuristics_need_an_answer():
  unanswered = REASONED.format("unclear")
  for gate in (True, False):
    config = dataclasses.replace(CONFIG, gate_heuristics=gate)
    found = scores(REASONED.format(5), unanswered, config=config)
    for name in ("length", "reasoning_words", "coherence"):
      values = found.components[name]
      assert values[0] > 0
      assert values[1] == (0 if gate else values[0])
    np.testing.assert_array_equal(found.components["format"], [1, 1])


def test_a_weight_of_zero_logs_without_adding():
  config = dataclasses.replace(CONFIG, accuracy=0.0)
  found = scores("<answer>5</answer>", config=config)
  assert found.components["accuracy"][0] == 1
  assert found.total[0] == CONFIG.format


def test_the_heuristics_ignore_the_answer():
  """A long answer does not count as reasoning."""
  found = scores(f"<answer>5 {'apples ' * 2}</answer>", "<answer>5</answer>")
  assert found.components["length"][0] == found.components["length"][1] == 0


def test_a_row_does_not_depend_on_other_rows():
  texts = [REASONED.format(i) for i in range(7)] + ["5", "", "nonsense"]
  together = scores(*texts)
  alone = [scores(text) for text in texts]
  for i, single in enumerate(alone):
    assert together.total[i] == single.total[0]
    for name, values in together.components.items():
      assert values[i] == single.components[name][0]


@pytest.mark.parametrize("failure", ["raise", "nan", "inf", "text"])
def test_a_reward_that_fails_excludes_its_row_and_is_counted(
  monkeypatch, failure
):
  length = heuristics.length

  def sometimes(reasoning):
    if "Trap" not in reasoning.sentences[0]:
      return length(reasoning)
    if failure == "raise":
      raise RuntimeError("out of order")
    return {"nan": math.nan, "inf": math.inf, "text": "much"}[failure]

  texts = [REASONED.format(5), "Trap " + REASONED.format(5), "I say 6 here."]
  expected = scores(*texts)
  monkeypatch.setattr(heuristics, "length", sometimes)
  found = scores(*texts)
  np.testing.assert_array_equal(found.valid, [True, False, True])
  assert found.errors == dict.fromkeys(settings.COMPONENTS, 0) | {"length": 1}
  np.testing.assert_array_equal(found.total[[0, 2]], expected.total[[0, 2]])
  assert found.total[1] == 0
  assert all(np.isfinite(values).all() for values in found.components.values())


def test_a_verifier_that_fails_excludes_its_row(monkeypatch):
  def failing(responses, *_):
    raise RecursionError(responses)

  monkeypatch.setattr(verify, "verify_all", failing)
  found = scores("5", "6")
  assert not found.valid.any()
  assert found.errors["accuracy"] == 2
  assert found.answers == [None, None]


def test_only_a_comparison_that_was_ended_excludes_its_row(monkeypatch):
  """Rules cannot judge an unchecked answer: other rewards pay for it."""
  ended = verify.Verdict("5", "tag", correct=False, abstained=True)
  monkeypatch.setattr(
    verify, "verify_all", lambda responses, *_: [ended] * len(responses)
  )
  unchecked = dataclasses.replace(make_problem(), answer_type="unchecked")
  found = scoring.score(["5", "6"], [make_problem(), unchecked], CONFIG)
  assert found.failed["accuracy"].tolist() == [True, False]
  assert found.components["accuracy"].tolist() == [0, 0]
  assert found.answers == [None, "5"]
  judged = dataclasses.replace(CONFIG, judges=(("self", "agreement", 1.0),))
  both = ["5", "6"], [make_problem(), unchecked]
  always = scoring.score(*both, judged)
  assert always.failed["accuracy"].tolist() == [True, False]
  found = scoring.score(
    *both, dataclasses.replace(judged, judge_when="abstained")
  )
  assert found.valid.all() and found.abstained.all()


def test_an_unreadable_completion_is_wrong_if_its_problem_can_be_checked():
  """Rules have a verdict on it, so that no judge is asked."""
  checked, unchecked = make_problem(), make_problem("")
  found = scoring.score(["no idea"] * 2, [checked, unchecked], CONFIG)
  assert found.abstained.tolist() == [False, True] and found.valid.all()


def test_a_failure_on_a_stand_in_does_not_count(monkeypatch):
  verified = verify.verify_all

  def failing(responses, *others):
    if "stand-in" in responses:
      raise RecursionError
    return verified(responses, *others)

  monkeypatch.setattr(verify, "verify_all", failing)
  found = scoring.score(
    ["5", "stand-in"],
    [make_problem()] * 2,
    CONFIG,
    is_present=np.array([True, False]),
  )
  assert found.errors["accuracy"] == 0 and not found.failed["accuracy"].any()


def test_a_completion_that_was_cut_off_has_no_answer_in_its_prose():
  """But a closed tag or box counts."""
  texts = ["It is 5", "It is 5", r"\boxed{5}, or", "<answer>5</answer>, o"]
  found = scoring.score(
    texts,
    [make_problem()] * 4,
    CONFIG,
    truncated=[False, True, True, True],
  )
  assert found.answers == ["5", None, "5", "5"]


def test_no_completions_give_no_scores():
  found = scores()
  assert found.total.shape == (0,)
  assert found.valid.shape == (0,)


def test_there_must_be_as_many_problems_as_completions():
  with pytest.raises(ValueError, match="2 completions .* not 1"):
    scoring.score(["5", "5"], [make_problem()], CONFIG)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_must_be_finite(weight):
  with pytest.raises(ValueError, match=r"rewards.coherence \("):
    dataclasses.replace(CONFIG, coherence=weight)


def test_a_batch_of_completions_is_fast():
  """CPU time on a loaded machine; 15 ms on an idle one."""
  texts = [REASONED.format(5)] * 256 + ["<answer>5</answer>"] * 256
  problems = [make_problem()] * 512
  scoring.score(texts, problems, CONFIG)
  start = time.process_time()
  scoring.score(texts, problems, CONFIG)
  assert time.process_time() - start < 0.1
