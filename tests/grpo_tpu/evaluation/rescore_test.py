"""Saved samples scored again: the same rewards give the same totals."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from grpo_tpu.evaluation import rescore
from grpo_tpu.observability import sample_files
from grpo_tpu.rewards import scoring
from tests.data_pipelines.sources import taken
from tests.grpo_tpu.rewards.custom_test import config_of
from tests.grpo_tpu.scripted import PROBLEMS

ROOT = pathlib.Path(__file__).resolve().parents[3]
COMPLETIONS = ("<answer>3</answer>", "I say 3.", "", "Trap <answer>3</answer>")
CONFIG = config_of()
ALL = ["4", "of", "4"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data dir with two splits, as prepare makes one."""
  folder = tmp_path_factory.mktemp("rescore") / "data"
  taken.write({"train": PROBLEMS[:2], "eval": PROBLEMS[2:4]}, folder)
  return str(folder)


def samples_of(config):
  """The samples that a run with these rewards writes."""
  problems = [PROBLEMS[i % 3] for i in range(len(COMPLETIONS))]
  truncated = [False, True, False, False]  # "I say 3." has no answer then.
  scores = scoring.score(COMPLETIONS, problems, config, truncated=truncated)
  return [
    {
      "step": 1,
      "pid": problem.pid,
      "completion": completion,
      "answer": problem.answer,
      "read_answer": scores.answers[i],
      "reward": float(scores.total[i]),
      **{f"reward/{k}": float(v[i]) for k, v in scores.components.items()},
      "valid": True,
      "finish_reason": "length" if truncated[i] else "stop",
    }
    for i, (problem, completion) in enumerate(
      zip(problems, COMPLETIONS, strict=True)
    )
  ]


@pytest.fixture
def saved(tmp_path):
  """The folder of samples that a run writes."""
  folder = tmp_path / "samples"
  folder.mkdir()
  rows = samples_of(CONFIG)
  for step, part in enumerate((rows[:1], rows[1:])):
    sample_files.write_rows(folder / f"step_0000000{step}.parquet", part)
  return str(folder)


def score_again(saved, data_dir, config):
  rows = rescore.read_samples(saved)
  problems = rescore.read_problems({row["pid"] for row in rows}, data_dir)
  return rescore.rescore(rows, problems, config)


def test_the_rewards_of_the_run_change_nothing(saved, data_dir):
  result = score_again(saved, data_dir, CONFIG)
  assert result.num_changed == 0
  rows = rescore.read_samples(saved)
  assert rows == result.rows


def test_a_length_penalty_stays_in_the_total(saved, data_dir):
  rows = [
    row | {"reward": float(np.float32(row["reward"]) + np.float32(-0.3))}
    for row in rescore.read_samples(saved)
  ]
  rows = [row | {"length_penalty": float(np.float32(-0.3))} for row in rows]
  problems = rescore.read_problems({row["pid"] for row in rows}, data_dir)
  assert rescore.rescore(rows, problems, CONFIG).num_changed == 0


def test_other_weights_change_what_they_weigh(saved, data_dir):
  """Two of four have the format; one of them is right."""
  config = dataclasses.replace(CONFIG, format=0.5)
  result = score_again(saved, data_dir, config)
  assert [row["reward"] for row in result.rows] == [1.5, 0.0, 0.0, 1.5]
  assert result.num_changed == 2
  lines = [line.split() for line in result.table.splitlines()]
  assert lines[2] == ["format", "0.5", "0.5000", "0.5000", "0.5000", *ALL]
  assert lines[-1] == ["total", "0.7500", "0.7500", "0.5500", *ALL]


