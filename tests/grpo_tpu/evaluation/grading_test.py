"""How often a reward prefers right completions, against a loop over pairs."""

import itertools

import numpy as np
import pytest

from grpo_tpu.evaluation import grading

NAME = "eval/reward/model_1_pair_accuracy"


def draw(seed, count=30):
  rng = np.random.default_rng(seed)
  flags = {k: rng.random(count) < 0.8 for k in ("graded", "asked")}
  scores = np.float32(rng.integers(0, 5, count) / 3)
  scores[rng.random(count) < 0.2] = np.nan
  right = rng.random(count) < 0.5
  columns = flags | {"accuracy": right & flags["graded"]}
  return {k: np.float32(x) for k, x in columns.items()} | {NAME: scores}


def split(rows, *ends):
  bounds = itertools.pairwise((0, *ends, len(rows[NAME])))
  return [{k: x[a:b] for k, x in rows.items()} for a, b in bounds]


@pytest.mark.parametrize("seed", range(4))
def test_pair_accuracy_equals_a_loop_over_pairs(seed):
  rows = draw(seed)
  counted = [
    (score, right)
    for score, right, graded, asked in zip(
      *(rows[k] for k in (NAME, "accuracy", "graded", "asked")), strict=True
    )
    if graded and asked and np.isfinite(score)
  ]
  wins = [
    1 if good > bad else 0.5 if good == bad else 0
    for (good, right), (bad, wrong) in itertools.product(counted, counted)
    if right and not wrong
  ]
  assert 0 < len(wins)
  for parts in ([rows], split(rows, 7, 20)):
    found = grading.pair_accuracies(parts)
    assert found == {NAME: pytest.approx(np.mean(wins), abs=1e-12)}


@pytest.mark.parametrize("accuracy", [0, 1])
def test_without_right_or_wrong_completions_there_is_no_pair(accuracy):
  rows = draw(0) | {"accuracy": np.full(30, accuracy, np.float32)}
  assert grading.pair_accuracies([rows]) == {}


def test_a_run_without_networks_has_no_pair_accuracy():
  rows = draw(0)
  del rows[NAME]
  assert grading.pair_accuracies([rows]) == {}
