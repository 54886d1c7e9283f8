import json
import pathlib
import subprocess
import sys

import pytest

from grpo_tpu.config import defaults

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


def test_its_defaults_are_those_of_a_run_and_it_says_one_line(tmp_path):
  args = ["--num_problems=60", "--image_size=32"]
  done = run(f"--data_dir={tmp_path / 'data'}", *args)
  assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
  drawn = json.loads((tmp_path / "data/manifest.json").read_text())["request"]
  data = defaults.get_config().data
  wanted = data.synthetic.to_dict() | {"num_problems": 60, "image_size": 32}
  assert drawn["source"] == wanted | {"kinds": list(data.synthetic.kinds)}
  assert drawn["eval_fraction"] == data.synthetic_eval_fraction


def test_another_data_dir_is_kept_unless_it_may_be_replaced(tmp_path):
  args = [f"--data_dir={tmp_path / 'data'}", "--num_problems=60"]
  args += ["--image_size=32", "--kinds=count"]
  assert run(*args).returncode == 0
  before = (tmp_path / "data/manifest.json").read_bytes()
  done = run(*args, "--seed=1")
  assert done.returncode == 64 and "Traceback" not in done.stderr
  for word in ("seed was 0 and is 1", "another --data_dir", "--overwrite"):
    assert word in done.stderr
  assert (tmp_path / "data/manifest.json").read_bytes() == before
  assert run(*args, "--seed=1", "--overwrite").returncode == 0
  assert (tmp_path / "data/manifest.json").read_bytes() != before


@pytest.mark.parametrize(
  "flags",
  [
    ["--data_dir="],
    ["--data_dir=/"],
    ["--data_dir=gs://b"],
    ["--data_dir=~nobody_of_this_name/data"],
    [f"--data_dir={'a' * 300}"],
    ["--data_dir=data", "--source="],
    ["--data_dir=data", "--source=/dev/zero"],
  ],
)
def test_a_path_that_can_be_none_exits_64(flags):
  done = run(*flags)
  assert done.returncode == 64 and "Traceback" not in done.stderr
  assert " must " in done.stderr
  assert not (ROOT / "data").exists() and not (ROOT / "gs:").exists()


def test_a_leading_tilde_is_the_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  done = run("--data_dir=~/data", "--num_problems=60", "--image_size=32")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "data" / "manifest.json").exists()
  done = run("--source=~/data", "--data_dir=~/again")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "again" / "manifest.json").exists()


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


def test_the_guess_of_the_columns_is_said_and_can_be_overruled(tmp_path):
  rows = [
    {"frage": f"What is {i} + 1?", "problem": "none", "richtig": i + 1}
    for i in range(20)
  ]
  source = tmp_path / "quiz.jsonl"
  source.write_text("\n".join(map(json.dumps, rows)))
  args = [f"--source={source}", "--eval_fraction=0", "--vocab_size=512"]
  columns = "--columns=question=frage,answer=richtig"
  done = run(f"--data_dir={tmp_path / 'data'}", *args, columns)
  assert done.returncode == 0, done.stderr
  assert "Columns: question=frage, answer=richtig" in done.stderr
  assert "metadata: problem." in done.stderr
  done = run(f"--data_dir={tmp_path / 'data'}", *args, "--overwrite")
  assert done.returncode == 64 and "Traceback" not in done.stderr
  assert "no column of frage, problem, richtig seems" in done.stderr


@pytest.mark.parametrize(
  "args, said",
  [
    (["--columns=answer=final"], "final is none of label, question."),
    (["--columns=label"], "must be pairs of ours=theirs"),
    (["--source=train=a.jsonl,dev=b.jsonl"], "must be pairs of train, eval"),
  ],
)
def test_a_wrong_column_or_source_exits_64_and_says_which_there_are(
  tmp_path, args, said
):
  source = tmp_path / "quiz.jsonl"
  source.write_text('{"question": "q", "label": 1}\n')
  done = run(f"--data_dir={tmp_path / 'data'}", f"--source={source}", *args)
  assert done.returncode == 64 and "Traceback" not in done.stderr
  assert said in done.stderr and done.stderr.count("\n") == 1
