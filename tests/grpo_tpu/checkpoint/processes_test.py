"""Checkpoints of several real processes, restored by other numbers of them."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.grpo_tpu.checkpoint import checkpoint_program as program

pytestmark = pytest.mark.multiprocess

ROOT = pathlib.Path(__file__).resolve().parents[3]
TIMEOUT_SECONDS = 120


class Pod:
  """Joined processes on this machine, with two devices each."""

  def __init__(self, count, *arguments, logs, tensor=2):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self.logs = [logs / f"{time.monotonic_ns()}-{i}.txt" for i in range(count)]
    self.processes = []
    for index, log in enumerate(self.logs):
      environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(logs / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "COORDINATOR": f"127.0.0.1:{port}",
        "PROCESSES": str(count),
        "PROCESS": str(index),
        "TENSOR": str(tensor),
      }
      with log.open("wb") as file:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, program.__file__, *map(str, arguments)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
          )
        )

  def results(self):
    """Waits for all processes; returns the result of each."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
      for process, log in zip(self.processes, self.logs, strict=True):
        code = process.wait(timeout=max(1, deadline - time.monotonic()))
        assert code == 0, log.read_text()[-4000:]
    finally:
      self.kill()
    lines = [
      [line for line in log.read_text().splitlines() if "RESULT " in line]
      for log in self.logs
    ]
    return [json.loads(each[-1].partition("RESULT ")[2]) for each in lines]

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
  return tmp_path_factory.mktemp("logs")


def run(count, *arguments, logs, tensor=2):
  """Runs the program; returns the result, which is equal on all processes."""
  results = Pod(count, *arguments, logs=logs, tensor=tensor).results()
  assert all(result == results[0] for result in results), results
  return results[0]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, logs):
  """Steps 1 and 2, saved by two processes."""
  folder = tmp_path_factory.mktemp("two_steps") / "checkpoints"
  run(2, "start", folder, logs=logs)
  return folder


def assert_is(result, step, *, quarantined=0):
  assert result == {
    "step": step,
    "meta": {"is": step},
    "digest": program.digest(program.values(step)),
    "quarantined": quarantined,
  }


def test_any_number_of_processes_resumes_from_any_other_bit_by_bit(
  tmp_path, logs
):
  """2 -> 1 -> 2 -> 4 -> 2, on three mesh shapes, with partial steps."""
  relay = ((2, 2), (1, 1), (2, 1), (4, 2), (2, 4))
  for step, (count, tensor) in enumerate(relay, start=1):
    result = run(count, "relay", tmp_path, step, logs=logs, tensor=tensor)
    if step == 1:
      assert result == {"quarantined": 0, "step": None}
      continue
    assert result == {
      "step": step - 1,
      "meta": {"is": step - 1},
      "digest": program.digest(program.values(100 + step - 1)),
      "partial_step": [
        1,
        program.digest(program.rows(step - 1)),
        {"half": step - 0.5},
      ],
      "quarantined": 0,
    }


