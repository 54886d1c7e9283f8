"""A run that stops at a target, and its best checkpoint, across SIGKILL."""

import json

import pytest

from grpo_tpu.checkpoint import load
from tests.e2e.resume_test import lines_but_for_time

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]
SETTINGS = (
  "--config.train.num_steps=5",
  "--config.optimizer.learning_rate=3e-3",
  "--config.eval.every_steps=1",
  "--config.eval.num_samples=2",
  "--config.checkpoint.keep=1",
  "--config.checkpoint.best_metric=eval/reward",
  "--config.checkpoint.best_mode=min",
)


def best_of(run) -> str:
  return load.resolve_weights(f"run:{run.workdir}@best")


def test_a_killed_run_stops_at_the_target_and_keeps_its_best(new_run, drawn):
  sets = f"--config.eval.sets=(('geo', {str(drawn)!r}, 'train'),)"
  unbroken = new_run(*SETTINGS, sets).start()
  rewards = unbroken.column("eval/reward/geo")
  # The first step after the start that is better than all before.
  step = next(s for s in range(2, 6) if rewards[s] < min(rewards[:s]))
  rule = f"eval/reward/geo <= {rewards[step]!r}"
  run = new_run(*SETTINGS, sets, f"--config.train.stop_when={rule}")
  # Once before the evaluation that decides, once after it, before the save.
  run.kill_at(step - 1)
  run.kill_at(step)
  run.start()
  wanted = lines_but_for_time(unbroken)
  assert lines_but_for_time(run) == wanted[: step + 1]
  end = json.loads((run.workdir / "run.json").read_text())["end"]
  assert (end["exit_code"], end["step"]) == (0, step)
  assert end["reason"].startswith("train.stop_when (eval/reward/geo <= ")
  assert end["newest_checkpoint"].endswith(f"{step:08}")
  before = (run.workdir / "metrics.jsonl").read_bytes()
  run.start()
  assert (run.workdir / "metrics.jsonl").read_bytes() == before
  # With another target it continues, as if it had never stopped.
  run.start("--config.train.stop_when=eval/reward <= -1")
  assert lines_but_for_time(run) == wanted
  own = unbroken.column("eval/reward")
  best = max(s for s in range(6) if own[s] == min(own))
  assert best_of(run) == f"run:{run.workdir}@{best}"
  assert best_of(unbroken) == f"run:{unbroken.workdir}@{best}"
