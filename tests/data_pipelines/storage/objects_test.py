"""Objects are read as one version, and a folder is put whole or not at all."""

import os

import pytest

from data_pipelines import validation
from data_pipelines.storage import objects
from tests.gcs import folders

FILES = {"a": b"1", "b/it's 1": os.urandom(3 * 2**20), "b.c/empty": b""}


def put(bucket, files, prefix="d"):
  for name, data in files.items():
    bucket.store.put(folders.NAME, f"{prefix}/{name}", data, "", {})


def test_parts_of_an_object_are_those_of_a_file(
  bucket_here, tmp_path, monkeypatch
):
  monkeypatch.setattr(objects, "_BUFFER", 2**20)
  put(bucket_here, FILES)
  (tmp_path / "b").write_bytes(FILES["b/it's 1"])
  bucket_here.store.set_faults(busy=0.05, cut=0.1)
  read = []
  for path in ("gs://bucket/d/b/it's 1", tmp_path / "b"):
    with objects.open_file(path) as file:
      read.append([file.read(7), file.read(2**21), file.seek(-9, 2)])
      read[-1] += [file.read(4), file.tell(), file.read(99), file.read(1)]
  assert read[0] == read[1]


def test_an_object_that_changes_is_not_read_on(bucket_here, monkeypatch):
  monkeypatch.setattr(objects, "_BUFFER", 2**10)
  put(bucket_here, {"a": bytes(2**12)})
  with pytest.raises(validation.SettingError, match="No such object"):
    with objects.open_file("gs://bucket/d/a") as file:
      assert file.read(1) == b"\0"
      put(bucket_here, {"a": b"1" * 2**12})
      file.seek(2**11)
      file.read(1)


@pytest.mark.parametrize(
  "path, words",
  [
    ("gs://no-such/a", "create what is missing"),
    ("gs://forbidden/a", "grant .* roles/storage.objectUser on gs://forbidden"),
  ],
)
def test_a_bucket_that_may_not_be_read_is_named(bucket_here, path, words):
  with pytest.raises(validation.SettingError, match=rf"^data.dir .*{words}"):
    objects.list_objects(path, what="data.dir")


def test_a_folder_is_put_whole_with_its_mark_last(bucket_here, tmp_path):
  """And nothing of the older one stays."""
  for name, data in (FILES | {"last": b"4"}).items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
  put(bucket_here, {"old": b"1", "last": b"1"})
  # Its own uploads, after the listing and the removal.
  bucket_here.store.requests.clear()
  objects.replace_folder(
    tmp_path, "gs://bucket/d", last="last", what="--data_dir"
  )
  assert folders.contents(bucket_here, "d") == FILES | {"last": b"4"}
  blobs = bucket_here.store.objects.items()
  newest = max(blobs, key=lambda item: item[1].generation)
  assert newest[0][1] == "d/last"


def test_a_folder_that_another_process_writes_to_stays_unfinished(
  bucket_here, tmp_path, monkeypatch
):
  (tmp_path / "a").write_bytes(b"1")
  (tmp_path / "last").write_bytes(b"2")
  listed = objects.list_objects

  def other(path, *, what):
    put(bucket_here, {"a": b"another"})
    return listed(path, what=what)

  monkeypatch.setattr(objects, "list_objects", other)
  with pytest.raises(OSError, match="another process"):
    objects.replace_folder(tmp_path, "gs://bucket/d", last="last", what="x")
  assert "last" not in folders.contents(bucket_here, "d")
