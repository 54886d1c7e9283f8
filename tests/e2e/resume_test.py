"""A run that is killed and started again is the run that never was."""

import json
import pathlib
import re

import numpy as np
import pytest
from pyarrow import parquet

from grpo_tpu.observability import sample_files
from grpo_tpu.rewards.settings import COMPONENTS
from tests.e2e import buckets
from tests.e2e.conftest import TINY, Run

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Two steps, after which its head is no longer zero.
REWARD_MODEL = (
  "--config.data.kind=preference",
  "--config.objective.preset=bradley_terry",
  "--config.optimizer.learning_rate=1e-2",
  "--config.train.num_steps=2",
  "--config.eval.every_steps=0",
)

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


def test_the_samples_of_a_step_add_up_to_its_metrics(unbroken):
  table = parquet.read_table(unbroken.workdir / "samples").to_pylist()
  for row in unbroken.rows()[2::2]:
    own = [x for x in table if x["step"] == row["step"] and x["valid"]]
    means = {
      "rollout/reward": np.mean([x["reward"] for x in own]),
      "rollout/accuracy": np.mean([x["reward/accuracy"] for x in own]),
      "rollout/completion_length": np.mean(
        [x["completion_tokens"] for x in own]
      ),
      "rollout/truncated_fraction": np.mean(
        [x["finish_reason"] == "length" for x in own]
      ),
    }
    assert {name: row[name] for name in means} == pytest.approx(means, rel=1e-5)


def test_the_code_of_the_guide_reads_the_samples(
  unbroken, tmp_path, monkeypatch, capsys
):
  """The page names every column with its type, in the order of a file."""
  page = (ROOT / "docs" / "samples.md").read_text()
  (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.M)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "smoke").symlink_to(unbroken.workdir)
  monkeypatch.chdir(tmp_path)
  exec(code, {})
  assert "<start_of_turn>user" in capsys.readouterr().out
  rows = re.findall(r"^\| `(.*?)` \| (\w+) \|", page, re.M)
  known = [(k, x) for k, x in rows if k != "reward/NAME"]
  assert known == list(sample_files.COLUMNS.items())
  schema = parquet.read_schema(
    unbroken.workdir / "samples" / "step_00000002.parquet"
  )
  # Arrow's own name of float32 is "float".
  found = [(x.name, str(x.type).replace("float", "float32")) for x in schema]
  shown = [x for x in found if not x[0].startswith("reward/")]
  assert shown == [x for x in known if x[0] not in ("label", "length_penalty")]
  assert {x for x in found if x not in shown} == {
    (f"reward/{name}", "float32") for name in COMPONENTS
  }


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
  resumed = unbroken.without_checkpoints_after(2).start()
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


@pytest.mark.nightly
def test_rewards_of_networks_survive_a_kill(new_run):
  """A reward model with running statistics, and a judge."""
  trained = new_run(*REWARD_MODEL).start()
  settings = (
    f"--config.rewards.models={((f'run:{trained.workdir}', 0.5),)}",
    "--config.rewards.model_normalization=running",
    "--config.rewards.judges=(('self', 'agreement', 2.0),)",
    "--config.train.num_steps=4",
    "--config.eval.every_steps=2",
  )
  unbroken = new_run(*settings).start()
  resumed = new_run(*settings)
  resumed.kill_at(3)
  resumed.start()
  assert_same(resumed, unbroken)
  for name in ("model_1", "judge_1"):
    assert min(unbroken.column(f"reward/{name}_std")[1:]) > 0
    assert sum(unbroken.column(f"reward/{name}_errors")[1:]) == 0


def test_a_run_that_only_a_bucket_keeps_ends_as_the_one_on_a_disk(
  bucket, program, drawn, unbroken, tmp_path
):
  """Killed between two puts, with all of its machine, and started again."""
  run = buckets.BucketRun(
    bucket,
    program.environment,
    tmp_path / "machines",
    *("--config=configs/smoke.py", *TINY),
    f"--config.data.dir={buckets.upload(bucket, drawn, 'data')}",
  )
  start = run.start()
  start.wait_until(lambda: 2 in run.checkpoints())
  run.kill_at_put(start, 5)
  run.release()
  run.finish()
  local = Run(program, run.copy(tmp_path / "copy"))
  assert_same(local, unbroken)