def test_a_new_reward_that_fails_leaves_its_row_out(saved, data_dir):
  result = score_again(saved, data_dir, config_of("raising"))
  scoring.close()
  assert [row["valid"] for row in result.rows] == [True, True, True, False]
  assert result.rows[3]["reward"] == 0.0
  lines = [line.split() for line in result.table.splitlines()]
  brevity = [1 / (1 + len(completion)) for completion in COMPLETIONS[:3]]
  mean, std = f"{np.mean(brevity):.4f}", f"{np.std(brevity):.4f}"
  assert lines[-2] == ["raising", "2", mean, std, "-", "3", "of", "4"]
  # The others did not fail: of all rows, half are right.
  assert lines[1] == ["accuracy", "1", "0.5000", "0.5000", "0.5000", *ALL]
  assert lines[-1][-3:] == ["3", "of", "4"]
  assert not result.error


@pytest.mark.parametrize(
  "changes",
  [
    {"pid": None},
    {"completion": 3},
    {"reward": "a"},
    {"reward": None},
    {"reward": np.nan},
    {"reward/accuracy": "a"},
  ],
)
def test_a_row_that_is_no_sample_is_refused_by_its_number(
  saved, tmp_path, changes
):
  path = tmp_path / "bad.parquet"
  rows = [row | changes for row in rescore.read_samples(saved)]
  parquet.write_table(pa.Table.from_pylist(rows), path)
  with pytest.raises(ValueError, match="row 1 of .*bad.parquet"):
    rescore.read_samples(str(path))


def test_files_without_samples_are_refused(saved, tmp_path):
  (path, _) = sorted(pathlib.Path(saved).iterdir())
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match="step_00000000.parquet.* whole parquet"):
    rescore.read_samples(saved)
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(ValueError, match="^--samples .* has no samples; name"):
    rescore.read_samples(str(empty))


def test_missing_problems_are_named(data_dir, tmp_path):
  with pytest.raises(ValueError, match=r"^--data_dir .* 1 are not in it.*'p7'"):
    rescore.read_problems({"p0", "p7"}, data_dir)
  with pytest.raises(ValueError, match=r"^data dir .*prepare"):
    rescore.read_problems({"p0"}, str(tmp_path))


def command(*arguments):
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "grpo_tpu.evaluation.rescore",
      "--config=configs/smoke.py",
    ]
    + list(arguments),
    cwd=ROOT,
    # A call of jax.devices() would fail.
    env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
    capture_output=True,
    text=True,
  )


def test_the_command_touches_no_device(saved, data_dir, tmp_path):
  out = tmp_path / "out.parquet"
  result = command(
    f"--samples={saved}",
    f"--data_dir={data_dir}",
    f"--out={out}",
    "--config.rewards.custom=('tests.grpo_tpu.rewards.user_rewards:brevity',)",
    "--config.rewards.custom_weights=(1,)",
    "--config.rewards.num_workers=1",
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.endswith("4 of 4 totals differ from the saved ones.\n")
  rows = rescore.read_samples(str(out))
  assert [row["reward/brevity"] for row in rows] == pytest.approx(
    [1 / (1 + len(completion)) for completion in COMPLETIONS]
  )


def test_a_reward_that_always_fails_has_no_mean_and_exits_1(saved, data_dir):
  result = command(
    f"--samples={saved}",
    f"--data_dir={data_dir}",
    "--config.rewards.custom=('tests.grpo_tpu.rewards.user_rewards:misspelt',)",
    "--config.rewards.custom_weights=(1,)",
  )
  assert result.returncode == 1, result.stderr
  lines = [line.split() for line in result.stdout.splitlines()]
  none = ["-", "-", "-", "0", "of", "4"]
  assert lines[-3] == ["misspelt", "1", *none]
  assert lines[-2] == ["total", *none]
  assert result.stdout.endswith("0 of 0 totals differ from the saved ones.\n")
  assert lines[1][-3:] == ALL
  assert "every one of the last 4 completions" in result.stderr
  assert "user_rewards.py:" in result.stderr
  assert "Traceback" not in result.stderr


def test_the_command_exits_64_on_a_missing_file():
  result = command("--samples=/no/such", "--data_dir=/no/such")
  assert result.returncode == 64
  assert "--samples ('/no/such')" in result.stderr
  assert "Traceback" not in result.stderr and not result.stdout
