import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import images, validation
from data_pipelines.sources import build, intake, stored
from data_pipelines.sources.drawn import synthetic
from data_pipelines.text import tokenizer
from tests.data_pipelines.sources import layouts
from tests.gcs import folders

SPEC = synthetic.Spec(
  num_problems=60,
  seed=0,
  difficulty=1,
  kinds=("count", "total", "color"),
  image_size=32,
  multi_choice_share=0.0,
  min_options=2,
  max_options=4,
)


SHARD = "testmini-00000-of-00001-0.parquet"


def request(folder, **changes):
  settings = dict(
    source=SPEC,
    data_dir=str(folder),
    seed=0,
    eval_fraction=0.3,
    vocab_size=512,
    max_reject_fraction=0.01,
  )
  return build.Request(**{**settings, **changes})


def contents(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def rows(num_bad):
  """Sixty rows of a snapshot, the first few without a question."""
  for index, problem in enumerate(synthetic.problems(SPEC)):
    row = dataclasses.asdict(problem)
    row["decoded_image"] = {"bytes": row.pop("images")[0], "path": None}
    row["choices"] = list(problem.choices) or None
    yield {**row, "question": "" if index < num_bad else problem.question}


@pytest.fixture
def snapshot(tmp_path):
  def write(num_bad=0):
    folder = tmp_path / "snapshot"
    folder.mkdir(exist_ok=True)
    path = folder / SHARD
    pq.write_table(pa.Table.from_pylist(list(rows(num_bad))), path)
    return str(folder)

  return write


def test_a_data_dir_has_all_that_a_run_needs(tmp_path):
  manifest = build.build_data_dir(request(tmp_path / "data"))
  assert manifest == json.loads((tmp_path / "data/manifest.json").read_text())
  problems = []
  for split, count in manifest["counts"].items():
    source = stored.source(tmp_path / "data", split)
    assert len(source) == count
    problems += source
  assert set(manifest["counts"]) == {"train", "eval"}
  expected = list(synthetic.problems(SPEC))
  assert sorted(problems, key=lambda p: p.pid) == expected
  made = tokenizer.Tokenizer(tmp_path / "data/tokenizer.model")
  assert manifest["tokenizer"]["fingerprint"] == made.fingerprint
  assert (tmp_path / "data/rejects.jsonl").read_text() == ""
  assert (manifest["source"], manifest["terms"]) == ("synthetic", "")


def test_the_same_request_gives_the_same_bytes(tmp_path):
  for name in ("a", "b"):
    build.build_data_dir(request(tmp_path / name))
  assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_complete_data_dir_is_reused(tmp_path, monkeypatch):
  first = build.build_data_dir(request(tmp_path / "data"))
  monkeypatch.delattr(build, "_write")
  assert build.build_data_dir(request(tmp_path / "data")) == first


@pytest.mark.parametrize(
  "change",
  [
    {"seed": 1},
    {"eval_fraction": 0.5},
    {"vocab_size": 600},
    {"source": dataclasses.replace(SPEC, difficulty=2)},
  ],
)
def test_another_request_replaces_the_data_dir_only_if_asked(tmp_path, change):
  build.build_data_dir(request(tmp_path / "data"))
  whole = contents(tmp_path / "data")
  wanted = request(tmp_path / "data", **change)
  (name,) = change
  named = "source.difficulty" if name == "source" else name
  with pytest.raises(
    validation.SettingError,
    match=rf"{named} was .* and is .*another --data_dir, or add --overwrite",
  ):
    build.build_data_dir(wanted)
  assert contents(tmp_path / "data") == whole
  build.build_data_dir(wanted, overwrite=True)
  build.build_data_dir(request(tmp_path / "fresh", **change))
  assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
  "damage",
  [
    lambda folder: (folder / "manifest.json").unlink(),
    lambda folder: (folder / "manifest.json").write_text("{"),
    lambda folder: (folder / "manifest.json").write_text("[]"),
    lambda folder: (folder / "tokenizer.model").unlink(),
    lambda folder: (folder / "tokenizer.model").write_bytes(b""),
    lambda folder: shutil.rmtree(folder / "problems"),
  ],
)
def test_an_incomplete_data_dir_is_rebuilt(tmp_path, damage):
  build.build_data_dir(request(tmp_path / "data"))
  whole = contents(tmp_path / "data")
  damage(tmp_path / "data")
  build.build_data_dir(request(tmp_path / "data"))
  assert contents(tmp_path / "data") == whole


