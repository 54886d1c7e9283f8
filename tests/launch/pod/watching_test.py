"""The laptop shows the logs and the curves of a run."""

import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

from grpo_tpu.observability import event_files
from launch.pod import exits
from tests.launch.pod import fake_cloud

pytestmark = fake_cloud.needs_gcloud

CONFIG = "configs/my config.py"


@pytest.fixture
def running(laptop, cloud, tmp_path):
  """Starts a run on two workers; gives its workdir."""
  workdir = tmp_path / "a shared disk" / "a run"
  laptop.settings["WORKDIR"] = str(workdir)
  node = {"labels": {"grpo-tpu": "grpo-1"}, "acceleratorType": "v5litepod-16"}
  cloud.add_node("grpo-1", node)
  for words in (("setup",), ("run", CONFIG)):
    done = laptop.tpu(*words)
    assert done.returncode == 0, done.stderr
  return workdir


def lines_of(process: subprocess.Popen) -> queue.Queue:
  """A queue with each line that a process prints."""
  lines = queue.Queue()

  def read():
    for line in process.stdout:
      lines.put(line.rstrip("\n"))

  threading.Thread(target=read, daemon=True).start()
  return lines


def interrupt(process: subprocess.Popen) -> None:
  """Sends Ctrl-C, as a terminal does to all processes in its foreground."""
  os.killpg(process.pid, signal.SIGINT)
  assert process.wait(timeout=60) == exits.Exit.INTERRUPTED


def test_logs_of_all_workers_of_one_and_of_new_lines(running, laptop, cloud):
  """Lines have the number of the worker; Ctrl-C does not stop the run."""
  both = laptop.tpu("logs", "-n", "1").stdout.splitlines()
  assert sorted(both) == [
    "[worker 0] 127.0.0.10 resumes from step 0",
    "[worker 1] 127.0.0.11 resumes from step 0",
  ]
  one = laptop.tpu("logs", "-w", "1").stdout.splitlines()
  assert "the run starts" in one[0]
  assert one[1:] == ["127.0.0.11 resumes from step 0"]

  with laptop.start("logs", "-f", "-n", "1") as process:
    lines = lines_of(process)
    assert sorted(lines.get(timeout=60) for _ in range(2)) == sorted(both)
    for number in (1, 0):
      log = cloud.worker(number) / "grpo_tpu" / "run" / "log"
      with log.open("a", encoding="utf-8") as file:
        file.write("a new\x1b[2J line\n")  # As a terminal would obey it.
      text = f"[worker {number}] a new\\x1b[2J line"
      assert lines.get(timeout=60) == text
    interrupt(process)
  assert laptop.tpu("status").stdout.count("running") == 2
  assert "tail" not in [process.name() for process in cloud.processes()]


@pytest.mark.nightly  # TensorBoard takes its time to start.
def test_tensorboard_shows_the_run_at_a_port_of_the_laptop(
  running, laptop, cloud
):
  events = event_files.EventFiles(running, resume_step=None)
  events.write(lambda writer: writer.write_scalars(7, {"train/loss": 0.5}))
  events.close()
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  with laptop.start("tensorboard", f"--port={port}") as process:
    lines_of(process)
    url = f"http://localhost:{port}/data/plugin/scalars/tags"
    until = time.monotonic() + 120
    tags = {}
    while "train/loss" not in str(tags):
      assert time.monotonic() < until and process.poll() is None
      try:
        with urllib.request.urlopen(url, timeout=5) as answer:
          tags = json.load(answer)
      except (urllib.error.URLError, OSError):
        time.sleep(0.5)
    interrupt(process)

  def is_free():
    with socket.socket() as probe:
      return probe.connect_ex(("localhost", port)) != 0

  while not is_free():
    assert time.monotonic() < until, "TensorBoard stays on the worker"
    time.sleep(0.1)
