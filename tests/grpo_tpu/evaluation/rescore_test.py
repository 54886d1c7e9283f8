"""Saved samples scored again: the same rewards give the same totals."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.sources import stored
from grpo_tpu.evaluation import rescore
from grpo_tpu.observability import writer as metrics
from grpo_tpu.rewards import scoring
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
  stored.write({"train": PROBLEMS[:2], "eval": PROBLEMS[2:4]}, folder)
  return str(folder)


def samples_of(config):
  """The samples that a run with these rewards writes."""
  problems = [PROBLEMS[i % 3] for i in range(len(COMPLETIONS))]
  scores = scoring.score(COMPLETIONS, problems, config)
  return [
    metrics.Sample(
      pid=problem.pid,
      prompt="What?",
      completion=completion,
      answer=problem.answer,
      reward=float(scores.total[i]),
      rewards={k: float(v[i]) for k, v in scores.components.items()},
      image=None,
    )
    for i, (problem, completion) in enumerate(
      zip(problems, COMPLETIONS, strict=True)
    )
  ]


@pytest.fixture
def saved(tmp_path):
  """The file of samples that a run writes."""
  with metrics.Writer(tmp_path, is_writer=True, resume_step=None) as writer:
    writer.write_samples(1, samples_of(CONFIG), split="train")
  return str(tmp_path / "samples" / "train.jsonl")


def score_again(saved, data_dir, config):
  rows = rescore.read_samples(saved)
  problems = rescore.read_problems({row["pid"] for row in rows}, data_dir)
  return rescore.rescore(rows, problems, config)


def test_the_rewards_of_the_run_change_nothing(saved, data_dir):
  result = score_again(saved, data_dir, CONFIG)
  assert result.num_changed == 0
  rows = rescore.read_samples(saved)
  assert [row | {"failed": []} for row in rows] == result.rows


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
  assert [row["failed"] for row in result.rows] == [[], [], [], ["raising"]]
  assert result.rows[3]["reward"] == 0.0
  lines = [line.split() for line in result.table.splitlines()]
  brevity = [1 / (1 + len(completion)) for completion in COMPLETIONS[:3]]
  mean, std = f"{np.mean(brevity):.4f}", f"{np.std(brevity):.4f}"
  assert lines[-2] == ["raising", "2", mean, std, "-", "3", "of", "4"]
  # The others did not fail: of all rows, half are right.
  assert lines[1] == ["accuracy", "1", "0.5000", "0.5000", "0.5000", *ALL]
  assert lines[-1][-3:] == ["3", "of", "4"]
  assert not result.error


def test_an_unfinished_last_line_is_skipped(saved):
  path = pathlib.Path(saved)
  whole = rescore.read_samples(saved)
  path.write_bytes(path.read_bytes()[:-5])
  assert rescore.read_samples(saved) == whole[:-1]


SAMPLE = '{"pid": "p0", "completion": "", "reward": %s, "rewards": %s}'


@pytest.mark.parametrize(
  "line",
  [
    "{",
    '{"pid": "p0"}',
    "3",
    "[" * 100_000,
    SAMPLE % ('"a"', "{}"),
    SAMPLE % ("1" + "0" * 400, "{}"),
    SAMPLE % ("0", "[]"),
    SAMPLE % ("0", '{"accuracy": []}'),
  ],
)
def test_a_line_that_is_no_sample_is_refused_by_its_number(saved, line):
  with open(saved, "a") as file:
    file.write(line + "\n")
  with pytest.raises(ValueError, match=r"^--samples \(.* line 5 "):
    rescore.read_samples(saved)


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
  out = tmp_path / "out.jsonl"
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
  assert [row["rewards"]["brevity"] for row in rows] == pytest.approx(
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
