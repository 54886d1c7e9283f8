"""One run at a time writes to a folder, and a dead run blocks it shortly."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from etils import epath

from grpo_tpu.checkpoint import checkpointer, directory_lock
from tests.grpo_tpu.checkpoint import checkpointing

FOLDER = epath.Path("gs://a-bucket/runs/a/checkpoints")
OBJECT = ("a-bucket", "runs/a/checkpoints/lease")

# Holds the lease and says so; renewals and the lease are a tenth as long.
HOLDER = """
  import sys, time
  from etils import epath
  from grpo_tpu.checkpoint import directory_lock
  from tests.grpo_tpu.checkpoint import directory_lock_test
  directory_lock_test.hasten(directory_lock)
  held = getattr(directory_lock, sys.argv[1])(epath.Path(sys.argv[2]))
  held.acquire()
  print("held", flush=True)
  time.sleep(120)
"""


def hasten(module):
  module._RENEWAL_SECONDS, module._LEASE_SECONDS = 1.0, 4.0
  module.Lease._patience_seconds = 6.0


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(directory_lock.DirectoryLock, "_patience_seconds", 0.3)


def hold(kind, folder):
  """Yields another process that holds the lock."""
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(HOLDER), kind, str(folder)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout and process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


@pytest.fixture
def holder(tmp_path):
  yield from hold("DirectoryLock", tmp_path)


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


@pytest.fixture
def hasty(monkeypatch):
  for owner, name in (
    (directory_lock, "_RENEWAL_SECONDS"),
    (directory_lock, "_LEASE_SECONDS"),
    (directory_lock.Lease, "_patience_seconds"),
  ):
    monkeypatch.setattr(owner, name, getattr(owner, name))
  hasten(directory_lock)


@pytest.fixture
def leaseholder(bucket_here, hasty):
  yield from hold("Lease", FOLDER)


@pytest.fixture
def own(bucket_here, hasty):
  own = directory_lock.Lease(FOLDER)
  yield own
  own.release()


def test_a_holder_is_waited_for_followed_when_it_sleeps_and_ends_when_it_wakes(
  leaseholder, own, bucket_here
):
  with pytest.raises(
    OSError, match=f"process {leaseholder.pid} of .* is writing"
  ):
    own.acquire()
  # A newcomer sees it as it sees a kill.
  leaseholder.send_signal(signal.SIGSTOP)
  start = time.monotonic()
  own.acquire()
  assert 2 < time.monotonic() - start < 6
  leaseholder.send_signal(signal.SIGCONT)
  assert leaseholder.wait(timeout=60) == 1
  said = leaseholder.stderr.read()
  assert "Another run has taken gs://a-bucket/runs/a" in said
  assert str(os.getpid()).encode() in bucket_here.store.objects[OBJECT].data
  own.check()
  own.release()
  assert OBJECT not in bucket_here.store.objects


def test_a_holder_that_was_released_is_followed_at_once(bucket_here, own):
  first = directory_lock.Lease(FOLDER)
  first.acquire()
  first.release()
  start = time.monotonic()
  own.acquire()
  assert time.monotonic() - start < 2


class Repeating:
  """A store whose first answer to a write is lost, so that it is repeated."""

  def __init__(self, store):
    self._store, self.read = store, store.read

  def write(self, *arguments, **options):
    self._store.write(*arguments, **options).result()
    return self._store.write(*arguments, **options)


def test_an_answer_that_was_lost_does_not_lose_the_lease(
  bucket_here, own, monkeypatch
):
  own.acquire()
  own._store = Repeating(own._store)
  ended = []
  monkeypatch.setattr(directory_lock.initialize, "shutdown", ended.append)
  for _ in range(2):
    own._time -= 100
    own.check()
  assert not ended
