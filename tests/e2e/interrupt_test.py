"""Ctrl-C on a terminal, of the program and of a pod on this machine."""

import json
import os
import sys
import time

import psutil
import pytest

from tests.e2e.conftest import TIMEOUT_SECONDS, TINY, summary
from tests.terminal import Terminal

pytestmark = pytest.mark.multiprocess

# More steps than the tests wait for, of which none is saved by itself.
LONG = (
  "--config=configs/smoke.py",
  *TINY,
  "--config.train.num_steps=300",
  "--config.checkpoint.every_steps=10000",
  "--config.eval.every_steps=0",
  # Processes that the terminal interrupts too.
  "--config.rewards.num_workers=1",
  "--config.rewards.custom=('tests.grpo_tpu.rewards.user_rewards:brevity',)",
  "--config.rewards.custom_weights=(0.1,)",
)
SAVING = "Interrupted: saving; press Ctrl-C again to leave at once."


@pytest.fixture
def terminal(program, drawn):
  opened = []

  def new(*command, workdir, settings=LONG):
    data = f"--config.data.dir={drawn}"
    opened.append(
      Terminal(
        *(*command, *settings, f"--workdir={workdir}", data),
        environment=program.environment | {"GRPO_TPU_PYTHON": sys.executable},
        seconds=TIMEOUT_SECONDS,
      )
    )
    return opened[-1]

  yield new
  for each in opened:
    each.close()


PROGRAM = (sys.executable, "-m", "grpo_tpu")


@pytest.mark.parametrize(
  "readers", [pytest.param(0, marks=pytest.mark.nightly), 1]
)
def test_ctrl_c_saves_a_run_and_the_same_command_goes_on(
  terminal, tmp_path, readers
):
  settings = (*LONG, f"--config.data.worker_processes={readers}")
  run = terminal(*PROGRAM, workdir=tmp_path / "run", settings=settings)
  run.wait_for("  reward ")
  run.press()
  run.wait_for(SAVING)
  assert run.end() == 75, run.text
  assert "Traceback" not in run.text
  end = summary(tmp_path / "run")
  assert end["reason"].startswith("interrupted, everything is saved")
  saved = int(end["newest_checkpoint"].rpartition("/")[2])
  assert saved == end["step"] >= 1
  settings = (*settings, f"--config.train.num_steps={saved + 1}")
  again = terminal(*PROGRAM, workdir=tmp_path / "run", settings=settings)
  assert again.end() == 0, again.text
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines]
  assert steps == list(range(saved + 2))


def test_a_second_ctrl_c_leaves_while_the_program_compiles(terminal, tmp_path):
  fresh = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
  run = terminal(
    *("env", *(f"{k}={v}" for k, v in fresh.items()), *PROGRAM),
    workdir=tmp_path / "run",
  )
  run.wait_for("Compiling")
  run.press()
  run.wait_for(SAVING)
  assert run.process.poll() is None
  run.press()
  assert run.end() == 130, run.text
  assert "leaving at once, nothing is saved (exit code 130)" in run.text
  assert summary(tmp_path / "run") is None


def wait_for_compiler(run):
  """Waits until a plan has started the server of its compilers."""
  program = psutil.Process(run.process.pid)
  deadline = time.monotonic() + TIMEOUT_SECONDS
  while not any(
    "forkserver" in " ".join(x.cmdline()) for x in program.children()
  ):
    assert time.monotonic() < deadline and run.process.poll() is None, run.text
    time.sleep(0.02)


@pytest.mark.parametrize(
  "mode, words, setting",
  [
    # What takes much longer than the key.
    ("evaluate", "can be used", "--config.eval.num_samples=1000"),
    ("export", "Process 0", "--config.model.name=gemma3_270m"),
    ("plan", "", "--topology=v5e:1x1"),
  ],
)
def test_one_ctrl_c_leaves_a_mode_that_has_nothing_to_save(
  terminal, tmp_path, mode, words, setting
):
  flags = [f"--mode={mode}", "--config.model.weights=random:1", setting]
  run = terminal(*PROGRAM, workdir=tmp_path / "run", settings=(*LONG, *flags))
  run.wait_for(words)
  if mode == "plan":
    wait_for_compiler(run)
  run.press()
  assert run.end() == 130, run.text
  assert "Traceback" not in run.text


def test_ctrl_c_saves_on_every_host_of_a_pod_on_this_machine(
  terminal, tmp_path
):
  pod = ("bash", "launch/local_pod.sh", "-n", "2", "--")
  # The programs that other tests of two hosts have compiled.
  settings = (*LONG, "--config.mesh.fsdp=2", "--config.rollout.chunk_tokens=2")
  run = terminal(*pod, workdir=tmp_path / "run", settings=settings)
  run.wait_for("  reward ")
  run.press()
  assert run.end() == 75, run.text
  logs = tmp_path / "run" / "logs"
  for host in os.listdir(logs):
    assert "(exit code 75)" in (logs / host).read_text()
  assert summary(tmp_path / "run")["newest_checkpoint"]
