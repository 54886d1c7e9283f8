"""A damaged checkpoint is quarantined, and a wrong number is never restored.

Each test damages the newest of two checkpoints on disk, file by file, and
checks which one a run would resume from.
"""

import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from data_pipelines.validation import SettingError
from grpo_tpu.checkpoint import checkpointer, manifest, reader
from tests.grpo_tpu.checkpoint import checkpointing

# One of each kind of file in a checkpoint.
KINDS = {
  "arrays": "state/ocdbt.process_0/d/*",
  "index of a process": "state/ocdbt.process_0/manifest.ocdbt",
  "index": "state/manifest.ocdbt",
  "merged": "state/d/*",
  "tree": "state/_METADATA",
  "sharding": "state/_sharding",
  "chunks": "state/array_metadatas/process_0",
  "meta": "meta/metadata",
  "step": "_CHECKPOINT_METADATA",
  "commit": "commit_success.txt",
}


def make_state(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  return {
    "params": {"w": jax.random.normal(keys[0], (64, 64))},
    "count": jnp.int32(seed),
    "key": keys[1],
  }


def assert_is(restored, seed):
  assert restored is not None
  assert (restored.step, restored.meta) == (seed, {"is": seed})
  wanted = make_state(seed)
  for name, leaf in (
    ("w", lambda tree: tree["params"]["w"]),
    ("count", lambda tree: tree["count"]),
    ("key", lambda tree: jax.random.key_data(tree["key"])),
  ):
    np.testing.assert_array_equal(leaf(restored.state), leaf(wanted), name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  with checkpointing.opened(folder, keep=5) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(step), {"is": step})
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def largest(folder: pathlib.Path, kind: str) -> pathlib.Path:
  found = list((folder / "00000002").glob(KINDS[kind]))
  return max(found, key=lambda path: path.stat().st_size)


def flip(path, offset):
  whole = bytearray(path.read_bytes())
  whole[offset] ^= 0x10
  path.write_bytes(whole)


def restored(folder):
  with checkpointing.opened(folder) as checkpoints:
    return checkpoints.restore(make_state(0)), checkpoints


def test_what_nobody_damaged_is_restored(folder):
  got, checkpoints = restored(folder)
  assert_is(got, 2)
  assert checkpoints.quarantined == 0
  assert not (folder / "quarantine").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_byte_in_any_file_is_never_restored(folder, kind, caplog):
  path = largest(folder, kind)
  flip(path, path.stat().st_size // 2)
  with caplog.at_level(logging.ERROR):
    got, checkpoints = restored(folder)
  assert_is(got, 1)
  assert checkpoints.scalars()["checkpoint/quarantined"] == 1
  assert [each.name for each in sorted((folder / "quarantine").iterdir())] == [
    *("00000002-wrong-checksum", "00000002-wrong-checksum.manifest.json"),
  ]
  assert "00000002 IS DAMAGED: wrong checksum: " in caplog.text
  assert path.name in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing-file", "wrong-size"])
def test_a_missing_or_a_short_file_is_never_restored(folder, kind, damage):
  path = largest(folder, kind)
  if damage == "missing-file":
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:-1])
  got, _ = restored(folder)
  assert_is(got, 1)
  assert (folder / "quarantine" / f"00000002-{damage}").is_dir()


def test_every_byte_of_the_arrays_counts(folder, tmp_path):
  """Flips bytes at random offsets; Orbax alone restores most of them."""
  draw = np.random.default_rng(0)
  size = largest(folder, "arrays").stat().st_size
  for number, offset in enumerate(draw.integers(0, size, 8)):
    copy = shutil.copytree(folder, tmp_path / f"copy{number}")
    flip(largest(copy, "arrays"), offset)
    got, _ = restored(copy)
    assert_is(got, 1)


