"""Checkpoints in a bucket: saved, verified, restored and read by Orbax."""

import re
import sys
import threading
import time
import uuid

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from data_pipelines.storage import objects
from grpo_tpu.checkpoint import checkpointer, manifest, reader
from grpo_tpu.distributed import preflight
from tests.grpo_tpu.checkpoint import checkpointing

FOLDER = ""  # Another one for each test.


@pytest.fixture(autouse=True)
def store(bucket_here, monkeypatch):
  """The fake bucket; TensorFlow remembers the folders of another test's."""
  objects.client.cache_clear()
  folder = f"gs://a-bucket/{uuid.uuid4()}/checkpoints"
  monkeypatch.setattr(sys.modules[__name__], "FOLDER", folder)
  return bucket_here.store


def state(seed=0):
  return {
    "w": jax.random.normal(jax.random.key(seed), (64, 32)),
    "key": jax.random.key(seed),
  }


def save(*steps, **settings):
  with checkpointing.opened(FOLDER, **settings) as checkpoints:
    for step in steps:
      assert checkpoints.save(step, state(step), {"is": step})
      checkpoints.wait()
  assert not checkpoints.failures


def restore():
  with checkpointing.opened(FOLDER) as checkpoints:
    restored = checkpoints.restore(state())
  assert restored is not None
  np.testing.assert_array_equal(restored.state["w"], state(restored.step)["w"])
  return restored.step, checkpoints.quarantined


def names(store, pattern=""):
  """The objects below the folder; what a console shows as folders is none."""
  prefix = objects.split(FOLDER)[1] + "/"
  found = [name.removeprefix(prefix) for _, name in store.objects]
  return [x for x in found if re.match(pattern, x) and not x.endswith("/")]


def content(store, name):
  return store.objects[objects.split(f"{FOLDER}/{name}")].data


def change(name, data=None):
  """Replaces an object by other bytes, or removes it."""
  bucket, key = objects.split(f"{FOLDER}/{name}")
  blob = objects.client().bucket(bucket).blob(key)
  blob.delete() if data is None else blob.upload_from_string(data)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_what_is_saved_comes_back_and_orbax_reads_it_too(store):
  save(1, 2, 3, 4, keep=2)
  assert restore() == (4, 0)
  assert reader.steps(FOLDER) == [3, 4]
  assert not names(store, "0000000[12]|lease")
  # Its sizes and checksums are those of the bytes, though none was read.
  rows = manifest._read_body(epath.Path(FOLDER) / "00000004")["files"]
  for name, row in rows.items():
    data = bytes(content(store, f"00000004/{name}"))
    crc = google_crc32c.value(data)
    assert row == {"bytes": len(data), "crc32c": f"{crc:08x}"}
  found = ocp.PyTreeCheckpointHandler().restore(
    epath.Path(FOLDER) / "00000004" / "state"
  )
  np.testing.assert_array_equal(found["w"], state(4)["w"])
  manager = ocp.CheckpointManager(
    FOLDER,
    options=ocp.CheckpointManagerOptions(
      step_name_format=ocp.path.step.standard_name_format(
        step_format_fixed_length=8
      ),
      read_only=True,
    ),
  )
  assert manager.all_steps() == [3, 4]


def test_damage_is_found_and_kept_for_the_user(store):
  save(1, 2, 3, 4, keep=9)
  data = next(x for x in names(store, "00000004/state/ocdbt.*/d/"))
  change(data, bytes(content(store, data)[:-1]) + b"x")
  change(next(iter(names(store, "00000003/state/_METADATA"))))
  change("00000002.manifest.json")
  before = len(store.requests)
  assert restore() == (1, 3)
  # Nothing of the damaged ones was read to find that out.
  reads = [x for x in store.requests[before:] if "/d/" in x and "media" in x]
  assert not [x for x in reads if "0000000" in x and "00000001" not in x]
  labels = {x.split("/")[1] for x in names(store, "quarantine/")}
  assert {x.removesuffix(".manifest.json") for x in labels} == {
    "00000004-wrong-checksum",
    "00000003-missing-file",
    "00000002-no-manifest",
  }
  name = data.replace("00000004", "quarantine/00000004-wrong-checksum")
  assert content(store, name)[-1:] == b"x"
  assert reader.steps(FOLDER) == [1]


