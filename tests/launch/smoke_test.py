"""The smoke run's stages: in order, with the user's settings, and resumable."""

import json
import pathlib
import shutil
import sys
import time

import pytest

from launch import smoke_summary
from tests.terminal import Terminal

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMOKE = 'exec bash "../a checkout/launch/smoke.sh" "$@"'
METRICS = [
  {"step": 0, "eval/accuracy": 0.5},
  {"step": 1, "reward/accuracy/mean": 0.9},
  {"step": 2, "eval/accuracy": 0.75, "reward/accuracy/mean": 0.8},
  {"step": 3, "reward/accuracy/mean": 0.7},
]


def write_metrics(workdir: pathlib.Path, rows: list[dict[str, float]]) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (workdir / "metrics.jsonl").write_text(lines)


def stages(checkout, *arguments: str) -> tuple[int, list[list[str]]]:
  """The exit code, and the arguments of each stage."""
  result = checkout.run(SMOKE, *arguments)
  return result.returncode, [
    call[1:]
    for call in checkout.called()
    if call[1] in ("data_pipelines.prepare", "grpo_tpu.main")
  ]


@pytest.fixture
def machine(checkout):
  checkout.add_python(checkout.path / "python3.12")
  return checkout


def test_three_stages_run_in_order_each_on_the_output_of_the_last(machine):
  workdir = machine.root / "runs" / "smoke"
  _, (prepare, warm_start, grpo) = stages(machine)
  data = f"--config.data.dir={workdir}/data"
  assert prepare[:2] == ["data_pipelines.prepare", "--source=synthetic"]
  assert f"--data_dir={workdir}/data" in prepare
  assert warm_start == [
    *("grpo_tpu.main", "--config=configs/smoke.py:warm_start"),
    *(f"--workdir={workdir}/warm_start", data),
  ]
  weights = f"--config.model.weights=run:{workdir}/warm_start"
  assert grpo == [
    *("grpo_tpu.main", "--config=configs/smoke.py", weights),
    *(f"--workdir={workdir}", data),
  ]


def test_settings_reach_both_trainings_and_the_seed_the_data_too(machine):
  settings = ["--config.seed=7", "--config.model.name=a b"]
  _, (prepare, *trainings) = stages(machine, *settings)
  assert "--seed=7" in prepare
  assert all(call[-2:] == settings for call in trainings)


def test_steps_and_optimizer_are_for_grpo_alone(machine):
  settings = ["--config.train.num_steps=20", "--config.optimizer.b1=0.8"]
  _, (_, warm_start, grpo) = stages(machine, *settings)
  assert not set(settings) & set(warm_start)
  assert grpo[-2:] == settings


def test_a_workdir_in_a_bucket_is_no_folder_here(machine):
  _, (_, _, grpo) = stages(machine, "--workdir=gs://my-bucket/run")
  assert "--workdir=gs://my-bucket/run" in grpo
  assert not list(machine.home.rglob("*bucket*"))


def test_the_devices_of_a_tpu_share_the_run(machine):
  machine.environment["TPU"] = "8"
  result = machine.run(SMOKE)
  assert "on the TPU of this machine: 8 devices" in result.stderr
  machine.called()
  _, *trainings = stages(machine)[1]
  assert all("--config.mesh.fsdp=8" in call for call in trainings)
  _, (_, *trainings) = stages(machine, "--config.mesh.tensor=8")
  assert not any("--config.mesh.fsdp=8" in call for call in trainings)
  machine.environment["JAX_PLATFORMS"] = "cpu"
  assert "TPU" not in machine.run(SMOKE).stderr


def test_a_tpu_that_cannot_be_used_is_left_with_the_reason(machine):
  machine.environment["TPU"] = "0 the chips are in use by process 7"
  result = machine.run(SMOKE)
  said = "The TPU cannot be used: the chips are in use by process 7.\n"
  assert said in result.stderr
  assert not any("mesh" in word for call in machine.called() for word in call)


def test_the_environment_of_a_slice_s_worker_is_enough(machine):
  machine.environment["GRPO_TPU_EXTRA"] = "tpu"
  machine.run(SMOKE)
  del machine.environment["GRPO_TPU_EXTRA"]
  machine.called()
  machine.run(SMOKE)
  assert not any("pip" in call for call in machine.called())


@pytest.mark.parametrize("workdir", ["~/my runs/1", "my runs/1"])
def test_a_workdir_is_below_the_home_or_the_current_folder(machine, workdir):
  _, (_, _, grpo) = stages(machine, f"--workdir={workdir}")
  assert f"--workdir={machine.home}/my runs/1" in grpo


