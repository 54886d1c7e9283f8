"""Rewards of networks and of the host add up as the settings say."""

import dataclasses
import json

import numpy as np
import pytest

from data_pipelines import records
from grpo_tpu.config import defaults
from grpo_tpu.config.schema import Config
from grpo_tpu.rewards import combination, scoring
from grpo_tpu.rewards.settings import RewardConfig

BASE = Config.from_config_dict(defaults.get_config()).rewards
TWO = (("run:a", 2.0), ("run:b", 0.5))


class Fixed:
  """A network that gives what a test says, batch after batch."""

  def __init__(self, *batches):
    self.names, self._batches = tuple(batches[0]), iter(batches)

  def start(self, prompts, completed):
    values = next(self._batches)
    return lambda: {k: np.array(x, np.float32) for k, x in values.items()}


class Prompts:
  """The part of a batch that is read: which problems rules can check."""

  def __init__(self, *answers):
    problem = records.make_question("How many?")
    kind = {"answer_type": "integer", "question_type": "free_form"}
    self.problems = [
      dataclasses.replace(problem, answer=x, **kind) for x in answers
    ]


def settings(**changes) -> RewardConfig:
  zero = {"accuracy": 1.0, "format": 0.25}
  return dataclasses.replace(BASE, **{**zero, "models": TWO, **changes})


def host(config, accuracy, abstained=None) -> scoring.Scores:
  """Scores of the host whose `format` is always 1."""
  count = len(accuracy)
  parts = {name: np.zeros(count, np.float32) for name in config.weights}
  parts |= {"accuracy": np.array(accuracy, np.float32)}
  parts |= {"format": np.ones(count, np.float32)}
  return scoring.Scores(
    total=sum(np.float32(w) * parts[k] for k, w in config.weights.items()),
    components=parts,
    failed={k: np.zeros(count, bool) for k in parts},
    errors=dict.fromkeys(parts, 0),
    answers=[""] * count,
    abstained=np.array(abstained or [False] * count),
    terms=parts,
  )


def join(config, networks, scores, *, present=None, answers=("1", "1"), **more):
  """One batch of two prompts with two completions each."""
  both = combination.Combination(config, networks, lambda rows: rows)
  present = np.ones((2, 2), bool) if present is None else np.array(present)
  return both, both.start(Prompts(*answers), None, present, **more)(scores)


A = {"model_1": [[1.0, 3.0], [5.0, 7.0]], "model_2": [[2.0, 2.0], [0.0, 4.0]]}


def test_the_total_is_the_weighted_sum_of_normalised_scores():
  """Worked by hand: means 4 and 2, deviations sqrt(5) and sqrt(2)."""
  config = settings(spread_penalty=0.1)
  both, found = join(config, [Fixed(A)], host(config, [1, 0, 1, 0]))
  one = (np.array([1, 3, 5, 7]) - 4) / np.sqrt(5)
  two = (np.array([2, 2, 0, 4]) - 2) / np.sqrt(2)
  wanted = np.array([1, 0, 1, 0]) + 0.25 + 2 * one + 0.5 * two
  np.testing.assert_allclose(
    found.total, wanted - 0.1 * abs(one - two) / 2, rtol=1e-5
  )
  np.testing.assert_array_equal(found.components["model_1"], [1, 3, 5, 7])
  np.testing.assert_allclose(
    found.components["model_spread"], abs(one - two) / 2, rtol=1e-5
  )
  assert found.errors["model_1"] == 0 and found.valid.all()
  assert both.moments["model_1"] == combination.Moments(4, 4.0, 20.0)


def test_without_normalisation_scores_are_paid_as_they_are():
  config = settings(model_normalization="none")
  both, found = join(config, [Fixed(A)], host(config, [0, 0, 0, 0]))
  np.testing.assert_allclose(found.total, [3.25, 7.25, 10.25, 16.25])
  assert not both.moments


@pytest.mark.parametrize("kind", ["reference", "running"])
def test_moments_are_those_of_all_rows_and_exact_after_a_resume(kind):
  """Batch after batch they equal one pass over all scores; JSON keeps them."""
  config = settings(models=TWO[:1], model_normalization=kind)
  rng = np.random.default_rng(0)
  batches = [{"model_1": rng.normal(3, 2, (2, 2))} for _ in range(4)]
  unbroken, resumed = (
    combination.Combination(config, [Fixed(*x)], lambda rows: rows)
    for x in (batches, batches[2:])
  )
  totals = []
  for number in range(4):
    if number == 2:
      resumed.restore(json.loads(json.dumps(unbroken.state())))
    for each in (unbroken, resumed) if number > 1 else (unbroken,):
      wait = each.start(Prompts("1", "1"), None, np.ones((2, 2), bool))
      totals.append(wait(host(config, [0] * 4)).total)
  np.testing.assert_array_equal(totals[2], totals[3])
  np.testing.assert_array_equal(totals[4], totals[5])
  assert unbroken.state() == resumed.state()
  seen = batches[:1] if kind == "reference" else batches
  values = np.array([x["model_1"] for x in seen], np.float32).astype(float)
  moments = unbroken.moments["model_1"]
  assert moments.count == values.size
  assert moments.mean == pytest.approx(values.mean(), rel=1e-12)
  assert moments.squares == pytest.approx(values.var() * values.size, rel=1e-12)


