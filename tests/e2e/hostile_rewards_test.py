"""Rewards that attack their worker cost rows, never the run or its machine."""

import pytest

from tests.data_pipelines.workers.pool_test import await_end, is_alive
from tests.e2e import hostile_rewards
from tests.e2e.conftest import Run, summary

pytestmark = pytest.mark.e2e
STEPS, PROMPTS, COMPLETIONS = 3, 8, 4


@pytest.fixture
def run(program, drawn, tmp_path, monkeypatch):
  environment = program.environment | {"HOSTILE_FOLDER": str(tmp_path)}
  monkeypatch.setattr(program, "environment", environment)

  def make(*names):
    paths = [f"tests.e2e.hostile_rewards:{name}" for name in names]
    return Run(
      program,
      tmp_path / "run",
      "--config=configs/smoke.py",
      f"--config.data.dir={drawn}",
      f"--config.data.prompts_per_step={PROMPTS}",
      "--config.data.prompt_buckets=(64,)",
      f"--config.train.num_steps={STEPS}",
      "--config.train.microbatch_bundles=4",
      f"--config.rollout.num_generations={COMPLETIONS}",
      "--config.eval.every_steps=0",
      "--config.samples.every_steps=1",
      f"--config.rewards.custom={tuple(paths)!r}",
      f"--config.rewards.custom_weights={(0.1,) * len(paths)!r}",
      "--config.rewards.num_workers=2",
      "--config.rewards.timeout_seconds=2",
      "--config.rewards.max_error_fraction=0.9",
    )

  return make


def pids_of(folder):
  return set(map(int, (folder / "pids").read_text().split()))


def test_a_run_goes_on_and_excludes_and_counts_the_rows_at_fault(run, tmp_path):
  trained = run(*hostile_rewards.NAMES).start()
  assert summary(trained.workdir)["exit_code"] == 0
  counts = {
    name: trained.column(f"reward/{name}_errors")
    for name in hostile_rewards.NAMES
  }
  # Whole groups fail, since a problem is the trap; few of them, but all kinds.
  flat = sum(counts.values(), [])
  assert all(count % COMPLETIONS == 0 for count in flat)
  assert all(map(sum, counts.values())), counts
  assert sum(flat) < STEPS * PROMPTS * COMPLETIONS
  assert trained.column("reward/errors") == [
    sum(step) for step in zip(*counts.values(), strict=True)
  ]
  assert trained.column("train/skipped_updates") == [0] * STEPS
  assert not (tmp_path / "exploded").exists()
  assert not any(map(is_alive, pids_of(tmp_path)))


def test_no_process_outlives_a_run_that_is_killed(run, tmp_path):
  killed = run("lasting", "stopping")
  killed.kill_at(1)
  pids = pids_of(tmp_path)
  assert len(pids) > PROMPTS
  for pid in pids:
    await_end(pid)
