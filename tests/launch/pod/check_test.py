"""What the program would refuse is refused here, before anything is created."""

import shutil
import subprocess
import sys

import pytest

from launch.pod import check, exits, workers
from tests.launch.pod import fake_cloud

CONFIG = "configs/my config.py"
WORKDIR = "--workdir=/workdir"
DEFAULTS = (
  "--config.checkpoint.every_minutes=10",
  "--config.compilation_cache_dir=gs://my-bucket/runs/first/compiled",
)
TRAPS = "--config.model.weights=hf:~/a $HOME 'b'"


@pytest.fixture
def refusing(laptop, cloud):
  """A laptop whose program refuses every command."""
  (cloud.folder / "refusal").write_text("data.dir ('\x1b') must be; set it.\n")
  return laptop


def checked(cloud) -> list[str]:
  path = cloud.folder / "checked"
  return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("dry", [("--dry-run",), ()], ids=["dry", "real"])
@pytest.mark.parametrize("verb", ["run", "supervise"])
def test_a_refused_command_reaches_no_cloud(refusing, cloud, verb, dry):
  done = refusing.tpu(*dry, verb, CONFIG, "--", "--config.seed=1")
  assert done.returncode == exits.Exit.BAD_REQUEST
  assert "would refuse this run on ACCELERATOR_TYPE (v5litepod-16)" in (
    done.stderr
  )
  assert "data.dir ('\\x1b') must be; set it." in done.stderr
  assert "fix the setting named above" in done.stderr
  assert (done.stdout, cloud.requests, cloud.looks) == ("", [], 0)


def test_the_program_is_asked_with_the_whole_command(laptop, cloud):
  done = laptop.tpu("--dry-run", "run", CONFIG, "--", TRAPS)
  assert done.returncode == 0, done.stderr
  assert checked(cloud) == [
    repr(
      [f"--config={CONFIG}", TRAPS, *DEFAULTS, WORKDIR, "--topology=v5e:4x4"]
    )
  ]


def test_several_slices_must_be_the_replicas_of_the_mesh(laptop, cloud):
  laptop.settings["NUM_SLICES"] = "2"
  assert laptop.tpu("--dry-run", "run", CONFIG).returncode == 0
  assert "--topology=v5e:4x4*2" in checked(cloud)[0]


def test_flags_and_configs_come_before_the_defaults_of_a_pod(laptop, cloud):
  flag = "--config.checkpoint.every_minutes=0"
  assert laptop.tpu("--dry-run", "run", CONFIG, "--", flag).returncode == 0
  path = laptop.checkout / CONFIG
  path.write_text("config.compilation_cache_dir = '/ssd'\n")
  author = ("-c", "user.name=a", "-c", "user.email=a@b")
  laptop.git(*author, "commit", "--quiet", "--all", "--message=Mine")
  assert laptop.tpu("--dry-run", "run", CONFIG).returncode == 0
  assert [line.count("--config.") for line in checked(cloud)] == [2, 1]
  assert flag in checked(cloud)[0] and DEFAULTS[0] in checked(cloud)[1]


def test_the_files_of_the_commit_are_asked_and_not_those_of_the_disk(
  refusing, cloud
):
  path = refusing.checkout / "grpo_tpu" / "planning" / "check.py"
  path.write_text("raise SystemExit(0)\n")
  assert refusing.tpu("--dry-run", "run", CONFIG).returncode == 64


def test_a_type_that_no_table_has_is_checked_without_the_mesh(laptop, cloud):
  laptop.settings["ACCELERATOR_TYPE"] = "v4-16"
  done = laptop.tpu("--dry-run", "run", CONFIG)
  assert "Not checked: the mesh" in done.stderr
  assert checked(cloud) == [repr([f"--config={CONFIG}", *DEFAULTS, WORKDIR])]


def test_the_check_can_be_left_out_and_says_so(refusing, cloud):
  done = refusing.tpu("--dry-run", "run", "--no-check", CONFIG)
  assert done.returncode == 0, done.stderr
  assert "(dry run) Not checked" in done.stderr
  assert "(dry run) Started on 4 workers" in done.stderr
  assert checked(cloud) == []


def test_a_config_that_only_the_image_has_is_not_checked(laptop, cloud):
  laptop.settings["IMAGE"] = "an-image"
  done = laptop.tpu("--dry-run", "run", "configs/of_the_image.py")
  assert done.returncode == 0 and "Not checked" in done.stderr


def test_a_check_that_breaks_is_no_refusal_of_the_program(laptop, cloud):
  (cloud.folder / "refusal").mkdir()
  done = laptop.tpu("--dry-run", "run", CONFIG)
  assert done.returncode == exits.Exit.BAD_REQUEST
  assert "exit code 1" in done.stderr and "--no-check" in done.stderr
  assert "would refuse" not in done.stderr


def test_without_an_environment_the_check_asks_to_be_left_out(monkeypatch):
  monkeypatch.setenv("GRPO_TPU_VENV", "/nowhere")
  monkeypatch.delenv("GRPO_TPU_PYTHON", raising=False)
  with pytest.raises(exits.Failure, match="--no-check"):
    check.check(fake_cloud.settings(), workers.Job("configs/smoke.py", ()))


@pytest.mark.skipif(not shutil.which("git"), reason="no git on PATH")
def test_the_program_itself_answers(tmp_path, monkeypatch):
  """The real files, committed in a checkout of their own."""
  root = tmp_path / "a checkout"
  ignore = shutil.ignore_patterns("__pycache__")
  for name in ("configs", "data_pipelines", "grpo_tpu"):
    shutil.copytree(fake_cloud.ROOT / name, root / name, ignore=ignore)
  author = ("-c", "user.name=a", "-c", "user.email=a@b")
  commit = (*author, "commit", "--quiet", "--message=All")
  for words in (("init", "--quiet"), ("add", "--all"), commit):
    subprocess.run(["git", "-C", str(root), *words], check=True)
  monkeypatch.setattr(workers, "ROOT", root)
  monkeypatch.setenv("GRPO_TPU_PYTHON", sys.executable)
  named = ("--config.model.weights=hf:~/x", "--config.data.dir=/x")
  config = "configs/gemma3_4b_v5e_16.py:lora"
  check.check(fake_cloud.settings(), workers.Job(config, named))
  for changes, flags, words in (
    ({}, (*named, "--config.optimizer.lr=1"), "optimizer.lr"),
    ({"ACCELERATOR_TYPE": "v5litepod-32"}, named, "the 32 devices of v5e:4x8"),
  ):
    with pytest.raises(exits.Failure, match=words) as raised:
      check.check(fake_cloud.settings(**changes), workers.Job(config, flags))
    assert raised.value.exit == exits.Exit.BAD_REQUEST
