"""The command that labels the responses of results files."""

import subprocess
import sys

import pytest

from tests.data_pipelines.preferences.label_results_test import (
  groups,
  record,
  write,
)


@pytest.mark.parametrize(
  "flags",
  [
    ["a.json"],
    ["a.json", "--no_such=1"],
    ["a.json", "--out="],
    ["a.json", "--out=b.jsonl", "--data_dir="],
    ["", "--out=b.jsonl"],
    ["/dev/zero", "--out=b.jsonl"],
  ],
)
def test_the_command_refuses_what_it_cannot_follow_with_64(tmp_path, flags):
  done = subprocess.run(
    [sys.executable, "-m", "data_pipelines.pair", *flags],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 64
  assert "Traceback" not in done.stderr


def test_the_command_writes_the_file_and_says_what_it_counted(tmp_path):
  files = [
    write(tmp_path / f"{i}.json", record(response=text))
    for i, text in enumerate(["12", "7"])
  ]
  out = tmp_path / "out.jsonl"
  done = subprocess.run(
    [sys.executable, "-m", "data_pipelines.pair", *files, f"--out={out}"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert len(groups(out)) == 1
  assert "groups 1, completions 2" in done.stderr


@pytest.mark.parametrize("out", ["folder", "none/out.jsonl"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, out):
  (tmp_path / "folder").mkdir()
  files = [
    write(tmp_path / f"{i}.json", record(response=text))
    for i, text in enumerate(["12", "7"])
  ]
  before = sorted(tmp_path.iterdir())
  done = subprocess.run(
    [sys.executable, "-m", "data_pipelines.pair", *files]
    + [f"--out={tmp_path / out}"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 64
  assert f"--out ({str(tmp_path / out)!r}) must be a file" in done.stderr
  assert "Traceback" not in done.stderr
  assert sorted(tmp_path.iterdir()) == before
