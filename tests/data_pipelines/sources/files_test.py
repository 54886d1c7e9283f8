"""The same problems in each layout of a folder."""

import io
import json
import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils.epath import backend
from PIL import Image

from data_pipelines import images, records, validation
from data_pipelines.sources import files, intake, mathvista, stored


def make_image(shade=0):
  file = io.BytesIO()
  Image.new("RGB", (9, 9), (shade, 1, 2)).save(file, "PNG")
  return file.getvalue()


ENTRY = {
  "question": "How many?",
  "image": "images/1.jpg",
  "choices": None,
  "unit": None,
  "precision": None,
  "answer": "3",
  "question_type": "free_form",
  "answer_type": "integer",
  "metadata": {"source": "mine", "grade": None},
}


def github(folder, entries, split="testmini"):
  """Writes the GitHub layout, with images for the first entries."""
  (folder / "images").mkdir(parents=True, exist_ok=True)
  for name in ("1.jpg", "2.jpg"):
    (folder / "images" / name).write_bytes(make_image(len(name)))
  text = entries if isinstance(entries, str) else json.dumps(entries)
  (folder / f"{split}.json").write_text(text, encoding="utf-8")
  return folder


def parquet(folder, pids=("1",), split="testmini"):
  folder.mkdir(parents=True, exist_ok=True)
  table = [
    {
      **ENTRY,
      "pid": pid,
      "decoded_image": {"bytes": make_image(), "path": None},
    }
    for pid in pids
  ]
  path = folder / f"{split}-00000-of-00001-abc.parquet"
  pq.write_table(pa.Table.from_pylist(table), path)
  return folder


def read(folder, split="testmini"):
  """The problems, with the reason in place of each bad record."""
  found = []
  for raw in files.find(folder).readers[split]():
    try:
      found.append(intake._problem(raw))
    except records.BadRecord as error:
      found.append(error.reason)
  return found


def as_github(snapshot, folder):
  """The parquet snapshot in the layout of the GitHub repository."""
  (folder / "images").mkdir(parents=True)
  for split, paths in mathvista.shards(snapshot).items():
    entries = {}
    for row in mathvista.rows(paths):
      image = row.pop("decoded_image")
      row.pop("query")
      (folder / row["image"]).write_bytes(image["bytes"])
      if row["precision"] is not None:
        row["precision"] = int(row["precision"])
      entries[row["pid"]] = row
    (folder / f"{split}.json").write_text(json.dumps(entries, indent=1))
  return folder


def test_both_layouts_of_the_snapshot_hold_the_same_problems(
  fixtures, tmp_path
):
  snapshot = fixtures / "mathvista_schema"
  folder = as_github(snapshot, tmp_path / "data")
  for split, count in (("testmini", 323), ("test", 60)):
    shipped = read(snapshot, split)
    assert read(folder, split) == shipped
    assert len(shipped) == count
    assert all(isinstance(problem, records.Problem) for problem in shipped)


def test_json_may_lie_in_the_folder_or_in_its_data(tmp_path):
  github(tmp_path / "a", {"1": ENTRY})
  github(tmp_path / "b" / "data", {"1": ENTRY})
  assert read(tmp_path / "a") == read(tmp_path / "b")
  found = files.find(tmp_path / "a").files
  assert found == files.find(tmp_path / "b").files
  assert list(found) == ["images/1.jpg", "testmini.json"]


def test_an_entry_is_a_problem_whose_pid_is_its_key(tmp_path):
  github(tmp_path, {"7": ENTRY, "8": {**ENTRY, "pid": "8", "precision": 2}})
  first, second = read(tmp_path)
  assert (first.pid, second.pid, second.precision) == ("7", "8", 2)
  assert first.images[0] == make_image(5)
  assert first.metadata == {"source": "mine"}
  assert first.query == (
    "Hint: Please answer the question requiring an integer answer and provide "
    "the final value, e.g., 1, 2, 3, at the end.\nQuestion: How many?"
  )


@pytest.mark.parametrize(
  "image",
  [None, 3, "", "images/9.jpg", "images", "images/\0.jpg", "x" * 5000],
)
def test_an_image_that_is_not_there_is_missing(tmp_path, image):
  github(tmp_path, {"1": {**ENTRY, "image": image}, "2": ENTRY})
  missing, there = read(tmp_path)
  assert missing == "missing_image" and there.pid == "2"
  _, rejects = intake.check_records(files.find(tmp_path).readers)
  assert [reject["pid"] for reject in rejects] == ["1"]