def test_an_interrupted_save_is_removed_and_a_whole_one_is_not(store):
  save(1, 2)
  for mark in ("00000002.manifest.json", "00000002/commit_success.txt"):
    change(mark)
  assert names(store, "00000002/")
  assert restore() == (1, 0)
  assert not names(store, "00000002/")
  # Only one of the marks is not interrupted, but damaged.
  change("00000001/commit_success.txt")
  save(2)
  change("00000002.manifest.json")
  with pytest.raises(checkpointer.CheckpointError, match="no checkpoint in"):
    restore()
  assert names(store, "quarantine/00000001-missing-file/")
  assert names(store, "quarantine/00000002-no-manifest/")


@pytest.mark.nightly
def test_a_bucket_that_fails_now_and_then_loses_nothing(store):
  store.set_faults(busy=0.05, cut=0.01)
  save(1, 2, 3, keep=1)
  assert restore() == (3, 0)
  store.set_faults()
  assert reader.steps(FOLDER) == [3]


def assert_set(event):
  assert event.wait(60)


def test_a_slow_bucket_delays_saves_and_not_the_run(store, monkeypatch):
  """A due step is left out, the next one stands in, the last one is saved."""
  monkeypatch.setattr(checkpointer, "_WAIT_SECONDS", 0.2)
  monkeypatch.setattr(checkpointer, "_PAUSE_SECONDS", 0.0)
  go = threading.Event()
  with checkpointer.Checkpoints(
    FOLDER,
    checkpointing.config(every_steps=2),
    before_commit=lambda: go.wait(60),
  ) as checkpoints:
    assert checkpoints.save(2, state(2), {})
    start = time.monotonic()
    for step in (3, 4, 5, 6):
      assert not checkpoints.save(step, state(step), {})
    assert time.monotonic() - start < 5
    go.set()
    concurrent = checkpoints._pending
    assert concurrent is not None
    concurrent.result()
    assert checkpoints.save(7, state(7), {})
    assert checkpoints.save(9, state(9), {}, force=True)
    assert checkpoints.failures == 0
  assert reader.steps(FOLDER) == [2, 7, 9]


def test_saves_fail_for_long_before_a_run_ends(store, monkeypatch):
  """And the last one is repeated at the end."""
  monkeypatch.setattr(checkpointer, "_PAUSE_SECONDS", 0.1)
  broken = [True]

  def commit():
    if broken[0]:
      raise OSError("no such host")

  config = checkpointing.config(max_failures=2)
  with checkpointer.Checkpoints(
    FOLDER, config, before_commit=commit
  ) as checkpoints:
    for step in (1, 2, 3):
      assert checkpoints.save(step, state(step), {}, force=True)
      checkpoints._collect_pending()
    assert checkpoints.failures == 3
    threading.Timer(0.5, broken.__setitem__, (0, False)).start()
    checkpoints.wait()
    assert checkpoints.failures >= 3
    broken[0] = True
    monkeypatch.setattr(checkpointer, "_OUTAGE_SECONDS", 0.5)
    checkpoints.save(4, state(4), {})
    with pytest.raises(checkpointer.CheckpointError, match="no such host"):
      checkpoints.wait()
    broken[0] = False
    assert checkpoints.save(5, state(5), {})
  assert reader.steps(FOLDER) == [3, 5]


def test_what_goes_wrong_while_reading_is_no_wrong_setting(store, monkeypatch):
  save(1)
  found = reader.find_damage

  def lose(path):
    assert not found(path)
    for name in names(store, "00000001/state/ocdbt.*/d/"):
      change(name)
    return ""

  monkeypatch.setattr(reader, "find_damage", lose)
  with pytest.raises(Exception, match="cannot read gs://|error while") as error:
    restore()
  assert not isinstance(error.value, ValueError)


def test_a_workdir_in_a_bucket_proves_that_it_can_be_written(store):
  preflight.check_workdir("a", "gs://a-bucket/runs/b", timeout_seconds=5)
  assert not names(store)
