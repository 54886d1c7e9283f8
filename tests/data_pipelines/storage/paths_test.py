"""A path is on a disk or in a bucket, and a file appears whole."""

import os
import pathlib

import pytest

from data_pipelines.storage import paths


@pytest.mark.parametrize(
  "value, path",
  [
    ("gs://my-bucket/runs/1", "gs://my-bucket/runs/1"),
    ("gs://my-bucket//runs/1/", "gs://my-bucket/runs/1"),
    ("gs://my-bucket", "gs://my-bucket"),
    ("gs://my-bucket/it's 1", "gs://my-bucket/it's 1"),
    ("run", "run"),
    ("~/run", "/home/someone/run"),
  ],
)
def test_a_path_is_local_or_in_a_bucket(monkeypatch, value, path):
  monkeypatch.setenv("HOME", "/home/someone")
  assert os.fspath(paths.to_path("--workdir", value)) == path
  assert paths.is_remote(value) == path.startswith("gs://")


@pytest.mark.parametrize(
  "value",
  [
    *(
      "gs://",
      "gs:///a",
      "gs://b/x",
      "gs://My-Bucket/a",
      "gs://my-bucket/../a",
    ),
    *("s3://my-bucket/a", "https://a/b", "hf://a", "gs://my-bucket/a\nb", " "),
  ],
)
def test_other_addresses_are_refused(value):
  with pytest.raises(ValueError, match=r"^--workdir \('"):
    paths.to_path("--workdir", value)


def test_a_file_that_cannot_be_written_keeps_its_content(tmp_path, monkeypatch):
  path = tmp_path / "a"
  paths.write_whole(path, b"old")

  def full(*_):
    raise OSError("No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
      paths.write_whole(path, b"new")
  assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
  paths.write_whole(path, b"new")
  assert path.read_bytes() == b"new"


def test_links_are_followed_on_a_disk_alone(tmp_path):
  (tmp_path / "link").symlink_to(tmp_path)
  assert paths.absolute(tmp_path / "link") == paths.absolute(tmp_path)
  assert os.fspath(paths.absolute("a")) == str(pathlib.Path.cwd() / "a")
  assert os.fspath(paths.absolute("gs://my-bucket/a")) == "gs://my-bucket/a"
