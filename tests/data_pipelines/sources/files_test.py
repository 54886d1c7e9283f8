"""Each kind of file, read as another library reads it, and damaged ones."""

import datetime
import decimal
import gzip
import io
import json
import os
import pathlib
import pickle
import random
import struct
import tarfile
import tracemalloc

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from PIL import Image

from data_pipelines import images, records, validation
from data_pipelines.sources import files, readers, stored
from data_pipelines.sources.rows import mathvista
from tests.data_pipelines.sources import taken
from tests.gcs import folders


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
    raw = problem(raw)
    found.append(raw.reason if isinstance(raw, records.BadRecord) else raw)
  return found


def problem(raw):
  """The problem of a record in MathVista's schema, or why it is none."""
  try:
    with records.all_faults():
      if isinstance(raw, files.Row):
        return mathvista.to_problem(raw.values, raw.read)
  except records.BadRecord as error:
    return error
  return raw


def as_github(snapshot, folder):
  """The parquet snapshot in the layout of the GitHub repository."""
  (folder / "images").mkdir(parents=True)
  for split, reader in files.find(snapshot).readers.items():
    entries = {}
    for row in (dict(raw.values) for raw in reader()):
      image = row.pop("decoded_image")
      row.pop("query")
      (folder / row["image"]).write_bytes(image["bytes"])
      if row["precision"] is not None:
        row["precision"] = int(row["precision"])
      entries[row["pid"]] = row
    (folder / f"{split}.json").write_text(json.dumps(entries, indent=1))
  return folder


ROWS = [
  {"question": 'a, "b"\r\n\nc?', "answer": "x", "image": "pics/a.png"},
  {"question": "é\u2028;\t", "answer": "", "image": "none.png"},
  {"question": "'", "answer": "0.50", "image": ""},
  {"question": " <image> ", "answer": "[1]", "image": "b"},
]


def write_arrow(path, rows, new):
  table = pa.Table.from_pylist(rows)
  with new(f"{path}.arrow", table.schema) as file:
    file.write_table(table, max_chunksize=3)


def write_tar(path, rows):
  with tarfile.open(f"{path}.tar", "w") as file:
    for index, row in enumerate(rows):
      add(file, f"{index:03}.json", json.dumps(row).encode())


def add(file, name, content, **header):
  member = tarfile.TarInfo(name)
  member.size = len(content)
  for key, value in header.items():
    setattr(member, key, value)
  file.addfile(member, io.BytesIO(content))


def frame(rows):
  return pd.DataFrame(rows)


def gzipped(path, rows):
  frame(rows).to_json(f"{path}.jsonl.gz", orient="records", lines=True)


def pack(path, rows):
  write_tar(path, rows)
  content = pathlib.Path(f"{path}.tar").read_bytes()
  pathlib.Path(f"{path}.tar").unlink()
  pathlib.Path(f"{path}.tar.gz").write_bytes(gzip.compress(content))


def in_folder(write):
  def make(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, rows)

  return make


# Writers of other libraries, but for JSON.
WRITERS = {
  "parquet": lambda p, rows: frame(rows).to_parquet(f"{p}.parquet"),
  "Arrow file": lambda p, rows: write_arrow(p, rows, pa.ipc.new_file),
  "Arrow stream": lambda p, rows: write_arrow(p, rows, pa.ipc.new_stream),
  "feather": lambda p, rows: frame(rows).to_feather(f"{p}.arrow"),
  "JSONL": lambda p, rows: frame(rows).to_json(
    f"{p}.jsonl", orient="records", lines=True
  ),
  "JSONL, gzip": gzipped,
  "JSONL by another name": lambda p, rows: frame(rows).to_json(
    f"{p}.json", orient="records", lines=True
  ),
  "JSON": lambda p, rows: frame(rows).to_json(f"{p}.json", orient="records"),
  "JSON, indented": lambda p, rows: frame(rows).to_json(
    f"{p}.json", orient="records", indent=1
  ),
  "JSON in an object": lambda p, rows: pathlib.Path(f"{p}.json").write_text(
    json.dumps({"version": 1, "tags": ["a"], "data": rows})
  ),
  "JSON by columns": lambda p, rows: frame(rows).to_json(f"{p}.json"),
  "JSON of lists": lambda p, rows: pathlib.Path(f"{p}.json").write_text(
    json.dumps(frame(rows).to_dict("list"))
  ),
  "CSV": lambda p, rows: frame(rows).to_csv(f"{p}.csv", index=False),
  "CSV of Excel": lambda p, rows: frame(rows).to_csv(
    f"{p}.csv", index=False, sep=";", encoding="utf-8-sig"
  ),
  "TSV": lambda p, rows: frame(rows).to_csv(f"{p}.tsv", index=False, sep="\t"),
  "UTF-16": lambda p, rows: frame(rows).to_csv(
    f"{p}.tsv", index=False, sep="\t", encoding="utf-16"
  ),
  "tar": write_tar,
  "tar, gzip": pack,
}
WRITERS = {kind: in_folder(write) for kind, write in WRITERS.items()}