@pytest.mark.parametrize("damage", ["deleted", "flipped", "cut", "empty"])
def test_without_a_good_manifest_a_checkpoint_is_not_trusted(folder, damage):
  """A kill between commit and manifest looks like a deleted manifest."""
  path = folder / "00000002.manifest.json"
  if damage == "deleted":
    path.unlink()
  elif damage == "flipped":
    flip(path, path.stat().st_size // 2)
  else:
    path.write_bytes(path.read_bytes()[: 100 if damage == "cut" else 0])
  got, _ = restored(folder)
  assert_is(got, 1)
  kind = "no-manifest" if damage == "deleted" else "damaged-manifest"
  assert (folder / "quarantine" / f"00000002-{kind}").is_dir()


def seal(folder, body):
  """Writes a manifest of step 2 whose own checksum is right."""
  whole = {"crc32c": manifest._json_checksum(body), "body": body}
  (folder / "00000002.manifest.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(
  "change",
  [
    {"files": None},
    {"files": {"meta": 3}},
    {"facts": {"score": "best"}},
    {"facts": []},
    {"name": 3},
  ],
)
def test_a_sealed_manifest_of_another_program_costs_its_checkpoint_alone(
  folder, change
):
  path = folder / "00000002.manifest.json"
  seal(folder, json.loads(path.read_text())["body"] | change)
  assert reader.newest_path(folder) == folder / "00000001"
  assert reader.best_path(folder) is None
  got, _ = restored(folder)
  assert_is(got, 1)
  assert (folder / "quarantine" / "00000002-damaged-manifest").is_dir()


@pytest.mark.parametrize(
  ("change", "rule"),
  [
    ({"step": "2"}, "'step' in its record must be an integer"),
    ({"leaves": [1]}, "'leaves' in its record must be an object"),
    ({"leaves": {"a": 1}}, "item 0 of its leaves must be a string"),
    ({"meta": None}, "'meta' in its record must be an object"),
    ({"unfinished": 3}, "its unfinished step must be an object"),
    ({"unfinished": {}}, "must have a field 'updates_done'"),
  ],
)
def test_a_whole_checkpoint_of_another_program_is_refused_in_words(
  folder, change, rule
):
  path = folder / "00000002" / "meta" / "metadata"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  manifest.write(epath.Path(folder / "00000002"), {"score": None})
  with pytest.raises(SettingError, match=f"not one of this program: .*{rule}"):
    restored(folder)


def test_a_folder_that_is_gone_is_missed(folder, caplog):
  shutil.rmtree(folder / "00000002")
  got, checkpoints = restored(folder)
  assert_is(got, 1)
  assert checkpoints.quarantined == 1
  assert "missing file" in caplog.text


def test_another_step_s_checkpoint_is_not_taken_for_this_one(folder):
  for name in ("", ".manifest.json"):
    (folder / f"00000002{name}").rename(folder / f"00000009{name}")
  got, _ = restored(folder)
  assert_is(got, 1)
  assert (folder / "quarantine" / "00000009-foreign-manifest").is_dir()


def test_the_run_resumes_and_saves_the_step_again(folder):
  flip(largest(folder, "arrays"), 100)
  with checkpointing.opened(folder) as checkpoints:
    assert_is(checkpoints.restore(make_state(0)), 1)
    assert checkpoints.save(2, make_state(2), {"is": 2})
  got, checkpoints = restored(folder)
  assert_is(got, 2)
  # The second damaged one lies beside the first.
  flip(largest(folder, "arrays"), 100)
  restored(folder)
  assert (folder / "quarantine" / "00000002-wrong-checksum-2").is_dir()


def test_where_none_is_whole_nothing_is_started_again(folder):
  """The next start finds only quarantined checkpoints, and fails too."""
  for path in folder.glob("*.manifest.json"):
    path.unlink()
  for _ in range(2):
    with pytest.raises(
      checkpointer.CheckpointError, match="is whole: 00000001-"
    ):
      restored(folder)


def test_a_run_killed_before_its_first_manifest_starts_again(tmp_path):
  """A new run starts at step 0 anyway, so nothing is lost."""
  with checkpointing.opened(tmp_path) as checkpoints:
    checkpoints.save(0, make_state(0), {})
  (tmp_path / "00000000.manifest.json").unlink()
  for _ in range(2):
    with checkpointing.opened(tmp_path) as checkpoints:
      assert checkpoints.restore(make_state(0)) is None
  with checkpointing.opened(tmp_path) as checkpoints:
    assert checkpoints.save(0, make_state(0), {})
    assert checkpoints.restore(make_state(0)) is not None


def test_a_drift_of_leaves_is_an_error_and_no_damage(folder):
  """An older checkpoint would not fit either; the settings are wrong."""
  wanted = make_state(0)
  wanted["params"]["w"] = wanted["params"]["w"].astype(jnp.bfloat16)
  with checkpointing.opened(folder) as checkpoints:
    with pytest.raises(ValueError, match="Set model.param_dtype to what it"):
      checkpoints.restore(wanted)
  assert (folder / "00000002").is_dir()
  assert not (folder / "quarantine").exists()


@pytest.mark.parametrize("kind", ["arrays", "meta", "tree"])
def test_another_run_s_damaged_checkpoint_is_refused_and_left(folder, kind):
  """If no step is asked for, an older one is read."""
  flip(largest(folder, kind), 20)
  before = sorted(folder.rglob("*"))
  params = make_state(0)["params"]
  with pytest.raises(ValueError, match="00000002 is damaged: wrong checksum"):
    reader.restore_params(folder, 2, params)
  assert reader.newest_step(folder) == 1
  got = reader.restore_params(folder, 1, params)
  np.testing.assert_array_equal(got["w"], make_state(1)["params"]["w"])
  assert sorted(folder.rglob("*")) == before


def test_the_meta_of_another_run_is_verified_by_itself(folder):
  flip(largest(folder, "arrays"), 100)
  assert reader.read_record(folder, 2)["meta"] == {"is": 2}
  flip(largest(folder, "meta"), 30)
  with pytest.raises(ValueError, match="meta/metadata"):
    reader.read_record(folder, 2)


def test_the_newest_path_is_the_newest_with_a_manifest(folder):
  (folder / "00000002.manifest.json").unlink()
  assert reader.newest_path(folder).name == "00000001"


def test_a_partial_step_is_no_step_of_another_run(folder):
  """Its parameters are some updates further."""
  shutil.copytree(folder / "00000002", folder / "00000002.1")
  assert reader.steps(folder) == [1, 2]


def test_where_none_of_another_run_is_whole_it_is_refused(folder):
  for path in folder.glob("*.manifest.json"):
    path.unlink()
  with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
    reader.newest_step(folder)
