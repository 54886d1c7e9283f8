"""Saves on full, read-only and broken disks, and under real kills."""

import contextlib
import resource
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.checkpoint import checkpointer, reader
from tests.grpo_tpu.checkpoint import checkpointing

# A late error of a full disk reaches Orbax after its event loop has closed.
pytestmark = pytest.mark.filterwarnings(
  "ignore:(?s)Exception ignored in.*Event loop is closed"
  ":pytest.PytestUnraisableExceptionWarning"
)

SMALL = {"w": jnp.arange(4.0)}
ERROR = checkpointer.CheckpointError


def large(seed=0, size=1 << 16):
  """One leaf; with more, Orbax abandons the other writes and warns."""
  return {"w": jax.random.normal(jax.random.key(seed), (size,))}


@contextlib.contextmanager
def files_no_larger_than(num_bytes):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_until_failure(checkpoints, state, steps):
  """Saves step after step, and waits until each save has ended."""
  for step in steps:
    if checkpoints.save(step, state, {}):
      deadline = time.monotonic() + 60
      while not checkpoints._pending.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def folders(path):
  return sorted(p.name for p in path.iterdir() if p.is_dir())


@pytest.mark.parametrize("moment", ["at once", "committed", "hashing"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_older_one(tmp_path, moment):
  """Kills while files are written, and before the manifest exists."""
  program = """
    import os, signal, sys
    import jax.numpy as jnp
    from grpo_tpu.checkpoint import manifest
    from tests.grpo_tpu.checkpoint import checkpointing

    def kill(*_):
      os.kill(os.getpid(), signal.SIGKILL)

    folder, moment = sys.argv[1:]
    with checkpointing.opened(folder, keep=1, every_steps=1) as it:
      it.save(1, {"w": jnp.arange(1 << 20)}, {"is": 1})
      it.wait()
      if moment == "committed":
        manifest.write = kill
      elif moment == "hashing":
        manifest._checksum = kill
      it.save(2, {"w": jnp.arange(1 << 24)}, {"is": 2})
      if moment == "at once":
        kill()
  """
  process = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), moment],
    timeout=120,
    check=False,
  )
  assert process.returncode == -signal.SIGKILL
  is_cut_off = moment == "at once"
  assert (tmp_path / "00000002").exists() != is_cut_off
  expected = {"w": jnp.arange(1 << 20)}
  with checkpointing.opened(tmp_path) as checkpoints:
    assert not list(tmp_path.glob("*tmp*"))
    restored = checkpoints.restore(expected)
    assert restored is not None and restored.meta == {"is": 1}
    np.testing.assert_array_equal(restored.state["w"], expected["w"])
    assert checkpoints.quarantined == (0 if is_cut_off else 1)
    assert checkpoints.save(3, expected, {})
  assert reader.steps(tmp_path) == [1, 3]


def test_a_full_disk_is_reported_at_the_next_step_and_old_steps_stay(
  mounted, caplog
):
  folder = mounted("-t", "tmpfs", "-o", "size=3m", "tmpfs")
  filler = folder / "filler"
  with pytest.raises(
    ERROR, match="space left.*newest good checkpoint in .*00000001"
  ):
    with checkpointing.opened(folder, max_failures=3) as checkpoints:
      save_until_failure(checkpoints, large(1), [1])
      filler.write_bytes(bytes(2_650_000))
      save_until_failure(checkpoints, large(2), range(2, 9))
  assert checkpoints.failures == 3
  assert caplog.text.count("No space left on device") >= 3
  # The remains of failed saves are deleted, so there is room for one.
  assert reader.steps(folder) == [1]
  assert not list(folder.glob("*tmp*"))
  filler.unlink()
  with checkpointing.opened(folder) as checkpoints:
    restored = checkpoints.restore(large())
    assert restored is not None and restored.step == 1
    np.testing.assert_array_equal(restored.state["w"], large(1)["w"])
    assert checkpoints.save(2, large(2), {})
  assert reader.steps(folder) == [1, 2]


def test_a_disk_that_has_room_again_ends_the_failures(mounted):
  """The first step after a failed one is saved, due or not."""
  folder = mounted("-t", "tmpfs", "-o", "size=3m", "tmpfs")
  filler = folder / "filler"
  with checkpointing.opened(folder, every_steps=10) as checkpoints:
    save_until_failure(checkpoints, large(1), [10])
    filler.write_bytes(bytes(2_650_000))
    save_until_failure(checkpoints, large(2), [20])
    filler.unlink()
    save_until_failure(checkpoints, large(3), [21])
    assert not checkpoints.save(22, large(4), {})
    assert checkpoints.failures == 1
    restored = checkpoints.restore(large())
  assert restored is not None and restored.step == 21
  assert reader.steps(folder) == [10, 21]