def test_an_image_must_be_a_regular_file_of_limited_size(tmp_path, monkeypatch):
  """A link to /dev/zero and a pipe, which a reader would never end with."""
  monkeypatch.setattr(images, "MAX_BYTES", 1000)
  names = ["zero.jpg", "pipe.jpg", "large.jpg", "gone.jpg"]
  entries = {name: {**ENTRY, "image": f"images/{name}"} for name in names}
  folder = github(tmp_path, entries | {"1": ENTRY})
  (folder / "images" / "zero.jpg").symlink_to("/dev/zero")
  os.mkfifo(folder / "images" / "pipe.jpg")
  (folder / "images" / "large.jpg").write_bytes(bytes(1001))
  (folder / "images" / "gone.jpg").symlink_to(folder / "nothing")
  kept, rejects = intake.check_records(files.find(folder).readers)
  assert [record.pid for record in kept] == ["1"]
  assert [each["reason"] for each in rejects] == ["missing_image"] * 4
  rules = ("regular file", "regular file", "at most 1000", "No such file")
  for each, rule in zip(rejects, rules, strict=True):
    assert rule in each["detail"]


def test_an_image_outside_the_folder_is_never_read(tmp_path):
  (tmp_path / "secret.jpg").write_bytes(make_image())
  for name in ("../secret.jpg", str(tmp_path / "secret.jpg")):
    folder = github(tmp_path / "data", {"1": {**ENTRY, "image": name}})
    assert read(folder) == ["missing_image"]


@pytest.mark.parametrize(
  "entry, reason",
  [
    ({**ENTRY, "pid": "2"}, "mismatched_pid"),
    ({**ENTRY, "pid": 2}, "mismatched_pid"),
    ({**ENTRY, "metadata": "none"}, "bad_metadata"),
  ],
)
def test_an_entry_that_is_no_problem_says_why(tmp_path, entry, reason):
  assert read(github(tmp_path, {"1": entry})) == [reason]


def test_a_pid_that_is_given_twice_is_a_duplicate(tmp_path):
  """A plain parser would silently keep the last one."""
  other = json.dumps({**ENTRY, "answer": "4"})
  text = f'{{"1": {json.dumps(ENTRY)}, "1": {other}}}'
  kept, rejects = intake.check_records(
    files.find(github(tmp_path, text)).readers
  )
  assert [(record.pid, record.key[1]) for record in kept] == [("1", 0)]
  assert [(r["pid"], r["reason"]) for r in rejects] == [("1", "duplicate_pid")]


def test_a_field_that_is_given_twice_makes_a_bad_record(tmp_path):
  text = json.dumps({"1": ENTRY}).replace('"answer"', '"unit": "g", "answer"')
  assert read(github(tmp_path, text)) == ["not_a_record"]


@pytest.mark.parametrize("text", ["{", "3", "\udcff", "[" * 10**6])
def test_a_damaged_json_file_is_named(tmp_path, text):
  github(tmp_path, {})
  path = tmp_path / "testmini.json"
  path.write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(validation.SettingError, match=str(path)):
    read(tmp_path)


def test_written_problems_are_a_source_by_either_folder(tmp_path):
  problems = read(parquet(tmp_path / "snapshot", "123"))
  stored.write({"train": problems[:2], "test": problems[2:]}, tmp_path / "d")
  inner = tmp_path / "d" / "problems" / "1.0.0"
  for folder in (tmp_path / "d", inner):
    train = read(folder, "train")
    assert sorted(train, key=lambda p: p.pid) == problems[:2]
    assert read(folder, "test") == problems[2:]
  assert files.find(tmp_path / "d").files == files.find(inner).files


def test_a_torn_example_is_a_bad_record_and_the_rest_are_read(
  tmp_path, monkeypatch
):
  problems = read(parquet(tmp_path / "snapshot", "12345"))
  stored.write({"train": problems}, tmp_path / "d")
  whole = read(tmp_path / "d", "train")
  get = stored.Source.__getitem__

  def torn(source, index, /):
    if index == 3:
      source._features.deserialize_example_np(b"\xff" * 9)
    return get(source, index)

  monkeypatch.setattr(stored.Source, "__getitem__", torn)
  assert read(tmp_path / "d", "train") == whole[:3] + ["unreadable"] + whole[4:]