def test_a_killed_run_leaves_the_old_data_dir_and_no_other(
  tmp_path, monkeypatch
):
  build.build_data_dir(request(tmp_path / "data"))
  whole = contents(tmp_path / "data")
  # After SIGKILL nothing is cleaned up.
  with monkeypatch.context() as context:
    context.setattr(build.shutil, "rmtree", lambda *args, **kwargs: None)
    context.setattr(build.stored, "write_encoded", lambda *args: sys.exit(9))
    with pytest.raises(SystemExit):
      build.build_data_dir(request(tmp_path / "data", seed=1), overwrite=True)
  assert contents(tmp_path / "data") == whole
  assert list(tmp_path.glob(".data.building*/tokenizer.model"))
  build.build_data_dir(request(tmp_path / "data", seed=1), overwrite=True)
  assert {path.name for path in tmp_path.iterdir()} == {"data", ".data.lock"}
  assert contents(tmp_path / "data") != whole


@pytest.mark.parametrize("other", [{}, {"seed": 1}], ids=["same", "another"])
def test_machines_that_share_a_folder_without_locks_leave_one_whole_set(
  tmp_path, monkeypatch, other
):
  """The second builds all of it while the first does."""
  build.build_data_dir(request(tmp_path / "whole"))
  write, hosts, placed = build._write, ["host-2"], []
  monkeypatch.setattr(build, "_lock", lambda _: contextlib.nullcontext())
  monkeypatch.setattr(build.socket, "gethostname", lambda: "".join(hosts))

  def interrupted(*arguments):
    manifest = write(*arguments)
    if hosts:
      hosts.pop()
      late = request(tmp_path / "data", **other)
      build.build_data_dir(late, overwrite=True)
      placed.append((tmp_path / "data").stat().st_ino)
    return manifest

  monkeypatch.setattr(build, "_write", interrupted)
  build.build_data_dir(request(tmp_path / "data"))
  assert contents(tmp_path / "data") == contents(tmp_path / "whole")
  # One that is right stays in its place, where the other may be reading it.
  assert (placed == [(tmp_path / "data").stat().st_ino]) == (not other)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"data", "whole", ".whole.lock"}