def test_a_disk_that_turns_read_only_ends_the_run(mounted):
  folder = mounted("-t", "tmpfs", "-o", "size=8m", "tmpfs")
  with pytest.raises(ERROR, match="Read-only file system"):
    with checkpointing.opened(folder, max_failures=2) as checkpoints:
      save_until_failure(checkpoints, large(1), [1])
      checkpoints.wait()
      # A mount in use cannot become read-only, but another can cover it.
      mounted("-t", "tmpfs", "-o", "size=8m,ro", "tmpfs")
      save_until_failure(checkpoints, large(2), range(2, 9))
  assert checkpoints.failures == 2
  subprocess.run(["umount", "--lazy", str(folder)], check=True)
  with checkpointing.opened(folder) as checkpoints:
    restored = checkpoints.restore(large())
  assert restored is not None and restored.step == 1


def test_a_read_only_folder_is_refused_before_any_step(mounted):
  folder = mounted("-t", "tmpfs", "-o", "size=1m,ro", "tmpfs")
  with pytest.raises(ERROR, match="cannot be written in .*Read-only"):
    checkpointing.opened(folder / "checkpoints")
  with pytest.raises(ERROR, match="cannot be written in .*Read-only"):
    checkpointing.opened(folder)


def test_one_failed_save_is_counted_and_the_next_step_stands_in(tmp_path):
  with checkpointing.opened(tmp_path, every_steps=10) as checkpoints:
    save_until_failure(checkpoints, large(), [10])
    with files_no_larger_than(4096):
      save_until_failure(checkpoints, large(), [20, 21])
      assert checkpoints.failures == 1
    save_until_failure(checkpoints, large(), [22])
    assert checkpoints.failures == 2
    assert not checkpoints.save(23, large(), {})
    assert checkpoints.scalars()["checkpoint/save_failures"] == 2
  assert reader.steps(tmp_path) == [10, 22]


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_so_many_failures_in_a_row_end_the_run(tmp_path, limit):
  with files_no_larger_than(4096):
    with pytest.raises(ERROR, match=rf"max_failures \({limit}\).*is none"):
      with checkpointing.opened(tmp_path, max_failures=limit) as checkpoints:
        save_until_failure(checkpoints, large(), range(1, 9))
    assert checkpoints.failures == limit
  assert folders(tmp_path) == []


def test_a_success_between_two_failures_resets_the_count(tmp_path):
  with files_no_larger_than(1 << 16):
    with checkpointing.opened(tmp_path, max_failures=2) as checkpoints:
      for step, state in enumerate((large(), SMALL, large(), SMALL), start=1):
        assert checkpoints.save(step, state, {})
  assert checkpoints.failures == 2
  assert reader.steps(tmp_path) == [2, 4]


def test_a_failed_save_displaces_no_older_one_and_leaves_none_behind(tmp_path):
  steps = ((1, SMALL), (2, SMALL), (3, large()), (4, SMALL))
  with files_no_larger_than(1 << 16):
    with checkpointing.opened(tmp_path, keep=2) as checkpoints:
      for step, state in steps:
        assert checkpoints.save(step, state, {})
  assert folders(tmp_path) == ["00000002", "00000004"]


def test_the_older_goes_only_after_the_newer_s_manifest(tmp_path, monkeypatch):
  """Otherwise a kill in between would leave no checkpoint to trust."""
  seen = []
  write = checkpointer.manifest.write

  def watched(folder, facts):
    seen.append(folders(tmp_path))
    write(folder, facts)

  monkeypatch.setattr(checkpointer.manifest, "write", watched)
  with checkpointing.opened(tmp_path, keep=1) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, SMALL, {})
  assert seen == [
    *(["00000001"], ["00000001", "00000002"], ["00000002", "00000003"]),
  ]
  assert folders(tmp_path) == ["00000003"]


def test_a_manifest_that_cannot_be_written_is_a_failed_save(
  tmp_path, monkeypatch
):
  def broken(*_):
    raise OSError("the disk is gone")

  with checkpointing.opened(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, SMALL, {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
      patch.setattr(checkpointer.manifest, "write", broken)
      save_until_failure(checkpoints, SMALL, [2])
    assert checkpoints.save(3, SMALL, {})
    assert checkpoints.failures == 1
  assert folders(tmp_path) == ["00000003"]


def test_a_failed_last_save_is_raised_on_leaving(tmp_path):
  with files_no_larger_than(4096):
    with pytest.raises(ERROR, match="last checkpoint could not be saved"):
      with checkpointing.opened(tmp_path) as checkpoints:
        checkpoints.save(1, large(), {})
    with pytest.raises(KeyError, match="the first error"):
      with checkpointing.opened(tmp_path) as checkpoints:
        checkpoints.save(1, large(), {})
        raise KeyError("the first error")


def test_an_error_of_the_run_lets_the_save_on_its_way_end(tmp_path):
  with pytest.raises(KeyError):
    with checkpointing.opened(tmp_path) as checkpoints:
      checkpoints.save(1, large(size=1 << 20), {})
      raise KeyError
  with checkpointing.opened(tmp_path) as checkpoints:
    assert checkpoints.restore(large(size=1 << 20)) is not None
