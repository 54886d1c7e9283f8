"""One run at a time writes to a bucket, and a dead run blocks it shortly."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from etils import epath

from grpo_tpu.checkpoint import lease

FOLDER = epath.Path("gs://a-bucket/runs/a/checkpoints")
NAME = ("a-bucket", "runs/a/checkpoints/lease")

# Holds the lease and says so; renewals and the lease are a tenth as long.
HOLDER = """
  import time
  from grpo_tpu.checkpoint import lease
  from tests.grpo_tpu.checkpoint import lease_test
  lease_test.hasten(lease)
  held = lease.Lease(lease_test.FOLDER)
  held.acquire()
  print("held", flush=True)
  time.sleep(120)
"""


def hasten(module):
  module._RENEWAL_SECONDS, module._LEASE_SECONDS = 1.0, 4.0
  module._PATIENCE_SECONDS = 6.0


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
  for name in ("_RENEWAL_SECONDS", "_LEASE_SECONDS", "_PATIENCE_SECONDS"):
    monkeypatch.setattr(lease, name, getattr(lease, name))
  hasten(lease)


@pytest.fixture
def holder(bucket_here):
  """Another process that holds the lease of the folder."""
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(HOLDER)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout and process.stderr
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


@pytest.fixture
def own():
  own = lease.Lease(FOLDER)
  yield own
  own.release()


def test_a_holder_is_waited_for_followed_when_it_sleeps_and_ends_when_it_wakes(
  holder, own, bucket_here
):
  with pytest.raises(OSError, match=f"process {holder.pid} of .* is writing"):
    own.acquire()
  holder.send_signal(signal.SIGSTOP)  # A newcomer sees it as it sees a kill.
  start = time.monotonic()
  own.acquire()
  assert 2 < time.monotonic() - start < 6
  holder.send_signal(signal.SIGCONT)
  assert holder.wait(timeout=60) == 1
  assert "Another run has taken gs://a-bucket/runs/a" in holder.stderr.read()
  assert str(os.getpid()).encode() in bucket_here.store.objects[NAME].data
  own.check()
  own.release()
  assert NAME not in bucket_here.store.objects


def test_a_holder_that_was_released_is_followed_at_once(bucket_here, own):
  first = lease.Lease(FOLDER)
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
  monkeypatch.setattr(lease.initialize, "shutdown", ended.append)
  for _ in range(2):
    own._time -= 100
    own.check()
  assert not ended
