"""Figures of reward models whose scores are known."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from data_pipelines import pipeline
from data_pipelines.scoring import statistics
from grpo_tpu.config import eval_metrics
from grpo_tpu.evaluation import reward_models
from grpo_tpu.rl import experience, score
from tests.grpo_tpu import scripted
from tests.grpo_tpu.evaluation.preferences_test import completion_source

NAN = np.nan


def figures(scores, labels, lengths=None, skipped=None):
  scores, labels = np.array(scores, np.float32), np.array(labels, np.float32)
  lengths = np.ones(scores.shape, int) if lengths is None else lengths
  skipped = np.zeros(len(scores)) if skipped is None else skipped
  return reward_models.figures(
    scores, labels, np.array(lengths), np.array(skipped, bool)
  )


def test_figures_of_three_problems_are_those_worked_by_hand():
  found = figures(
    [[2, 1, 1], [0, 3, 9], [5, 5, 9]],
    [[1, 0, 0.5], [1, 0, NAN], [1, 1, NAN]],
    [[4, 2, 4], [3, 5, 0], [7, 1, 0]],
    [False, False, True],
  )
  # Differences of score: 1, 1, 0 (a tie) and -3; of length: 2, 0, 2 and -2.
  scalars, root = found["scalars"], np.sqrt
  assert scalars["eval/pairwise_count"] == 4
  assert scalars["eval/pairwise_accuracy"] == 2.5 / 4
  assert scalars["eval/pairwise_longer_accuracy"] == 2.5 / 4
  assert scalars["eval/pairwise_margin"] == pytest.approx(-1 / 4)
  assert scalars["eval/score_length_correlation"] == pytest.approx(
    (1 * 2 + 3 * 2) / (root(11) * root(12))
  )
  present = [2, 1, 1, 0, 3, 5, 5]
  assert scalars["eval/score_mean"] == pytest.approx(np.mean(present))
  assert scalars["eval/score_std"] == pytest.approx(np.std(present))
  assert (found["skipped"], found["unpaired_completions"]) == (1, 2)


def test_pairs_of_different_problems_have_wilsons_interval():
  right = np.arange(40) % 4 > 0
  scores = np.where(right[:, None], [[1, 0]], [[0, 1]])
  found = figures(scores, np.tile([1, 0], (40, 1)))["accuracy"]
  want = statistics.share(30, 40)
  # The variance of clusters has a degree of freedom less.
  assert found["low"] == pytest.approx(want["low"], abs=0.01)
  assert found["high"] == pytest.approx(want["high"], abs=0.01)


def test_copies_of_a_pair_make_no_interval_narrower():
  right = np.arange(40) % 4 > 0
  scores = np.where(right[:, None], [[1, 0, 0, 0]], [[0, 1, 1, 1]])
  one, three = (
    figures(scores[:, :count], np.tile([1, 0, 0, 0], (40, 1))[:, :count])
    for count in (2, 4)
  )
  assert three["accuracy"]["pairs"] == 3 * one["accuracy"]["pairs"]
  for end in ("share", "low", "high"):
    assert three["accuracy"][end] == pytest.approx(one["accuracy"][end])


def test_all_right_is_as_sure_as_the_number_of_problems():
  scores = np.tile([9, 0, 0, 0], (12, 1))
  found = figures(scores, np.tile([1, 0, 0, 0], (12, 1)))["accuracy"]
  assert found["low"] == statistics.share(12, 12)["low"]
  assert found["high"] == 1


def test_a_calibrated_model_has_no_calibration_error_and_a_bold_one_has():
  """Labels are drawn by the model's own chances."""
  rng = np.random.default_rng(0)
  margin = rng.normal(0, 2, 20_000)
  is_first = rng.random(20_000) < 1 / (1 + np.exp(-margin))
  labels = np.stack([is_first, ~is_first], 1)
  errors = [
    figures(np.stack([scale * margin, 0 * margin], 1), labels)["scalars"][
      "eval/pairwise_calibration_error"
    ]
    for scale in (1, 3)
  ]
  assert errors[0] < 0.01 and errors[1] > 0.08


