"""What a run can start from and learn from, and what it leaves behind."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.e2e


def test_grpo_goes_on_from_where_the_warm_start_ended(new_run):
  warm_start = new_run(
    "--config.data.prompts_per_step=32",
    "--config.train.microbatch_bundles=32",
    "--config.train.num_steps=20",
    "--config.eval.every_steps=20",
    "--config.optimizer.warmup_steps=2",
    "--config.checkpoint.every_steps=20",
    "--config.optimizer.learning_rate=2e-3",
    config="configs/smoke.py:warm_start",
  ).start()
  nll = warm_start.column("train/nll")
  assert np.mean(nll[-3:]) < nll[0] / 2
  first, last = warm_start.column("eval/accuracy")
  grpo = new_run(
    f"--config.model.weights=run:{warm_start.workdir}",
    "--config.train.num_steps=1",
  ).start()
  assert grpo.column("eval/accuracy")[0] == last
  # Equal because it is the same policy, not because both know nothing.
  assert (
    grpo.column("eval/reward")[0]
    == warm_start.column("eval/reward")[-1]
    > warm_start.column("eval/reward")[0]
  )
  assert last >= first


PREFERENCE = (
  "--config.data.kind=preference",
  "--config.data.preference_completions=3",
  "--config.optimizer.learning_rate=3e-3",
)


@pytest.fixture(scope="module")
def preference(new_run):
  return new_run(
    *PREFERENCE,
    "--config.train.num_steps=12",
    "--config.eval.every_steps=12",
    "--config.checkpoint.every_steps=50",
  ).start()


def test_labelled_completions_teach_the_policy_to_prefer(preference):
  assert preference.column("data/skipped") == [0] * 12
  assert preference.column("train/preference_accuracy") == [1.0] * 12
  accuracy = preference.column("train/implicit_preference_accuracy")
  margin = preference.column("train/implicit_preference_margin")
  # Before the first update the policy is the reference: every pair is a tie.
  assert (accuracy[0], margin[0]) == (0.5, 0.0)
  assert np.mean(accuracy[-4:]) > 0.7
  assert np.mean(margin[-4:]) > 0


def test_what_is_preferred_is_preferred_on_held_out_problems_too(preference):
  assert preference.column("eval/preference_accuracy") == [1.0, 1.0]
  first, last = preference.column("eval/implicit_preference_accuracy")
  assert first == 0.5 and last > 0.7
  first, last = preference.column("eval/implicit_preference_margin")
  assert first == 0.0 and last > 0


def test_a_checkpoint_moves_from_preference_to_online_and_back(
  new_run, preference
):
  online = new_run(
    f"--config.model.weights=run:{preference.workdir}",
    "--config.train.num_steps=1",
  ).start()
  back = new_run(
    *PREFERENCE,
    f"--config.model.weights=run:{online.workdir}",
    "--config.train.num_steps=1",
  ).start()
  for later, earlier in ((online, preference), (back, online)):
    assert later.column("eval/reward")[0] == earlier.column("eval/reward")[-1]
  # It is measured against where this run began, not the first one.
  assert back.column("eval/implicit_preference_accuracy")[0] == 0.5


def test_evaluate_finds_what_training_found_last(evaluation, unbroken):
  folder = evaluation.workdir / "eval"
  scores = json.loads((folder / "scores.json").read_text())
  last = unbroken.rows()[-1]
  found = {k: x for k, x in last.items() if k.startswith("eval/")}
  # This evaluation samples as well.
  drawn = ("eval/mean_at_", "eval/pass_at_")
  again = {
    k: x for k, x in scores["scalars"].items() if not k.startswith(drawn)
  }
  assert found and again == found
  assert scores["weights"] == f"run:{unbroken.workdir}@6"

  def accuracy(name):
    answers = json.loads((folder / name).read_text())
    assert len(answers) == 32
    return np.mean([answer["strict_true_false"] for answer in answers.values()])

  assert scores["scalars"]["eval/accuracy"] == accuracy("output_eval.json")
  assert scores["accuracy"]["share"] == accuracy("output_eval.json")
  for name, found in scores["ablations"].items():
    assert found["accuracy"]["share"] == accuracy(f"output_eval_{name}.json")
  assert scores["sampled"]["accuracy"]["share"] == pytest.approx(
    np.mean([accuracy(f"samples/output_eval_00{i}.json") for i in range(2)])
  )
  assert "data:image/" in (folder / "report.html").read_text()


@pytest.mark.nightly
def test_a_reward_model_learns_resumes_and_is_evaluated(new_run):
  flags = (
    *PREFERENCE,
    "--config.objective.preset=bradley_terry",
    "--config.eval.every_steps=6",
    "--config.checkpoint.best_metric=eval/pairwise_accuracy",
  )
  whole = new_run(*flags).start()
  assert whole.column("train/loss")[0] == pytest.approx(np.log(2), abs=1e-6)
  assert whole.column("eval/pairwise_accuracy")[0] == 0.5
  again = whole.without_checkpoints_after(2).start()
  for name in ("train/loss", "train/score_std", "eval/pairwise_margin"):
    assert again.column(name) == whole.column(name)
  whole.start("--mode=evaluate")
  scores = json.loads((whole.workdir / "eval" / "scores.json").read_text())
  last = whole.rows()[-1]
  found = {k: x for k, x in last.items() if k.startswith("eval/")}
  assert scores["scalars"] == pytest.approx(found)
  assert "<svg" in (whole.workdir / "eval" / "report.html").read_text()
