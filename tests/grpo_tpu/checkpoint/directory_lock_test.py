"""One run at a time writes to a folder, and a dead run holds no lock."""

import os
import subprocess
import sys
import textwrap

import pytest

from grpo_tpu.checkpoint import checkpointer, directory_lock
from tests.grpo_tpu.checkpoint import checkpointing


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(directory_lock, "_PATIENCE_SECONDS", 0.3)


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock of `tmp_path`."""
  program = """
    import sys, time
    from etils import epath
    from grpo_tpu.checkpoint import directory_lock
    lock = directory_lock.DirectoryLock(epath.Path(sys.argv[1]))
    lock.acquire()
    print("held", flush=True)
    time.sleep(120)
  """
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
    stdout=subprocess.PIPE,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == b"held\n"
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def test_a_second_run_in_a_workdir_is_refused_by_the_first_s_name(
  tmp_path, holder, impatient
):
  error = f"process {holder.pid} of .* is writing there: .* another workdir"
  with pytest.raises(checkpointer.CheckpointError, match=error):
    checkpointing.opened(tmp_path)


def test_a_killed_run_holds_nothing_though_its_file_stays(
  tmp_path, holder, impatient
):
  holder.kill()
  holder.wait()
  assert (tmp_path / "lock").exists()
  with checkpointing.opened(tmp_path):
    assert f"process {os.getpid()} of" in (tmp_path / "lock").read_text()


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path, holder):
  os.kill(holder.pid, 15)  # The holder dies while we wait.
  with checkpointing.opened(tmp_path):
    pass


def test_a_run_that_has_ended_may_be_resumed(tmp_path):
  for _ in range(2):
    with checkpointing.opened(tmp_path):
      pass