def flip(path):
  whole = bytearray(path.read_bytes())
  whole[len(whole) // 2] ^= 1
  path.write_bytes(whole)


def largest(folder, pattern):
  found = list((folder / "00000002").glob(pattern))
  return max(found, key=lambda path: path.stat().st_size)


DAMAGES = {
  "whole": lambda f: None,
  "first": lambda f: flip(largest(f, "state/ocdbt.process_0/d/*")),
  "second": lambda f: flip(largest(f, "state/ocdbt.process_1/d/*")),
  "index": lambda f: flip(largest(f, "state/manifest.ocdbt")),
  "tree": lambda f: flip(largest(f, "state/_METADATA")),
  "meta": lambda f: flip(largest(f, "meta/metadata")),
  "missing": lambda f: largest(f, "state/ocdbt.process_1/d/*").unlink(),
  "cut": lambda f: os.truncate(largest(f, "state/ocdbt.process_1/d/*"), 7),
  "manifest": lambda f: (f / "00000002.manifest.json").unlink(),
}


def test_two_processes_agree_on_what_is_damaged(two_steps, tmp_path, logs):
  """Each verifies its share of the files; both restore the same step."""
  for name, damage in DAMAGES.items():
    damage(shutil.copytree(two_steps, tmp_path / name))
  nothing = shutil.copytree(two_steps, tmp_path / "nothing")
  for path in nothing.glob("*.json"):
    path.unlink()
  folders = [tmp_path / name for name in (*DAMAGES, "nothing")]
  pod = Pod(2, "borrow", *folders[:-1], logs=logs)
  (refused, *borrowed), (also_refused, *others) = pod.results()
  assert borrowed == others
  for name, (newest, error) in zip(DAMAGES, borrowed, strict=True):
    assert newest == (2 if name == "whole" else 1)
    assert ("is damaged" in error) == (name != "whole")
  *results, none = run(2, "restore", *folders, logs=logs)
  for name, result in zip(DAMAGES, results, strict=True):
    is_whole = name == "whole"
    assert_is(result, 2 if is_whole else 1, quarantined=0 if is_whole else 1)
    assert (tmp_path / name / "quarantine").exists() != is_whole
  assert "is whole: 00000001-no-manifest" in none["error"]
  # Of a workdir that is not one for all, every host is told.
  for words in (refused, also_refused):
    assert "must be one folder for all hosts, but host 1 (" in words
    assert "host 0 (" in words
  assert str(tmp_path / "whole") in refused
  assert not [*tmp_path.glob("**/*.seen")]


def test_one_host_that_cannot_write_ends_all_within_the_time_out(
  tmp_path, logs
):
  """Two saves in a row fail by the time-out, while training continues.

  The healthy host learns which host failed.
  """
  seconds = 3
  results = Pod(2, "fail", tmp_path, seconds, logs=logs).results()
  for result in results:
    assert "by process 1: " in result["error"]
    assert "in a row: 2" in result["error"]
    assert "00000001" in result["error"]
    assert result["failures"] == 2
    # Two time-outs, and more on a busy machine.
    assert 2 * seconds - 1 < result["seconds"] < 2 * seconds + 40
  assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
    "00000001",
  }
  assert_is_step_1(tmp_path, logs)


@pytest.mark.nightly
@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_two_processes_give_up_on_a_disk_and_the_older_one_stays(
  mounted, tmp_path, logs, record_property, disk
):
  folder, hindered = mounted("-t", "tmpfs", "-o", "size=8m", "tmpfs"), tmp_path
  hindered /= "hindered"
  pod = Pod(2, "hinder", folder, hindered, logs=logs)
  try:
    wait_for(pod, "SAVED")
    if disk == "full":
      filler = folder / "filler"
      with contextlib.suppress(OSError), filler.open("wb", 0) as file:
        while True:
          file.write(bytes(4096))
    else:
      # A mount in use cannot become read-only, but another can cover it.
      mounted("-t", "tmpfs", "-o", "size=8m,ro", "tmpfs")
    hindered.touch()
    results = pod.results()
  finally:
    pod.kill()
  for result in results:
    error = "space left" if disk == "full" else "Read-only"
    assert error in result["error"] and "in a row: 2" in result["error"]
    assert "00000001" in result["error"]
    # Two time-outs, and more on a busy machine.
    assert result["seconds"] < 2 * 5 + 40
    record_property("seconds", result["seconds"])
  if disk == "full":
    filler.unlink()
  else:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
  assert_is_step_1(folder, logs)


def wait_for(pod, words):
  """Waits until all processes have printed the words."""
  deadline = time.monotonic() + TIMEOUT_SECONDS
  while not all(words in log.read_text() for log in pod.logs):
    ended = [process.poll() for process in pod.processes]
    assert ended == [None] * len(ended), [x.read_text() for x in pod.logs]
    assert time.monotonic() < deadline
    time.sleep(0.01)


def assert_is_step_1(folder, logs):
  (result,) = run(1, "restore", folder, logs=logs, tensor=1)
  assert result["step"] == 1
  assert result["digest"] == program.digest(program.values(1))


@pytest.mark.parametrize(
  ("moment", "index"), [("save", 1), ("manifest", 0)], ids=str
)
def test_one_of_two_killed_in_a_save_leaves_the_older_for_all(
  tmp_path, logs, moment, index
):
  pod = Pod(2, "die", tmp_path, moment, index, logs=logs)
  try:
    code = pod.processes[index].wait(timeout=TIMEOUT_SECONDS)
    assert code == -signal.SIGKILL, pod.logs[index].read_text()[-4000:]
  finally:
    pod.kill()
  assert (tmp_path / "00000001").is_dir()
  assert not (tmp_path / "00000002.manifest.json").exists()
  assert_is_step_1(tmp_path, logs)
