"""A copy of a bucket's files is whole, checked, and made once."""

import os
import pathlib
import subprocess
import sys

import pytest

from data_pipelines import validation
from data_pipelines.storage import host_copy, objects
from tests.gcs import folders

# With names that order, dots or spaces could confuse; one is of two pieces.
FILES = {
  "a": b"1",
  "b/it's 1": os.urandom(host_copy._PIECE + 5),
  "b.c/empty": b"",
  "b-": b"2",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  return tmp_path


def put(bucket, files, prefix="d"):
  for name, data in files.items():
    bucket.store.put(folders.NAME, f"{prefix}/{name}", data, "", {})


def read(folder: pathlib.Path) -> dict[str, bytes]:
  files = (path for path in folder.rglob("*") if path.is_file())
  return {x.relative_to(folder).as_posix(): x.read_bytes() for x in files}


def copied(path="gs://bucket/d", **options) -> pathlib.Path:
  return host_copy.host_copy(path, what="data.dir", **options)


def test_a_path_on_a_disk_is_returned(tmp_path):
  assert copied(tmp_path / "no") == tmp_path / "no"


def test_a_copy_has_every_byte_and_is_made_again_when_one_changes(
  bucket_here, home
):
  put(bucket_here, FILES | {"mark/": b""})
  put(bucket_here, {"x": b"beside"}, "d2")
  folder = copied()
  assert read(folder) == FILES
  reads = [x for x in bucket_here.store.requests if "alt=media" in x]
  assert copied() == folder
  assert reads == [x for x in bucket_here.store.requests if "alt=media" in x]
  put(bucket_here, {"a": b"3"})
  changed = copied()
  assert read(changed) == FILES | {"a": b"3"}
  assert not folder.exists()
  (changed / "a").unlink()  # As by someone who makes room.
  assert read(copied()) == FILES | {"a": b"3"}


def test_one_file_and_some_files_of_a_folder(bucket_here, home):
  put(bucket_here, FILES)
  assert copied("gs://bucket/d/a").read_bytes() == b"1"
  assert read(copied(names=("a", "none"))) == {"a": b"1"}


def test_requests_that_fail_change_no_byte(bucket_here, home):
  put(bucket_here, FILES | {f"many/{n}": bytes([n]) * n for n in range(40)})
  whole = read(copied())
  bucket_here.store.set_faults(busy=0.05, cut=0.05)
  put(bucket_here, {"a": b"1"})
  assert read(copied()) == whole


@pytest.mark.parametrize(
  "names", [[], ["x/../../y"], ["x", "x/y"], ["/etc"], ["x//y"], ["."]]
)
def test_what_is_no_folder_of_files_is_refused(bucket_here, home, names):
  put(bucket_here, dict.fromkeys(names, b"1"))
  rule = r"data\.dir \('gs://bucket/d'\) must be a file or a folder of files"
  with pytest.raises(validation.SettingError, match=rule):
    copied()
  assert not [path for path in home.rglob("*") if path.name == "y"]


def test_objects_that_keep_changing_leave_no_copy(
  bucket_here, home, monkeypatch
):
  put(bucket_here, FILES)
  listed = objects.list_objects

  def late(path, *, what):
    found = listed(path, what=what)
    put(bucket_here, {"a": os.urandom(1 + len(bucket_here.store.requests))})
    return found

  monkeypatch.setattr(objects, "list_objects", late)
  with pytest.raises(validation.SettingError, match="must not change while"):
    copied()
  assert not [path for path in home.rglob("*") if path.name == "a"]


def test_a_disk_without_room_is_named(bucket_here, home, monkeypatch):
  put(bucket_here, FILES)
  usage = host_copy.shutil.disk_usage(home)._replace(free=9)
  monkeypatch.setattr(host_copy.shutil, "disk_usage", lambda _: usage)
  with pytest.raises(validation.SettingError, match="0.01 GB, and .* 0.00 GB"):
    copied()
  assert not [path for path in home.rglob("*") if path.name == "a"]


def test_a_bucket_that_does_not_answer_is_no_fault_of_a_setting(
  bucket_here, home, monkeypatch
):
  put(bucket_here, FILES)
  monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.1)
  bucket_here.store.set_faults(outage=True)
  with pytest.raises(OSError, match="gs://bucket does not answer") as caught:
    copied()
  assert validation.is_machine_failure(caught.value)


def test_a_home_that_cannot_be_written_is_replaced(tmp_path, monkeypatch):
  (tmp_path / "home").write_text("no folder")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setattr(host_copy.tempfile, "tempdir", str(tmp_path))
  folder = host_copy.cache_folder("copies")
  assert folder.is_dir() and folder == host_copy.cache_folder("copies")
  assert folder.parent.stat().st_mode & 0o077 == 0


def test_two_processes_of_a_machine_make_one_copy(bucket, tmp_path):
  put(bucket, FILES | {f"many/{n}": b"1" for n in range(100)})
  code = (
    "from data_pipelines.storage import host_copy as h\n"
    "print(h.host_copy('gs://bucket/d', what='data.dir'))"
  )
  environment = os.environ | bucket.environment() | {"HOME": str(tmp_path)}
  started = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  folders_of = {process.communicate()[0].strip() for process in started}
  (folder,) = folders_of
  assert len(read(pathlib.Path(folder))) == len(FILES) + 100
  media = [x for x in bucket.store.requests if "alt=media" in x]
  assert len(media) == len(set(media))