def test_the_reliability_curve_bins_by_predicted_chance():
  """By hand: sigmoid(0) is 0.5, sigmoid(2) is 0.881, sigmoid(9) nearly 1."""
  first, second, third = reward_models.reliability(np.array([0, 2, -2, 9.0]))
  assert (first["low"], first["right"], first["predicted"]) == (0.5, 0.5, 0.5)
  assert second["low"] == pytest.approx(0.85)
  assert (second["pairs"], second["right"]) == (2, 0.5)
  assert second["predicted"] == pytest.approx(0.8808, abs=1e-4)
  assert (third["high"], third["right"]) == (1, 1)


def test_without_pairs_there_is_nothing_but_their_number():
  found = figures([[1, 2]], [[1, 1]])
  assert found["scalars"] == {"eval/pairwise_count": 0}
  assert found["unpaired_completions"] == 2


FACTS = {
  "set": "", "split": "eval", "split_size": 3, "parts": (),
  "model": "<tiny>", "weights": "run:W@3", "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize("labels", [[[1, 0]], [[1, 1]]], ids=["pairs", "none"])
def test_the_report_is_a_picture_and_a_table(tmp_path, labels):
  folder = epath.Path(tmp_path) / "eval"
  reward_models.write(figures([[2, 1]], labels), folder, FACTS)
  html, text = ((folder / f"report.{x}").read_text() for x in ("html", "md"))
  assert "&lt;tiny&gt;" in html and "<svg" in html or labels[0][1]
  assert "Pairwise accuracy 100.0 %" in text or "No two completions" in text
  assert '"weights": "run:W@3"' in (folder / "scores.json").read_text()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return scripted.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def evaluated(tokenizer, monkeypatch):
  """Evaluates by the length of completions; no host's reward may run."""

  def score_batch(forward, params, bundles, *, num_microbatches):
    assert forward.config.has_score
    return bundles.completion_mask.sum(-1).astype(jnp.float32)

  monkeypatch.setattr(score, "score_batch", score_batch)
  monkeypatch.setattr(experience.scoring, "score", None)

  def scalars(batch_size):
    run = scripted.make_run(
      tokenizer, {}, kind="preference", preset="bradley_terry"
    )
    builder = scripted.make_builder(
      scripted.Source(range(5)),
      tokenizer,
      kind="preference",
      completion_source=completion_source,
      num_labelled=3,
    )
    batches = pipeline.EvalBatches(
      builder, num_problems=5, batch_size=batch_size
    )
    return run, reward_models.evaluate(run.collector, {}, batches)["scalars"]

  return scalars


def test_batches_and_padding_change_no_figure(evaluated):
  run, want = evaluated(5)
  assert evaluated(2)[1] == pytest.approx(want)
  # A model that counts tokens.
  assert want["eval/pairwise_accuracy"] == want["eval/pairwise_longer_accuracy"]
  assert want["eval/score_length_correlation"] == pytest.approx(1)
  config = run.config
  declared = eval_metrics.names(config.eval, config.data, is_reward_model=True)
  assert set(declared) == set(want)


def test_a_step_takes_labels_and_runs_no_reward_of_the_host(
  tokenizer, monkeypatch
):
  monkeypatch.setattr(experience.scoring, "score", None)
  run = scripted.make_run(
    tokenizer, {}, kind="preference", preset="bradley_terry"
  )
  builder = scripted.make_builder(
    scripted.Source((0, scripted.UNREADABLE, 3)),
    tokenizer,
    kind="preference",
    completion_source=completion_source,
    num_labelled=3,
  )
  batches = pipeline.EvalBatches(builder, num_problems=3, batch_size=3)
  found = run.collect(batches, None, num_shown=1)
  batch = found.batch
  np.testing.assert_allclose(
    batch.labels, [[1, 0, 0.5], [NAN] * 3, [0.4, 0.4, NAN]]
  )
  assert batch.advantages is None and batch.preferred is None
  assert found.metrics["data/skipped"] == 1
  assert [x.columns["label"] for x in found.samples][:3] == [1, 0, 0.5]
