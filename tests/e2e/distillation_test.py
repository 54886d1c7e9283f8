"""A teacher teaches a policy that learns from no reward."""

import json

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]


@pytest.fixture(scope="module")
def teacher(new_run):
  return new_run("--config.train.num_steps=1").start()


@pytest.fixture(scope="module")
def settings(teacher):
  return (
    "--config.objective.preset=distill",
    f"--config.objective.teacher=run:{teacher.workdir}",
    "--config.model.weights=random:7",
    "--config.rewards.preset=none",
    "--config.rewards.length=0.0",
    "--config.shaping.zero_variance=drop",
    "--config.train.num_iterations=2",
  )


def test_a_killed_run_ends_as_the_unbroken_one(new_run, settings, teacher):
  unbroken = new_run(*settings).start()
  resumed = new_run(*settings)
  resumed.kill_at(3)
  resumed.start()

  def columns(run):
    return [
      {k: x for k, x in row.items() if k.startswith(("train/", "eval/"))}
      for row in run.rows()
    ]

  assert columns(resumed) == columns(unbroken)
  kl = unbroken.column("train/teacher_kl")
  assert 0 < kl[-1] < kl[0]
  # No group has a reward, and all of them are in the batch.
  assert min(unbroken.column("train/tokens")) > 0
  record = json.loads((unbroken.workdir / "run.json").read_text())
  essence = record["essence"]
  assert essence["objective.teacher"] == f"run:{teacher.workdir}@1"
  assert len(essence["objective.teacher: contents"]) == 64