def test_a_folder_of_two_kinds_is_refused(tmp_path):
  github(tmp_path, {"1": ENTRY})
  parquet(tmp_path)
  with pytest.raises(validation.SettingError, match="one kind of files"):
    files.find(tmp_path)


def test_a_folder_of_no_kind_says_how_to_get_one(tmp_path):
  (tmp_path / "README.md").touch()
  (tmp_path / "query.json").write_text("{}")
  for folder in (tmp_path, tmp_path / "missing"):
    with pytest.raises(validation.SettingError, match="must"):
      files.find(folder)


@pytest.mark.parametrize("name", ["images/1.jpg", "pics/a/2.jpg"])
def test_another_content_of_the_same_size_is_another_hash(tmp_path, name):
  (tmp_path / "pics" / "a").mkdir(parents=True)
  (tmp_path / "pics" / "a" / "2.jpg").write_bytes(make_image())
  github(tmp_path, {"1": {**ENTRY, "image": name}})
  before = files.find(tmp_path).files
  assert list(before) == [name, "testmini.json"]
  path = tmp_path / name
  path.write_bytes(path.read_bytes()[::-1])
  after = files.find(tmp_path).files
  assert after[name] != before[name]
  assert after["testmini.json"] == before["testmini.json"]


class Bucket(type(backend.tf_backend)):
  """A backend for epath that reads a local folder in place of a bucket.

  For s3://, because epath asks the network about every gs:// bucket.
  """

  def __init__(self, folder: pathlib.Path):
    super().__init__()
    self.folder = str(folder)

  def local(self, path):
    path = str(path)
    if "forbidden" in path:
      raise RuntimeError("403: no credentials")
    assert path.startswith("s3://bucket")
    return path.replace("s3://bucket", self.folder)

  def open(self, path, mode):
    return super().open(self.local(path), mode)

  def glob(self, path):
    found = super().glob(self.local(path))
    return [path.replace(self.folder, "s3://bucket") for path in found]

  def exists(self, path):
    return super().exists(self.local(path))

  def isdir(self, path):
    return super().isdir(self.local(path))

  def listdir(self, path):
    return super().listdir(self.local(path))

  def stat(self, path):
    return super().stat(self.local(path))


@pytest.mark.parametrize("layout", ["parquet", "GitHub"])
def test_a_bucket_is_read_as_a_folder_is(tmp_path, layout, monkeypatch):
  if layout == "GitHub":
    missing = {**ENTRY, "image": "images/9.jpg"}
    github(tmp_path / "data", {"1": ENTRY, "2": missing})
  else:
    parquet(tmp_path / "data", "12")
  monkeypatch.setattr(backend, "tf_backend", Bucket(tmp_path))
  assert read("s3://bucket") == read(tmp_path)
  assert len(read("s3://bucket")) == 2
  assert files.find("s3://bucket").files == files.find(tmp_path).files


def test_a_bucket_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(backend, "tf_backend", Bucket(tmp_path))
  with pytest.raises(validation.SettingError, match="readable: 403"):
    files.find("s3://bucket/forbidden")


def test_datasets_and_the_builder_read_the_same_records(
  fixtures, tmp_path, monkeypatch
):
  """Compares with the `datasets` library, for which the snapshot was made."""
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  datasets = pytest.importorskip("datasets")
  snapshot = fixtures / "mathvista_schema"
  loaded = datasets.load_dataset(str(snapshot), cache_dir=str(tmp_path / "c"))
  loaded = loaded.cast_column("decoded_image", datasets.Image(decode=False))
  theirs = {
    split: [records.from_row(row) for row in loaded[split]]
    for split in ("testmini", "test")
  }
  readers = files.find(snapshot).readers
  ours = {
    split: [intake._problem(row) for row in reader()]
    for split, reader in readers.items()
  }
  assert ours == theirs
  stored.write(ours, tmp_path / "d")
  for split, problems in theirs.items():
    written = list(stored.source(tmp_path / "d", split))
    assert sorted(written, key=lambda p: int(p.pid)) == sorted(
      problems, key=lambda p: int(p.pid)
    )
