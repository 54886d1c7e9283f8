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


def seal(folder, change):
  """Changes the body of a manifest and makes its checksum right again."""
  path = manifest.path_for(folder)
  body = json.loads(path.read_text())["body"]
  body = change(body) or body
  whole = {"crc32c": manifest._json_checksum(body), "body": body}
  path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
  ("change", "rule"),
  [
    (lambda b: [b], "'body' in it must be an object"),
    (lambda b: b.pop("files") and b, "must have a field 'files'"),
    (lambda b: b.pop("facts") and b, "must have a field 'facts'"),
    (lambda b: b.pop("name") and b, "must have a field 'name'"),
    (lambda b: b | {"name": ["00000007"]}, "'name' in it must be a string"),
    (lambda b: b | {"facts": [1]}, "'facts' in it must be an object"),
    (lambda b: b | {"facts": {"score": "a"}}, "'score' in its facts must be"),
    (lambda b: b | {"facts": {"score": 10**400}}, "'score' in its facts"),
    (lambda b: b | {"files": ["meta"]}, "'files' in it must be an object"),
    (lambda b: b | {"files": {"meta": 3}}, "its entry of meta must be"),
    (lambda b: b | {"files": {"meta": {}}}, "must have a field 'bytes'"),
    (
      lambda b: b | {"files": {"meta": {"bytes": "2", "crc32c": ""}}},
      "'bytes' in its entry of meta must be an integer",
    ),
    (
      lambda b: b | {"files": {"meta": {"bytes": 2, "crc32c": 3}}},
      "'crc32c' in its entry of meta must be a string",
    ),
  ],
)
def test_a_sealed_manifest_of_another_program_is_damage(folder, change, rule):
  seal(folder, change)
  damage = manifest.find_damage(folder)
  assert damage.startswith("damaged manifest: 00000007.manifest.json: ")
  assert rule in damage
  with pytest.raises(manifest.ManifestError):
    manifest.read(folder)


def test_a_manifest_that_nests_is_damage(folder):
  manifest.path_for(folder).write_text('{"body":' + "[" * 10**6)
  assert "nests too deeply" in manifest.find_damage(folder)
  for depth in (500, 2000, 5000):
    text = '{"crc32c": "0", "body": {"a":' + "[" * depth + "]" * depth + "}}"
    manifest.path_for(folder).write_text(text)
    assert manifest.find_damage(folder).startswith("damaged manifest: ")


def test_a_manifest_that_is_no_file_is_damage(folder):
  path = manifest.path_for(folder)
  path.unlink()
  os.mkfifo(path)
  assert "must be a regular file" in manifest.find_damage(folder)
  path.unlink()
  path.mkdir()
  assert "must be a regular file" in manifest.find_damage(folder)


@pytest.mark.parametrize(
  "name", ["../secret", "/etc/hostname", "state/../../secret", "a\0b"]
)
def test_no_file_outside_the_folder_is_read(folder, name, monkeypatch):
  (folder.parent / "secret").write_text("1234")
  seal(folder, lambda b: b["files"].update({name: {"bytes": 4, "crc32c": ""}}))
  damage = manifest.find_damage(folder)
  assert damage.startswith("missing file: ") and "4" not in damage


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "nothing"])
def test_a_file_without_an_end_is_not_read(folder, target):
  """A sealed manifest may name it."""
  path = folder / "state" / "empty"
  path.unlink()
  if target == "pipe":
    os.mkfifo(path)
  else:
    os.symlink(target, path)
  row = {"bytes": 0, "crc32c": "12345678"}
  seal(folder, lambda b: b["files"].update({"state/empty": row}))
  damage = manifest.find_damage(folder)
  assert damage.startswith(("wrong checksum: state/empty", "missing file: "))


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