def test_evaluations_have_moments_of_their_own_which_never_move():
  config = settings(models=TWO[:1], model_normalization="running")
  network = Fixed(*[{"model_1": [[x, x], [x, 2 * x]]} for x in (1, 2, 3.0)])
  both = combination.Combination(config, [network], lambda rows: rows)
  present = np.ones((2, 2), bool)
  for split in ("", "eval/", "eval/"):
    start = both.start(Prompts("1", "1"), None, present, split=split)
    for column in (0, 1):  # One completion of each prompt at a time.
      start(host(config, [0, 0]), column)
  assert both.moments["model_1"].count == 4
  assert both.moments["eval/model_1"].mean == 2.0


def test_an_interrupted_step_leaves_the_moments_of_the_step_before():
  config = settings(models=TWO[:1], model_normalization="running")
  both, _ = join(
    config, [Fixed({"model_1": A["model_1"]})] * 1, host(config, [0] * 4)
  )
  before = both.state()
  with pytest.raises(KeyboardInterrupt), both.transaction():
    both.moments["model_1"] = both.moments["model_1"].plus(np.ones(3))
    raise KeyboardInterrupt
  assert both.state() == before


def test_a_missing_score_excludes_its_row_alone_and_is_counted():
  config = settings(max_error_fraction=1.0)
  values = {**A, "model_1": [[np.nan, 3.0], [np.inf, 7.0]]}
  present = [[True, True], [False, True]]
  both, found = join(
    config, [Fixed(values)], host(config, [1] * 4), present=present
  )
  assert found.valid.tolist() == [False, True, True, True]
  assert found.errors["model_1"] == 1 and found.total[0] == 0
  assert np.isfinite(found.total).all()
  assert both.moments["model_1"].count == 2


def test_a_network_that_fails_on_every_row_ends_the_run():
  config = settings(models=TWO[:1])
  network = Fixed({"model_1": np.full((2, 2), np.nan)})
  with pytest.raises(scoring.RewardError, match="model_1 gave no finite score"):
    join(config, [network], host(config, [1] * 4))


def test_a_conditional_reward_pays_nothing_for_a_wrong_answer_that_is_known():
  config = settings(
    only_if_accurate=("model_1", "format"), model_normalization="none"
  )
  scores = host(config, [1, 0, 0, 0])
  _, found = join(config, [Fixed(A)], scores, answers=("1", ""))
  # Rules cannot check the second problem: its wrong answers are only unknown.
  np.testing.assert_allclose(
    found.total, [1 + 0.25 + 2 + 1, 1.0, 0.25 + 10, 0.25 + 14 + 2]
  )


def test_a_condition_without_networks_changes_the_rewards_of_the_host():
  config = settings(models=(), only_if_accurate=("format",))
  _, found = join(config, [], host(config, [1, 0, 1, 0]))
  np.testing.assert_allclose(found.total, [1.25, 0, 1.25, 0])
  plain = settings(models=())
  scores = host(plain, [1, 0, 1, 0])
  assert join(plain, [], scores)[1] is scores


JUDGES = (("self", "agreement", 1.0),) * 2 + (("self", "agreement", 2.0),)
SAYS = {
  "judge_1": [[0.9, 0.9], [0.1, 0.2]],
  "judge_2": [[0.8, 0.1], [0.1, 0.6]],
  "judge_3": [[0.2, 0.6], [0.6, 0.3]],
}


def test_a_majority_pays_the_sum_of_the_weights_or_nothing():
  config = settings(models=(), judges=JUDGES, judge_vote="majority")
  _, found = join(config, [Fixed(SAYS)], host(config, [0] * 4))
  # Weights of yes: 1 + 1, 1 + 2, 2, 1; more than 2 of 4 is the majority.
  np.testing.assert_allclose(found.total - 0.25, [0, 4, 0, 0])
  config = settings(models=(), judges=JUDGES)
  _, found = join(config, [Fixed(SAYS)], host(config, [0] * 4))
  np.testing.assert_allclose(
    found.total - 0.25, [2.1, 2.2, 1.4, 1.4], rtol=1e-6
  )


def test_a_judge_pays_only_where_the_rules_abstain_if_so_asked():
  config = settings(models=(), judges=JUDGES[:1], judge_when="abstained")
  says = {"judge_1": [[0.9, np.nan], [np.nan, 0.2]]}
  abstained = [True, False, False, True]
  scores = host(config, [0, 0, 1, 0], abstained)
  _, found = join(config, [Fixed(says)], scores)
  np.testing.assert_allclose(found.total, [1.15, 0.25, 1.25, 0.45])
  assert found.valid.all() and found.errors["judge_1"] == 0
  judged = found.components["judge_1"]
  np.testing.assert_array_equal(np.isnan(judged), [False, True, True, False])


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"only_if_accurate": ("modl_1",)}, "only_if_accurate"),
    ({"models": (("run:a", float("nan")),)}, "rewards.models"),
    ({"judges": (("self", "agreement", float("inf")),)}, "rewards.judges"),
  ],
)
def test_a_setting_that_breaks_its_rule_is_named(changes, words):
  with pytest.raises(ValueError, match=words):
    settings(**changes)


@pytest.mark.parametrize(
  "saved", [3, {"model_1": 1}, {"model_1": {"count": 1}}]
)
def test_a_damaged_record_of_moments_is_refused_in_words(saved):
  both = combination.Combination(settings(), [], lambda rows: rows)
  with pytest.raises(ValueError, match="statistics of rewards"):
    both.restore(saved)
