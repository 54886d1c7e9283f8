import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*args):
  return subprocess.run(
    [sys.executable, "-m", "data_pipelines.prepare", *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_the_command_makes_what_its_flags_say(tmp_path):
  args = ["--num_problems=40", "--kinds=color,count", "--image_size=32"]
  done = run(f"--data_dir={tmp_path / 'data'}", *args, "--difficulty=2")
  assert done.returncode == 0, done.stderr
  assert done.stdout == ""
  drawn = json.loads((tmp_path / "data/manifest.json").read_text())["request"]
  assert drawn["source"]["kinds"] == ["color", "count"]
  assert drawn["source"]["difficulty"] == 2


@pytest.mark.parametrize(
  "args, said",
  [
    (["--difficulty=9"], "difficulty (9) must be at least 1 and at most 5."),
    (["--difficulty=hard"], "--difficulty=hard"),
    (["--colour=red"], "'colour'"),
    (["here"], "['here']"),
  ],
)
def test_a_wrong_flag_exits_64_and_says_why(tmp_path, args, said):
  done = run(f"--data_dir={tmp_path / 'data'}", *args)
  assert done.returncode == 64
  assert said in done.stderr and "Traceback" not in done.stderr
  assert list(tmp_path.iterdir()) == []