@pytest.mark.parametrize(
  "argument", ["--workdir", "--workdir=", "5", "--seed=1"]
)
def test_an_unknown_argument_is_refused_before_anything_is_made(
  machine, argument
):
  result = machine.run(SMOKE, argument)
  assert result.returncode == 64
  assert f"'{argument}'" in result.stderr and "--workdir=DIR" in result.stderr
  assert machine.called() == []


@pytest.mark.parametrize(
  "word, ran",
  [("data_pipelines.prepare", 1), ("--config=configs/smoke.py", 3)],
)
def test_a_stage_that_fails_ends_the_run_with_its_exit_code(machine, word, ran):
  machine.environment["EXITS"] = f"{word}=64"
  code, calls = stages(machine)
  assert (code, len(calls)) == (64, ran)


def test_ctrl_c_ends_the_run_with_the_code_of_the_stage_that_saved(machine):
  """The terminal sends it to the script as well, which must wait."""
  variables = {"SAVES": "--config=configs/smoke.py:warm_start"}
  terminal = Terminal(
    *("bash", str(machine.root / "launch" / "smoke.sh")),
    environment=machine.variables() | variables,
    folder=machine.home,
  )
  try:
    terminal.wait_for("waiting for Ctrl-C")
    terminal.press()
    assert terminal.end() == 75, terminal.text
  finally:
    terminal.close()
  assert "3/3" not in terminal.text


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here")
def test_a_stage_does_not_outlive_a_killed_script(machine):
  """An orphan would write the workdir of the next run."""
  machine.environment["HANGS"] = "grpo_tpu.main"
  process = machine.start(SMOKE)
  while "grpo_tpu.main" not in machine.calls.read_text():
    assert process.poll() is None
    time.sleep(0.05)
  process.kill()
  process.communicate(timeout=10)  # Ends when the stage lets go of the pipe.


def test_two_runs_do_not_share_a_workdir(machine):
  machine.run(SMOKE)
  line = 'exec 7>"$1/.smoke.lock"; flock 7; shift; ' + SMOKE
  result = machine.run(line, f"{machine.root}/runs/smoke")
  assert result.returncode == 64
  assert "another --workdir=DIR" in result.stderr


@pytest.fixture
def summarise(capsys):
  """What the summary of a workdir prints."""

  def call(workdir: pathlib.Path, seconds: str = "12") -> str:
    smoke_summary.main(str(workdir), seconds)
    return capsys.readouterr().out

  return call


def test_the_summary_skips_lines_of_others(tmp_path, summarise):
  write_metrics(tmp_path, METRICS)
  foreign = ["5", "[]", '{"note": "x"}', '{"step": "a"}', "[" * 10**6, "{"]
  foreign += ['{"step": 9, "eval/accuracy": null}']
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write("\n".join(foreign))
  assert "0.500 before GRPO, 0.750 after" in summarise(tmp_path)


def test_the_summary_compares_before_the_first_update_with_the_end(
  tmp_path, summarise
):
  workdir = tmp_path / "a run"
  write_metrics(workdir, METRICS)
  said = summarise(workdir)
  assert json.loads((workdir / "smoke.json").read_text()) == {
    **{"warm_start_accuracy": 0.5, "final_accuracy": 0.75},
    **{"wall_seconds": 12, "steps": 3},
  }
  assert "0.500 before GRPO, 0.750 after 3 steps" in said
  tensorboard = pathlib.Path(sys.executable).with_name("tensorboard")
  assert f"View: {tensorboard} '--logdir={workdir}'  # http" in said


def test_a_finished_run_started_again_keeps_its_seconds(tmp_path, summarise):
  write_metrics(tmp_path, METRICS)
  summarise(tmp_path, "12")
  assert "in 12 s" in summarise(tmp_path, "3")
  more = {"step": 4, "eval/accuracy": 0.8}
  write_metrics(tmp_path, [*METRICS, more])
  assert "in 3 s" in summarise(tmp_path, "3")
  (tmp_path / "smoke.json").write_text("[" * 10**5)
  assert "in 5 s" in summarise(tmp_path, "5")


@pytest.mark.parametrize(
  "rows",
  [METRICS[:2], METRICS[1:], [{"step": 1, "eval/accuracy": 0.5}, METRICS[2]]],
  ids=["only at the start", "only at the end", "not at the start"],
)
def test_a_run_not_scored_at_both_ends_has_no_summary(
  tmp_path, summarise, rows
):
  write_metrics(tmp_path, rows)
  with pytest.raises(ValueError, match="eval/accuracy"):
    summarise(tmp_path)
  assert not (tmp_path / "smoke.json").exists()
