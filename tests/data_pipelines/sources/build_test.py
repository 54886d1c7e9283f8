import collections
import dataclasses
import json
import os
import pathlib
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import images, validation
from data_pipelines.sources import build, stored, synthetic
from data_pipelines.text import tokenizer

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
  assert (tmp_path / ".data.building/tokenizer.model").exists()
  build.build_data_dir(request(tmp_path / "data", seed=1), overwrite=True)
  assert {path.name for path in tmp_path.iterdir()} == {"data", ".data.lock"}
  assert contents(tmp_path / "data") != whole


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