def test_a_data_dir_in_a_bucket_is_the_one_on_a_disk(
  tmp_path, monkeypatch, bucket_here
):
  """To the byte; and what is in its way is treated alike."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  there, local = request("gs://bucket/data"), request(tmp_path / "data")
  manifest = build.build_data_dir(local)
  assert build.build_data_dir(there) == manifest
  assert folders.contents(bucket_here, "data") == contents(tmp_path / "data")
  copy = stored.on_this_host("gs://bucket/data", what="data.dir")
  assert contents(copy) == contents(tmp_path / "data")
  again = request(tmp_path / "again", source="gs://bucket/data")
  assert build.build_data_dir(again)["rejects"] == {}
  with pytest.raises(validation.SettingError, match=r"\d of gs://bucket/data"):
    build.build_data_dir(request(tmp_path / "x", exclude=("gs://bucket/data",)))
  before = len(bucket_here.store.requests)
  assert build.build_data_dir(there) == manifest
  asked = bucket_here.store.requests[before:]
  assert not [x for x in asked if not x.startswith("GET")]
  other = request("gs://bucket/data", seed=1)
  with pytest.raises(validation.SettingError, match="seed was 0 and is 1"):
    build.build_data_dir(other)
  assert build.build_data_dir(other, overwrite=True) != manifest
  assert not list((tmp_path / "home").rglob("*.building*"))


def test_an_upload_that_is_killed_is_no_data_set(
  tmp_path, monkeypatch, bucket_here
):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  whole = build.build_data_dir(request("gs://bucket/data"))
  store, other = bucket_here.store, request("gs://bucket/data", seed=1)
  with monkeypatch.context() as context:
    context.setattr(build.objects, "PATIENCE_SECONDS", 0.1)
    store.at_put(4, lambda: store.set_faults(outage=True))
    with pytest.raises(OSError, match="does not answer"):
      build.build_data_dir(other, overwrite=True)
  store.set_faults()
  assert build.read_manifest("gs://bucket/data") is None
  assert build.build_data_dir(request("gs://bucket/data")) == whole


@pytest.mark.parametrize("name", ["data/thesis.tex", "data"])
def test_foreign_objects_are_never_replaced(bucket_here, name):
  bucket_here.store.put(folders.NAME, name, b"dear", "", {})
  with pytest.raises(validation.SettingError, match="but holds"):
    build.build_data_dir(request("gs://bucket/data"), overwrite=True)
  assert [x for _, x in bucket_here.store.objects] == [name]


@pytest.mark.parametrize("place", ["file", "folder"])
def test_foreign_files_are_never_replaced(tmp_path, place):
  data_dir = tmp_path / "data"
  if place == "folder":
    data_dir.mkdir()
    (data_dir / "thesis.tex").write_text("dear")
  else:
    data_dir.write_text("dear")
  with pytest.raises(validation.SettingError, match="data_dir"):
    build.build_data_dir(request(data_dir))
  assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_log_says_how_many_records_are_left(
  tmp_path, snapshot, caplog, monkeypatch
):
  monkeypatch.setattr(intake, "_FEW", 20)
  monkeypatch.setattr(intake, "_LOG_EVERY", 0.0)
  with caplog.at_level("INFO", logger="absl"):
    source = snapshot()
    build.build_data_dir(request(tmp_path / "data", source=source))
  lines = [x for x in caplog.messages if x.startswith("Checked ")]
  assert re.fullmatch(r"Checked 21 of 60, \d+ s left; \d+/s\.", lines[0])
  assert lines[-1].startswith("Checked 60 of 60, 0 s left; ")


def test_rejects_are_listed_up_to_the_allowed_share(tmp_path, snapshot):
  source = snapshot(num_bad=3)
  wanted = request(tmp_path / "data", source=source, max_reject_fraction=0.05)
  manifest = build.build_data_dir(wanted)
  assert manifest["rejects"] == {"empty_question": 3}
  assert sum(manifest["counts"].values()) == 57
  lines = (tmp_path / "data/rejects.jsonl").read_text().splitlines()
  assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize("num_bad, share", [(4, 0.05), (60, 0.99)])
def test_too_many_rejects_stop_it(tmp_path, snapshot, num_bad, share):
  wanted = request(
    tmp_path / "data",
    source=snapshot(num_bad=num_bad),
    max_reject_fraction=share,
  )
  with pytest.raises(
    validation.SettingError, match=f"{num_bad} empty_question"
  ):
    build.build_data_dir(wanted)
  assert not (tmp_path / "data").exists()


def test_a_changed_snapshot_is_named_and_read_again_if_asked(
  tmp_path, snapshot
):
  wanted = request(
    tmp_path / "data", source=snapshot(), max_reject_fraction=0.5
  )
  before = build.build_data_dir(wanted)
  path = pathlib.Path(snapshot(num_bad=1)) / SHARD
  with pytest.raises(validation.SettingError, match=f"{SHARD} .* has changed"):
    build.build_data_dir(wanted)
  after = build.build_data_dir(wanted, overwrite=True)
  assert after["fingerprint"] != before["fingerprint"]
  # Neither another time nor another place is another content.
  os.utime(path, (1, 1))
  moved = path.parent.rename(tmp_path / "moved")
  assert (
    build.build_data_dir(
      request(tmp_path / "data", source=str(moved), max_reject_fraction=0.5)
    )
    == after
  )


@pytest.mark.parametrize("fraction, split", [(0.0, "train"), (1.0, "eval")])
def test_all_problems_may_go_to_one_side(tmp_path, fraction, split):
  manifest = build.build_data_dir(
    request(tmp_path / "data", eval_fraction=fraction)
  )
  assert manifest["counts"] == {split: 60}


@pytest.mark.parametrize(
  "change, name",
  [
    ({"eval_fraction": 1.5}, "eval_fraction"),
    ({"eval_fraction": 0.001}, "eval_fraction"),
    ({"seed": -1}, "seed"),
    ({"data_dir": ""}, "data_dir"),
    ({"data_dir": "/proc/none/data"}, "data_dir"),
    ({"max_reject_fraction": 1.0}, "max_reject_fraction"),
    ({"vocab_size": 100}, "vocab_size"),
    ({"source": "/nowhere"}, "source"),
  ],
)
def test_a_wrong_setting_is_named_with_its_rule(tmp_path, change, name):
  with pytest.raises(validation.SettingError, match=rf"^{name} \(.*\) must "):
    build.build_data_dir(request(tmp_path / "data", **change))
  assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def divided(fixtures, tmp_path_factory):
  """The MathVista-like snapshot as a data dir, and its manifest."""
  folder = tmp_path_factory.mktemp("divided") / "data"
  source = str(fixtures / "mathvista_schema")
  return folder, build.build_data_dir(request(folder, source=source))


def test_the_snapshot_is_divided_without_leaks_or_rejects(divided):
  folder, manifest = divided
  counts = manifest["counts"]
  assert manifest["rejects"] == {} and manifest["terms"] == ""
  assert counts["train"] + counts["eval"] == 323 and not manifest["withheld"]
  assert counts["test"] == 60
  assert 0.2 < counts["eval"] / 323 < 0.4
  sides = collections.defaultdict(set)
  for split in counts:
    for problem in stored.source(folder, split):
      assert problem.is_checkable == (split != "test")
      sides[images.pixel_hash(images.decode(problem.images[0]))].add(split)
  assert all(len(splits) == 1 for splits in sides.values())
  assert 304 + 60 <= len(sides) <= 305 + 60


def test_a_prepared_folder_is_a_source_that_gives_itself(divided, tmp_path):
  """The withheld records are gone, so none is withheld again."""
  folder, manifest = divided
  again = build.build_data_dir(request(tmp_path / "data", source=str(folder)))
  for name in ("counts", "terms", "fingerprint", "tokenizer"):
    assert again[name] == manifest[name]
  assert again["rejects"] == {} and again["withheld"] == {}
  for split in manifest["counts"]:
    assert list(stored.source(tmp_path / "data", split)) == list(
      stored.source(folder, split)
    )


def test_a_drawn_folder_is_a_source_that_gives_itself(tmp_path):
  drawn = build.build_data_dir(request(tmp_path / "a"))
  again = build.build_data_dir(
    request(tmp_path / "b", source=str(tmp_path / "a"))
  )
  assert again["fingerprint"] == drawn["fingerprint"]


def test_mathvistas_own_records_put_all_records_under_its_terms(tmp_path):
  folder = tmp_path / "snapshot"
  folder.mkdir()
  for source, terms in (("Geometry3K", "mathvista"), ("mine", "")):
    table = list(rows(0))
    for row in table[:4]:  # Of 60.
      row["metadata"] |= {"source": source, "split": "test"}
    path = folder / "testmini-00000-of-00001-0.parquet"
    pq.write_table(pa.Table.from_pylist(table), path)
    wanted = request(tmp_path / source, source=str(folder))
    assert build.build_data_dir(wanted)["terms"] == terms


def write_rows(folder, rows, name="data.jsonl"):
  folder.mkdir(parents=True, exist_ok=True)
  lines = (json.dumps(row) for row in rows)
  (folder / name).write_text("\n".join(lines))
  return str(folder)


def questions(count, start=0):
  return [
    {"question": f"What is {i} + {i}?", "answer": str(2 * i)}
    for i in range(start, start + count)
  ]


def draw_layouts(folder, *names, count):
  rows = []
  for name in names:
    for i in range(count):
      folder.mkdir(parents=True, exist_ok=True)
      layouts.LAYOUTS[name](i).save(folder / f"{name}{i}.png")
      image = f"{name}{i}.png"
      rows.append({"question": f"{i}?", "answer": "1", "image": image})
  return write_rows(folder, rows)


@pytest.mark.parametrize(
  "count", [12, pytest.param(200, marks=pytest.mark.nightly)]
)
def test_tables_and_plots_of_one_layout_are_all_kept(tmp_path, count):
  source = draw_layouts(tmp_path / "source", "table", "plot", count=count)
  for near in ("exact", "perceptual"):
    wanted = request(tmp_path / near, source=source, near_duplicates=near)
    manifest = build.build_data_dir(wanted)
    assert manifest["withheld"] == {}
    assert sum(manifest["counts"].values()) == 2 * count


def test_what_an_excluded_data_dir_holds_never_trains(tmp_path):
  """Four tables, of which two are there as smaller JPEGs, and a question."""
  source = draw_layouts(tmp_path / "source", "table", count=4)
  both = [{"question": "WHAT is 1 + 1?", "answer": "2"}]
  lines = (tmp_path / "source/data.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  write_rows(tmp_path / "source", rows + both)
  (tmp_path / "held").mkdir()
  for i in range(2):
    small = layouts.table(i).reduce(2)
    small.save(tmp_path / "held" / f"{i}.jpg", quality=70)
  images_of = [
    {"question": f"e{i}?", "answer": "1", "image": f"{i}.jpg"} for i in range(2)
  ]
  held = write_rows(tmp_path / "held", images_of + questions(1, start=1))
  build.build_data_dir(request(tmp_path / "e", source=held, eval_fraction=1.0))
  changes = {"source": source, "eval_fraction": 0.0}
  wanted = request(tmp_path / "d", exclude=(str(tmp_path / "e"),), **changes)
  manifest = build.build_data_dir(wanted)
  assert manifest["counts"] == {"train": 2}
  assert {k: len(v) for k, v in manifest["withheld"].items()} == {
    "excluded_same_question": 1,
    "excluded_similar_image": 2,
  }
  with pytest.raises(validation.SettingError, match="exclude was"):
    build.build_data_dir(request(tmp_path / "d", **changes))
  with pytest.raises(validation.SettingError, match=r"^exclude \(.*\) must "):
    request_of_none = request(tmp_path / "x", exclude=(held,), **changes)
    build.build_data_dir(request_of_none)


def test_the_splits_of_a_source_are_kept(tmp_path):
  folder = tmp_path / "source"
  write_rows(folder, questions(8), "train.jsonl")
  write_rows(folder, questions(6, start=5), "test.jsonl")
  manifest = build.build_data_dir(request(tmp_path / "a", source=str(folder)))
  assert manifest["counts"] == {"train": 5, "eval": 6}
  assert len(manifest["withheld"]["same_question"]) == 3
  paths = {"train": str(folder / "test.jsonl"), "test": str(folder)}
  wanted = request(tmp_path / "b", source=paths, near_duplicates="none")
  manifest = build.build_data_dir(wanted)
  assert manifest["counts"]["test"] == 6
  assert manifest["counts"]["train"] + manifest["counts"]["eval"] == 6


def test_an_error_names_the_true_reason_and_a_remedy_that_works(tmp_path):
  same = [{**row, "question": "One?"} for row in questions(9)]
  source = write_rows(tmp_path / "same", same)
  with pytest.raises(validation.SettingError, match="have the same question"):
    build.build_data_dir(request(tmp_path / "a", source=source))
  source = write_rows(tmp_path / "few", questions(4))
  for fraction in (0.0001, 0.9999):
    changes = {"source": source, "eval_fraction": fraction}
    with pytest.raises(validation.SettingError) as caught:
      build.build_data_dir(request(tmp_path / "b", **changes))
    remedy = re.search(r"--eval_fraction=([\d.]+),", str(caught.value))[1]
    changes["eval_fraction"] = float(remedy)
    manifest = build.build_data_dir(request(tmp_path / "b", **changes))
    assert set(manifest["counts"]) == {"train", "eval"}
    shutil.rmtree(tmp_path / "b")
  folder = tmp_path / "twice"
  for name in ("train.jsonl", "test.jsonl"):
    write_rows(folder, questions(4), name)
  with pytest.raises(
    validation.SettingError, match=r"^near_duplicates .* all are withheld"
  ):
    build.build_data_dir(request(tmp_path / "c", source=str(folder)))


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
  source = write_rows(tmp_path / "source", questions(230))
  for workers in (0, 2):
    wanted = request(tmp_path / f"{workers}", source=source)
    build.build_data_dir(wanted, num_workers=workers)
  assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_a_changed_label_or_image_is_seen(tmp_path):
  source = draw_layouts(tmp_path / "source", "table", count=6)
  wanted = request(tmp_path / "d", source=source)
  build.build_data_dir(wanted)
  path = tmp_path / "source/data.jsonl"
  text = path.read_text()
  path.write_text(text.replace('"answer": "1"', '"answer": "7"', 1))
  with pytest.raises(
    validation.SettingError, match="data.jsonl .* has changed"
  ):
    build.build_data_dir(wanted)
  path.write_text(text)
  layouts.table(99).save(tmp_path / "source/table3.png")
  with pytest.raises(
    validation.SettingError, match="table3.png .* has changed"
  ):
    build.build_data_dir(wanted)
