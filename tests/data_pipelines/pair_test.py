"""The command that labels the responses of results files."""

import subprocess
import sys

import pytest

from tests.data_pipelines.preferences.label_results_test import (
  groups,
  record,
  write,
)


@pytest.mark.parametrize("flags", [["a.json"], ["a.json", "--no_such=1"]])
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
