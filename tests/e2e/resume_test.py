"""A run that is killed and started again is the run that never was."""

import json
import pathlib

import pytest

pytestmark = pytest.mark.e2e


def lines_but_for_time(run) -> list[str]:
  """The lines of `metrics.jsonl`, less what a clock or a disk decides."""
  return [
    json.dumps(
      {
        name: value
        for name, value in row.items()
        if not name.startswith(("perf/", "checkpoint/"))
      }
    )
    for row in run.rows()
  ]


def samples(run) -> dict[str, bytes]:
  folder: pathlib.Path = run.workdir / "samples"
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(resumed, unbroken) -> None:
  assert lines_but_for_time(resumed) == lines_but_for_time(unbroken)
  assert samples(resumed) == samples(unbroken)


def test_a_killed_run_ends_as_the_unbroken_one(resumed, unbroken):
  assert [row["step"] for row in unbroken.rows()] == list(range(7))
  assert_same(resumed, unbroken)


def test_every_step_is_a_different_one(unbroken):
  """So that lines which are equal are equal for a reason."""
  assert len(set(unbroken.column("train/loss"))) == 6
  assert len(set(unbroken.column("train/grad_norm"))) == 6
  assert all(norm > 0 for norm in unbroken.column("train/grad_norm"))
  assert sorted(samples(unbroken)) == [
    f"step_0000000{step}.parquet" for step in (2, 4, 6)
  ]


def test_a_finished_run_is_left_as_it_is(unbroken):
  before = (unbroken.workdir / "metrics.jsonl").read_bytes()
  unbroken.start()
  assert (unbroken.workdir / "metrics.jsonl").read_bytes() == before


def test_optimizer_reference_and_position_survive_a_kill(new_run):
  """Two updates a step, a schedule, a KL, and steps of several batches."""
  settings = (
    "--config.train.num_steps=4",
    # With it, prompts are drawn again before the kill.
    "--config.seed=2",
    "--config.train.num_iterations=2",
    "--config.objective.beta=0.1",
    "--config.optimizer.schedule=cosine",
    "--config.optimizer.warmup_steps=1",
    "--config.eval.every_steps=0",
    # Of two completions, some are paid the same.
    "--config.rollout.num_generations=2",
    "--config.shaping.zero_variance=resample",
    "--config.shaping.top_entropy_share=0.5",
    "--config.shaping.entropy_bonus=0.01",
  )
  unbroken = new_run(*settings).start()
  resumed = new_run(*settings)
  resumed.kill_at(3)
  resumed.start()
  assert_same(resumed, unbroken)
  # Not a run in which there was nothing to keep.
  assert unbroken.column("train/kl")[-1] > 0
  assert unbroken.column("train/old_kl")[-1] > 0
  assert len(set(unbroken.column("train/learning_rate"))) > 2
  assert sum(unbroken.column("rollout/batches")[:2]) > 2


@pytest.mark.nightly
def test_masters_of_bfloat16_weights_survive_a_kill(new_run):
  """At a rate at which an update moves masters and few of the weights."""
  settings = (
    "--config.model.param_dtype=bfloat16",
    "--config.model.train_vision=False",
    "--config.train.num_steps=4",
    "--config.train.num_iterations=2",
    "--config.optimizer.learning_rate=1e-5",
    "--config.eval.every_steps=0",
  )
  unbroken = new_run(*settings).start()
  resumed = new_run(*settings)
  resumed.kill_at(3)
  resumed.start()
  assert_same(resumed, unbroken)
  # The masters decide this one, to the bit.
  assert unbroken.column("train/update_below_half_ulp_fraction")[-1] > 0
