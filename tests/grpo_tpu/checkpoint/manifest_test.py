"""A manifest detects every change of its folder."""

import json
import os

import pytest
from etils import epath

from grpo_tpu.checkpoint import manifest


@pytest.fixture
def folder(tmp_path):
  folder = epath.Path(tmp_path / "00000007")
  (folder / "state" / "d").mkdir(parents=True)
  (folder / "state" / "d" / "0").write_bytes(bytes(range(256)) * 40)
  (folder / "state" / "empty").write_bytes(b"")
  (folder / "meta").write_text("{}")
  manifest.write(folder, {"score": 0.5})
  return folder


def test_what_nobody_touched_is_whole(folder):
  assert manifest.find_damage(folder) == ""
  assert manifest.read(folder) == {"score": 0.5}


def test_its_checksums_are_crc32c(folder):
  """The expected value is from the catalogue of CRCs."""
  (folder / "meta").write_bytes(b"123456789")
  manifest.write(folder, {})
  body = json.loads(manifest.path_for(folder).read_text())["body"]
  assert body["files"]["meta"] == {"bytes": 9, "crc32c": "e3069283"}


def test_any_flipped_bit_is_seen(folder):
  path = folder / "state" / "d" / "0"
  whole = path.read_bytes()
  for offset in (0, 1, 4097, len(whole) - 1):
    for bit in range(8):
      damaged = bytearray(whole)
      damaged[offset] ^= 1 << bit
      path.write_bytes(damaged)
      assert manifest.find_damage(folder).startswith(
        "wrong checksum: state/d/0 "
      )
  path.write_bytes(whole)
  assert manifest.find_damage(folder) == ""


@pytest.mark.parametrize(
  ("change", "damage"),
  [
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "wrong size: state/d/0"),
    (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "wrong size: state/d/0"),
    (lambda p: p.unlink(), "missing file: state/d/0"),
    (lambda p: p.parent.rmtree(), "missing file: state/d/0"),
    (lambda p: (p.parent / "1").write_text(""), "unknown file: state/d/1"),
    (lambda p: (p.unlink(), p.mkdir()), "missing file: state/d/0"),
  ],
)
def test_every_other_change_of_its_files_is_seen(folder, change, damage):
  change(folder / "state" / "d" / "0")
  assert manifest.find_damage(folder).startswith(damage)


def test_a_manifest_is_held_to_its_own_checksum(folder):
  path = manifest.path_for(folder)
  whole = path.read_text()
  for old, new in (
    ('"score": 0.5', '"score": 0.6'),
    ('"bytes": 2,', '"bytes": 3,'),
    (whole[40:], ""),
    (whole, ""),
    (whole, "[]"),
    (whole, "7"),
  ):
    assert old in whole
    path.write_text(whole.replace(old, new))
    assert manifest.find_damage(folder).startswith("damaged manifest: ")
    with pytest.raises(manifest.ManifestError):
      manifest.read(folder)
  path.write_bytes(b"\xff\xfe" + whole.encode())
  assert manifest.find_damage(folder).startswith("damaged manifest: ")


def test_a_folder_without_its_own_manifest_is_not_trusted(folder):
  path = manifest.path_for(folder)
  other = folder.with_name("00000008")
  folder.rename(other)
  assert manifest.find_damage(other).startswith("no manifest: 00000008.")
  path.rename(manifest.path_for(other))
  assert manifest.find_damage(other).startswith("foreign manifest: ")


def test_a_missing_folder_is_detected(folder):
  folder.rmtree()
  assert manifest.find_damage(folder).startswith("missing file: ")


def test_shares_cover_every_file_once(folder):
  """Exactly one share contains the changed file."""
  for name in ("state/d/0", "state/empty", "meta"):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole + b"x")
    for parts in (1, 2, 3, 5):
      found = [
        manifest.find_damage(folder, part=i, parts=parts) for i in range(parts)
      ]
      assert len([each for each in found if each]) == 1
    path.write_bytes(whole)


def test_a_part_of_the_folder_can_be_looked_at_alone(folder):
  (folder / "meta").write_text("[]")
  assert manifest.find_damage(folder, under="state/") == ""
  assert manifest.find_damage(folder, under="meta").startswith("wrong checksum")


def test_a_file_of_several_chunks_is_read_to_its_end(folder, monkeypatch):
  monkeypatch.setattr(manifest, "_CHUNK_BYTES", 100)
  assert manifest.find_damage(folder) == ""


def test_a_kill_while_it_is_written_leaves_none(folder, monkeypatch):
  manifest.path_for(folder).unlink()

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    manifest.write(folder, {})
  assert manifest.find_damage(folder).startswith("no manifest: ")