def values(found):
  """The rows by split, as plain values; a reason for each bad record."""
  return {
    split: [
      raw.reason if isinstance(raw, records.BadRecord) else dict(raw.values)
      for raw in reader()
    ]
    for split, reader in found.readers.items()
  }


def without_keys(rows):
  return [
    {k: v for k, v in row.items() if k not in ("pid", "__key__")}
    for row in rows
  ]


@pytest.mark.parametrize("kind", WRITERS)
def test_what_other_libraries_write_is_read(tmp_path, kind):
  WRITERS[kind](tmp_path / "d" / "a-train", ROWS)
  (path,) = (tmp_path / "d").iterdir()
  for source in (tmp_path / "d", path):
    found = files.find(source)
    # Twice: a source is read in several passes, and in other processes.
    for each in (found, pickle.loads(pickle.dumps(found))):
      assert without_keys(values(each)["train"]) == ROWS
    assert list(found.files) == [path.name]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("kind", ["JSONL", "JSON", "CSV"])
def test_a_byte_order_mark_and_blank_lines_are_no_data(tmp_path, kind, mark):
  WRITERS[kind](tmp_path / "a", ROWS[2:])
  (path,) = tmp_path.iterdir()
  path.write_text(mark + path.read_text().replace("\n", "\r\n\r\n"))
  assert values(files.find(path)) == {"": ROWS[2:]}


@pytest.mark.parametrize(
  "name, text, row",
  [
    ("a.tsv", "a,b,c\td\n1\t2\n", {"a,b,c": "1", "d": "2"}),
    ("a.csv", "a;b,c,d\n1;2,3,4\n", {"a;b": "1;2", "c": "3", "d": "4"}),
    ("a.csv", ",a, b \n0,1,2\n", {"Unnamed: 0": "0", "a": "1", "b": "2"}),
    ("a.csv", "a\tb\n1,5\t2\n", {"a": "1,5", "b": "2"}),
  ],
)
def test_the_header_of_a_table_tells_its_columns(tmp_path, name, text, row):
  (tmp_path / name).write_text(text)
  assert values(files.find(tmp_path)) == {"": [row]}


def test_folders_that_datasets_saves_are_read(tmp_path):
  datasets = pytest.importorskip("datasets")
  datasets.disable_progress_bars()
  rows = [
    {
      "question": str(i),
      "n": i,
      "image": {"bytes": make_image(i), "path": None},
    }
    for i in range(9)
  ]
  whole = datasets.Dataset.from_list(rows)
  whole = whole.cast_column("image", datasets.Image())
  whole.save_to_disk(tmp_path / "one", num_shards=2)
  parts = {"train": range(5), "odd": range(5, 7), "validation": range(7, 9)}
  datasets.DatasetDict(
    {split: whole.select(part) for split, part in parts.items()}
  ).save_to_disk(tmp_path / "dict")
  assert values(files.find(tmp_path / "one")) == {"": rows}
  assert values(files.find(tmp_path / "dict")) == {
    split: [rows[i] for i in parts[split]] for split in sorted(parts)
  }
  next((tmp_path / "one").glob("*-00000-*.arrow")).unlink()
  with pytest.raises(validation.SettingError, match="all files of a split"):
    files.find(tmp_path / "one")


def test_a_webdataset_shard_has_a_row_for_each_key(tmp_path):
  one, two = make_image(1), make_image(2)
  with tarfile.open(tmp_path / "s.tar", "w") as file:
    add(file, "d", b"", type=tarfile.DIRTYPE)
    add(file, "./d/a.v1.png", one)
    add(file, "./d/a.JSON", b'{"question": "?", "images": ["a.png"], "n": [1]}')
    add(file, "../b.10.jpg", two)
    add(file, "../b.9.jpg", one)
    add(file, "../b.txt", b"How many?\n")
    add(file, "../b.cls", b"3")
    add(file, "b2.json", b'{"image": "b2.png"}')
    add(file, "b2.0.png", one)
    add(file, "b2.1.png", two)
    add(file, "c.question.txt", "é".encode())
    add(file, "c.choices.json", b'["x"]')
    add(file, "c.npy", b"\x93NUMPY\0")
    add(file, "c.mp4", b"a" * (2**20 + 1))
    add(file, "c.zero", b"", type=tarfile.CHRTYPE)
    add(file, "c.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    add(file, "._c.png", b"of macOS")
    add(file, "c/._c.png", b"of macOS")
    add(file, "e.json", b'{"id": 7, "id": 8}')
    add(file, "f.json", b'{"id": 7}')
  assert values(files.find(tmp_path / "s.tar"))[""] == [
    {"pid": "s/d/a", "__key__": "d/a", "question": "?", "n": [1]}
    | {"image": one, "v1.png": one},
    {"pid": "s/../b", "__key__": "../b", "question": "How many?"}
    | {"answer": "3", "images": [one, two], "9.jpg": one, "10.jpg": two},
    {"pid": "s/b2", "__key__": "b2", "images": [one, two]}
    | {"0.png": one, "1.png": two},
    {"pid": "s/c", "__key__": "c", "question": "é", "choices": ["x"]},
    "not_a_record",
    {"__key__": "f", "id": 7},
  ]


@pytest.mark.parametrize(
  "names, splits",
  [
    ("a.jsonl b.jsonl", {"": "a.jsonl b.jsonl"}),
    ("train.jsonl notes.jsonl", {"train": "train.jsonl"}),
    ("gsm8k-TRAIN.csv x_test_v2.tsv", {"train": 0, "test": 1}),
    ("data/train-00000-of-00001-0123456789abcdef.parquet", {"train": 0}),
    (
      "default/train/0000.parquet default/test/0000.parquet",
      {"train": 0, "test": 1},
    ),
    ("a/train.csv b/train.csv", {"train": "a/train.csv b/train.csv"}),
    ("testmini.json annot_testmini.json query.json", {"testmini": 0}),
    ("testmini.parquet testmini_text_only.json", {"testmini": 0}),
    ("valid.jsonl dev.jsonl", {"valid": 0, "dev": 1}),
    ("pretrain.jsonl contest.jsonl", {"": "contest.jsonl pretrain.jsonl"}),
    ("train/validation.csv train/a.csv", {"train": 1, "validation": 0}),
    ("train2017.json", {"train": 0}),
    ("train/test/a.csv", {"test": 0}),
    ("README.md .cache/a.json images/a.png x.jsonl data.zip", {"": "x.jsonl"}),
    ("train.parquet/part-0.parquet train.parquet/_SUCCESS", {"train": 0}),
    ("dataset_infos.json cache-1.arrow data.arrow", {"": "data.arrow"}),
  ],
)
def test_names_tell_the_split(tmp_path, names, splits):
  for name in names.split():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
  (tmp_path / "loop").symlink_to(tmp_path)
  chosen = files._choose(epath.Path(tmp_path))
  found: dict[str, list[str]] = {}
  for file in chosen:
    name = file.path.relative_to(tmp_path).as_posix()
    found.setdefault(file.split, []).append(name)
  assert found == {
    split: [names.split()[index]] if isinstance(index, int) else index.split()
    for split, index in splits.items()
  }


@pytest.mark.parametrize(
  "names, words",
  [
    ("train.parquet train.jsonl", "one kind .*--source=.*/train.jsonl"),
    ("a.csv b.json", "one kind"),
    ("test-00000-of-00002-aaaa.parquet", "all files of a split"),
    (
      "test-00000-of-00001-a.parquet test-00000-of-00001-b.parquet",
      "all files of a split",
    ),
    ("README.md", r"\.parquet.*holds README\.md"),
    ("images.zip", r"\.parquet.*holds images\.zip"),
    ("", "holds none"),
  ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, names, words):
  for name in names.split():
    (tmp_path / name).touch()
  with pytest.raises(validation.SettingError, match=words) as caught:
    files.find(tmp_path)
  assert "MathVista" not in str(caught.value)


@pytest.mark.parametrize(
  "name, words",
  [
    ("owner/name", "none; .*hf download owner/name --repo-type dataset"),
    ("/no/such/folder", "must be a folder or a file, and there is none"),
    ("a.zip", r"must end in one of \.parquet.*unpack"),
  ],
)
def test_a_source_that_is_no_data_says_why(tmp_path, monkeypatch, name, words):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.zip").touch()
  with pytest.raises(validation.SettingError, match=words):
    files.find(name)


def test_a_row_reads_pictures_inside_the_source_alone(tmp_path):
  """Beside its file, in images/ there, or from the top of the source."""
  places = ["s/d/a.png", "s/d/images/b.png", "s/pics/c.png", "s/images/d.png"]
  for place in [*places, "secret.png", "s2/e.png"]:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(place.encode())
  (tmp_path / "s" / "d" / "a.jsonl").write_text('{"a": 1}')
  (row,) = files.find(tmp_path / "s").readers[""]()
  names = ["a.png", "b.png", "pics/c.png", "d.png"]
  assert [row.read(name) for name in names] == [x.encode() for x in places]
  for prefix in ("", "file://"):
    assert row.read(f"{prefix}{tmp_path}/{places[0]}") == places[0].encode()
  assert row.read("../pics/c.png") == places[2].encode()
  for name, words in (
    ("../../../secret.png", "outside"),
    (f"{tmp_path}/secret.png", "outside"),
    (f"{tmp_path}/s2/e.png", "outside"),
    (f"file://{tmp_path}/secret.png", "outside"),
    ("https://example.com/a.png", "download"),
    ("gone.png", "No such file"),
    ("a.png\0", "null"),
    ("", "outside"),
    (None, "names no file"),
    ("d", "No such file|regular file"),
  ):
    with pytest.raises(records.BadRecord, match=words) as caught:
      row.read(name)
    assert caught.value.reason == "missing_image"


@pytest.mark.parametrize("kind", ["JSONL", "CSV", "parquet", "tar"])
@pytest.mark.parametrize(
  "name", ["pics/a.png", "pics\\a.png", "/home/ann/pics/a.png", "../pics/a.png"]
)
def test_a_changed_picture_changes_the_source(tmp_path, kind, name):
  WRITERS[kind](tmp_path / "d" / "a", [{"q": "?", "file": name}])
  (tmp_path / "pics").mkdir()
  for each in ("a.png", "other.png"):
    (tmp_path / "pics" / each).write_bytes(b"1")
  before = files.find(tmp_path).files
  (data,) = (tmp_path / "d").iterdir()
  assert sorted(before) == ["../pics/a.png", data.name]
  (tmp_path / "pics" / "a.png").write_bytes(b"2")
  after = files.find(tmp_path).files
  assert {k for k in after if after[k] != before[k]} == {"../pics/a.png"}


def test_a_source_may_be_named_from_the_folder_one_is_in(tmp_path, monkeypatch):
  WRITERS["JSONL"](tmp_path / "d" / "train", ROWS)
  (tmp_path / "d" / "a.png").write_bytes(b"1")
  monkeypatch.chdir(tmp_path)
  for source in ("d", "d/train.jsonl", "./d/../d"):
    (row, *_) = files.find(source).readers["train"]()
    assert row.read("a.png") == row.read(f"{tmp_path}/d/a.png") == b"1"


def test_a_row_has_pythons_own_types(tmp_path):
  when = datetime.datetime(2026, 1, 2, 3, 4, 5)
  table = pa.table(
    {
      "when": pa.array([when]),
      "price": pa.array([decimal.Decimal("1.50")]),
      "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())),
      "half": pa.array([0.5], pa.float16()),
      "word": pa.array(["a"]).dictionary_encode(),
      "deep": pa.array([[{"x": [b"1", None]}]]),
    }
  )
  pq.write_table(table, tmp_path / "a.parquet")
  (row,) = values(files.find(tmp_path))[""]
  price = decimal.Decimal("1.50")
  assert row == {"when": when, "price": price, "map": {"a": 1}} | {
    "half": 0.5,
    "word": "a",
    "deep": [{"x": [b"1", None]}],
  }


def text_column(texts):
  """Bytes as a column of text, which nothing checks."""
  column = pa.array(texts, pa.binary())
  return pa.Array.from_buffers(pa.string(), len(texts), column.buffers())


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_text_that_is_no_utf8_costs_its_row(tmp_path, suffix):
  texts = [b"a"] * 4 + [b"\xff"] + [b"a"] * 4
  table = pa.table({"n": list(range(9)), "text": text_column(texts)})
  path = tmp_path / f"a.{suffix}"
  if suffix == "parquet":
    pq.write_table(table, path)
  else:
    with pa.ipc.new_file(path, table.schema) as file:
      file.write_table(table)
  found = values(files.find(path))[""]
  assert found[4] == "unreadable"
  assert [row["n"] for row in found if row != "unreadable"] == [
    *(0, 1, 2, 3, 5, 6, 7, 8)
  ]


@pytest.mark.parametrize(
  "name, content",
  [
    ("a.jsonl", b'{"a": 1}\n%b\n{"a": 2}\n'),
    ("a.csv", b'a\n"1"\n%b\n2\n'),
  ],
)
@pytest.mark.parametrize(
  "bad",
  [
    b'"3" 4',
    b'{"a": "\xff"}',
    b'{"a": 3',
    b'{"a": 1, "a": 2}',
    b"[1]",
    b"\xff,1",
    b"[" * 10**5,
    b"1,2,3",
  ],
)
def test_a_bad_line_costs_itself_alone(tmp_path, name, content, bad):
  (tmp_path / name).write_bytes(content % bad)
  first, middle, last = files.find(tmp_path).readers[""]()
  assert [str(each.values["a"]) for each in (first, last)] == ["1", "2"]
  if isinstance(middle, records.BadRecord):
    assert middle.reason == "not_a_record"
    assert f"2 of {name}" in middle.detail
  else:
    assert name == "a.csv" and bad.isascii()
    assert b"," not in bad.replace(b'", "', b"")


def test_a_picture_in_base64_fits_into_a_cell(tmp_path):
  """The csv module alone takes 131,072 characters."""
  row = {"image": "iVBORw0KGgo" * 50_000, "answer": "1"}
  for kind in ("CSV", "JSONL"):
    WRITERS[kind](tmp_path / kind, [row])
  for path in tmp_path.iterdir():
    assert values(files.find(path)) == {"": [row]}


def test_a_line_that_is_too_long_costs_itself_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(readers, "MAX_LINE", 50)
  (tmp_path / "a.jsonl").write_text(
    '{"a": 1}\n{"a": "%s"}\n{"a": 2}' % ("x" * 99)
  )
  (tmp_path / "a.csv").write_text("a\n1\n%s\n2\n" % ("x" * 130))
  for name in ("a.jsonl", "a.csv"):
    found = list(files.find(tmp_path / name).readers[""]())
    bad = [each for each in found if isinstance(each, records.BadRecord)]
    assert len(bad) == 1
    assert [str(found[i].values["a"]) for i in (0, -1)] == ["1", "2"]


def test_a_json_document_may_be_one_record_or_none(tmp_path):
  for text, rows in (
    ('{"a": 1, "b": null}', [{"a": 1, "b": None}]),
    ("{}", []),
  ):
    (tmp_path / "a.json").write_text(text)
    assert values(files.find(tmp_path)) == {"": rows}


def test_a_json_document_of_two_lists_is_refused(tmp_path):
  (tmp_path / "a.json").write_text('{"a": [{"b": 1}], "c": [{"d": 1}]}')
  with pytest.raises(validation.SettingError, match="one list.*'a', 'c'"):
    files.find(tmp_path)


def test_a_json_document_that_is_too_long_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(readers.untrusted, "MAX_JSON_BYTES", 50)
  WRITERS["JSON"](tmp_path / "a", ROWS)
  with pytest.raises(validation.SettingError, match="a.json.*as JSONL"):
    files.find(tmp_path)


@pytest.mark.parametrize(
  "name, content",
  [
    ("a.parquet", b"PAR1"),
    ("a.arrow", b""),
    ("a.arrow", b"ARROW1\0\0"),
    ("a.jsonl.gz", b"\x1f\x8b\x08"),
    ("a.csv", b"a,a\n1,2\n"),
    ("a.csv", b'a,b\n1,"2\n3,4\n'),
    ("a.json", b"3"),
    ("a.tar", b"a" * 1024),
  ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(validation.SettingError, match=str(path)):
    values(files.find(tmp_path))


@pytest.mark.parametrize(
  "kind", ["parquet", "Arrow file", "JSONL, gzip", "tar"]
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_torn_file_is_named(tmp_path, kind, share):
  rows = [{"a": random.Random(i).randbytes(100).hex()} for i in range(500)]
  WRITERS[kind](tmp_path / "a", rows)
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole)) // 512 * 512 - 200])
  with pytest.raises(validation.SettingError, match=str(path)):
    values(files.find(path))


def test_a_damaged_header_does_not_end_a_tar(tmp_path):
  WRITERS["tar"](tmp_path / "a", ROWS)
  content = bytearray((tmp_path / "a.tar").read_bytes())
  content[1024] ^= 1  # The name in the second header, which its sum covers.
  (tmp_path / "a.tar").write_bytes(content)
  with pytest.raises(validation.SettingError, match="no header at byte 1024"):
    values(files.find(tmp_path))


def test_a_sample_that_is_too_large_costs_itself_alone(tmp_path, monkeypatch):
  """As a sparse file may be, which takes no space in the tar."""
  monkeypatch.setattr(readers, "MAX_LINE", 2000)
  with tarfile.open(tmp_path / "a.tar", "w") as file:
    for name in ("a.0.png", "b.0.png", "b.1.png", "b.2.png", "c.0.png"):
      add(file, name, bytes(900))
  first, bad, last = values(files.find(tmp_path))[""]
  assert bad == "image_too_large"
  assert first["image"] == last["image"] == bytes(900)


def test_a_header_of_a_tar_takes_no_memory(tmp_path):
  """A name of 1 GiB, which `tarfile` would read at once."""
  member = tarfile.TarInfo("a")
  member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**30
  with open(tmp_path / "a.tar", "wb") as file:
    file.write(member.tobuf())
    file.truncate(2**30 + 2048)
  with pytest.raises(validation.SettingError, match="a header has"):
    list(readers.tar(epath.Path(tmp_path / "a.tar")))


def test_offsets_beyond_the_data_cost_their_row(tmp_path):
  """Arrow itself would follow them, to anywhere in memory."""
  table = pa.table({"n": [0, 1, 2], "text": ["a", "b", "c"]})
  path = tmp_path / "a.arrow"
  with pa.ipc.new_file(path, table.schema) as file:
    file.write_table(table)
  ends = struct.pack("<4i", 0, 1, 2, 3), struct.pack("<4i", 0, 1, 2**30, 2**30)
  assert path.read_bytes().count(ends[0]) == 1
  path.write_bytes(path.read_bytes().replace(*ends))
  first, *rest = values(files.find(tmp_path))[""]
  assert first == {"n": 0, "text": "a"} and "unreadable" in rest


def test_two_columns_of_one_name_are_refused(tmp_path):
  """Rows would hold the last one alone."""
  pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "a.parquet")
  with pytest.raises(validation.SettingError, match="two columns"):
    files.find(tmp_path)


def test_a_pipe_is_refused(tmp_path):
  """A reader would wait for it."""
  os.mkfifo(tmp_path / "a.jsonl")
  with pytest.raises(validation.SettingError, match="a.jsonl.*regular file"):
    files.find(tmp_path)


def test_rows_of_large_pictures_are_held_one_by_one():
  sizes = [readers._batch_size(100, 100 * 2**n) for n in (10, 20, 22, 25)]
  assert sizes == [1000, 8, 2, 1]
  assert readers._batch_size(0, 0) == 1


@pytest.mark.parametrize("kind", ["parquet", "CSV"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
  """32 MB of rows in one row group, of which a reader holds few at a time."""
  rng = random.Random(0)
  rows = [{"n": i, "text": rng.randbytes(2000).hex()} for i in range(8000)]
  WRITERS[kind](tmp_path / "a", rows)
  (path,) = tmp_path.iterdir()
  before = pa.total_allocated_bytes()
  reader = readers.KINDS[path.suffix](epath.Path(path))
  next(reader)
  tracemalloc.start()
  high = max(pa.total_allocated_bytes() for _ in reader) - before
  assert tracemalloc.get_traced_memory()[1] < 20e6
  tracemalloc.stop()
  assert high < 16e6


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


def test_an_entry_is_a_problem_whose_pid_is_its_key(tmp_path):
  github(tmp_path, {"7": ENTRY, "8": {**ENTRY, "pid": 8, "precision": 2}})
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
  [None, 3, "", "images/9.jpg", "images", "images/\0.jpg", "x" * 5000 + ".jpg"],
)
def test_an_image_that_is_not_there_is_missing(tmp_path, image):
  github(tmp_path, {"1": {**ENTRY, "image": image}, "2": ENTRY})
  missing, there = read(tmp_path)
  assert there.pid == "2"
  # Without any name the problem has no picture.
  nameless = image in (None, "") and missing.images == ()
  assert nameless or missing == "missing_image"


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
  *rejects, kept = map(problem, files.find(folder).readers["testmini"]())
  assert kept.pid == "1"
  assert [each.reason for each in rejects] == ["missing_image"] * 4
  rules = ("regular file", "regular file", "at most 1000", "No such file")
  for each, rule in zip(rejects, rules, strict=True):
    assert rule in each.detail


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


def test_a_pid_that_is_given_twice_is_read_twice(tmp_path):
  """A plain parser would silently keep the last one."""
  other = json.dumps({**ENTRY, "answer": "4"})
  text = f'{{"1": {json.dumps(ENTRY)}, "1": {other}}}'
  found = read(github(tmp_path, text))
  assert [(each.pid, each.answer) for each in found] == [("1", "3"), ("1", "4")]


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
  taken.write({"train": problems[:2], "test": problems[2:]}, tmp_path / "d")
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
  taken.write({"train": problems}, tmp_path / "d")
  whole = read(tmp_path / "d", "train")
  get = stored.Source.__getitem__

  def torn(source, index, /):
    if index == 3:
      stored.decode(b"\xff" * 9)
    return get(source, index)

  monkeypatch.setattr(stored.Source, "__getitem__", torn)
  assert read(tmp_path / "d", "train") == whole[:3] + ["unreadable"] + whole[4:]


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


@pytest.mark.parametrize("kind", WRITERS)
def test_a_bucket_is_read_as_a_folder_is(tmp_path, kind, bucket_here):
  """In parts: no file is read whole but a JSON document."""
  WRITERS[kind](tmp_path / "d" / "train", ROWS)
  (tmp_path / "d" / "pics").mkdir()
  (tmp_path / "d" / "pics" / "a.png").write_bytes(b"a picture")
  folders.upload(bucket_here, tmp_path / "d", "d")
  bucket, local = files.find("gs://bucket/d"), files.find(tmp_path / "d")
  assert values(bucket) == values(local) and len(values(local)["train"]) == 4
  assert bucket.files == local.files
  (row, *_) = bucket.readers["train"]()
  for name in ("pics/a.png", "gs://bucket/d/pics/a.png"):
    assert row.read(name) == b"a picture"
  with pytest.raises(records.BadRecord, match="outside"):
    row.read("../../b.png")


def no_file(name):
  raise AssertionError(name)


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
    split: [mathvista.to_problem(row, no_file) for row in loaded[split]]
    for split in ("testmini", "test")
  }
  ours = {
    split: [problem(row) for row in reader()]
    for split, reader in files.find(snapshot).readers.items()
  }
  assert ours == theirs
  taken.write(ours, tmp_path / "d")
  for split, problems in theirs.items():
    written = list(stored.source(tmp_path / "d", split))
    assert sorted(written, key=lambda p: int(p.pid)) == sorted(
      problems, key=lambda p: int(p.pid)
    )
