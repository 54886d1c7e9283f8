"""The data dirs of a run: opened together, known by contents and share."""

import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines.sources import data_dirs
from tests.data_pipelines import dataset_test
from tests.data_pipelines.dataset_test import (
  edit_manifest,
  opened,
  settings,
  train_batches,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two drawn sets, "a" of 40 problems and "b" of 20."""
  folder = tmp_path_factory.mktemp("sets")
  for name, count in (("a", 40), ("b", 20)):
    config = settings(synthetic=dict(seed=count, num_problems=count))
    opened(config, folder / name)
    shutil.move(folder / name / "data", folder / "moved")
    shutil.rmtree(folder / name)
    shutil.move(folder / "moved", folder / name)
  return folder


@pytest.fixture
def copied(folder, tmp_path):
  """A copy of the sets to do harm to."""
  shutil.copytree(folder, tmp_path / "copied")
  return tmp_path / "copied"


def mixture(folder, *weights, **data):
  names = ("a", "b")[: len(weights)]
  dirs = [(str(folder / x), w) for x, w in zip(names, weights, strict=True)]
  return settings(dirs=tuple(dirs), **data)


def pids(config, steps=5):
  batches = train_batches(opened(config), config)
  return [x.pid for _ in range(steps) for x in next(batches).problems]


def test_prompts_come_from_each_set_by_its_weight(folder):
  asked = pids(mixture(folder, 0.7, 0.3))
  assert sum(pid.startswith("a/") for pid in asked) == 28
  assert sum(pid.startswith("b/") for pid in asked) == 12


def test_one_dir_in_dirs_is_that_dir(folder):
  one, alone = mixture(folder, 3.0), settings(dir=str(folder / "a"))
  assert opened(one).identity == opened(alone).identity
  assert pids(one) == pids(alone)


def test_a_run_is_known_by_records_and_shares_wherever_they_lie(folder, copied):
  identity = opened(mixture(folder, 0.7, 0.3)).identity
  assert opened(mixture(copied, 7.0, 3.0)).identity == identity
  other = opened(mixture(folder, 0.6, 0.4)).identity
  changed = {k for k in identity if identity[k] != other[k]}
  assert changed == {
    "data.dirs: records and share of set 1",
    "data.dirs: records and share of set 2",
  }
  name = "data.dirs: records and share of set 1"
  assert identity[name].partition(",")[2] == " 7 of 10"
  assert other[name].partition(",")[2] == " 3 of 5"
  edit_manifest(copied / "b", fingerprint="other")
  changed = opened(mixture(copied, 0.7, 0.3)).identity
  assert {k for k in identity if identity[k] != changed[k]} == {
    "data.dirs: records and share of set 2"
  }


def test_evaluation_takes_equally_from_each_set(folder):
  config = mixture(folder, 0.9, 0.1)
  data = opened(config, for_training=False)
  found = dataset_test.eval_batches(data, config)
  asked = [x.pid for batch in found for x in batch.problems if x.pid]
  assert [pid[0] for pid in asked] == [*"aaabb"]
  sets = {
    name: np.concatenate([batch.sets[name] for batch in found])
    for name in ("a", "b")
  }
  # The padding rows at the end are in no set.
  assert sets["a"].tolist() == [True] * 3 + [False] * 5
  assert sets["b"].tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_a_set_without_the_eval_split_is_trained_on_alone(copied, caplog):
  edit_manifest(copied / "b", counts={"train": 1})
  config = mixture(copied, 0.5, 0.5)
  data = opened(config)
  assert set(data.eval.sets) == {"a"} and set(data.train.sets) == {"a", "b"}
  assert f"{copied / 'b'} has no split eval: it is not evaluated" in caplog.text
  edit_manifest(copied / "a", counts={"train": 1})
  with pytest.raises(ValueError, match=r"^data.eval_split \('eval'\) must be"):
    opened(config)
  edit_manifest(copied / "b", counts={"eval": 1})
  with pytest.raises(
    ValueError, match=rf"^data.train_split \('train'\).* dir {copied / 'b'}, ev"
  ):
    opened(config)


def test_terms_are_those_of_any_set(copied):
  edit_manifest(copied / "b", terms="mathvista")
  with pytest.raises(
    ValueError, match=rf"^data.accept.*, which is in {copied / 'b'}, and whose"
  ):
    opened(mixture(copied, 0.5, 0.5))


@pytest.mark.parametrize(
  ("dirs", "fault"),
  [
    (
      [("a", 1.0), ("a/../a", 2.0)],
      "must name each folder once; set data.dirs=",
    ),
    ([("a", 0.0)], "must have finite weights above 0; set data.dirs="),
    ([("a", float("nan"))], "must have finite weights above 0"),
    ([("a", float("inf"))], "must have finite weights above 0"),
    ([("", 1.0)], "must name each folder once"),
    (["a", "b"], r"must be of type a tuple.*like \(\(\"/data/geo\", 0.7\), \("),
    ([("a", "b")], r"must be of type float.*like \(\(\"/data/geo\", 0.7\), \("),
    ([("a", 1.0, 2.0)], "must be of type a tuple of str and float"),
  ],
)
def test_dirs_that_break_a_rule_are_refused(dirs, fault):
  with pytest.raises(ValueError, match=rf"^data.dirs \(.*\) {fault}"):
    settings(dirs=tuple(dirs))


def test_a_dir_beside_dirs_is_refused():
  with pytest.raises(ValueError, match=r"^data.dir \('a'\) must be empty besi"):
    settings(dir="a", dirs=(("b", 1.0),))


def test_a_folder_that_is_not_there_is_named(folder):
  config = settings(dirs=((str(folder / "a"), 1.0), ("/no/such", 1.0)))
  with pytest.raises(ValueError, match=r"^data.dirs \('/no/such'\) must be a"):
    opened(config)


def test_the_home_is_expanded_in_every_dir(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  config = settings(dirs=(("~/a", 1.0), ("~/b", 2)))
  assert config.data.dirs == (("/home/me/a", 1.0), ("/home/me/b", 2.0))


@pytest.mark.parametrize(
  ("origins", "wanted"),
  [
    (
      {"testmini": {"eval": 51, "train": 272}},
      "51 of 323 problems of testmini",
    ),
    (
      {"": {"eval": 1, "train": 9, "test": 5}},
      "1 of 10 problems of the source",
    ),
    ({"testmini": {"eval": 323}, "test": {"test": 60}}, ""),
    ({"train": {"train": 9}, "validation": {"eval": 3}}, ""),
    ({"synthetic": {"eval": 1, "train": 9}}, ""),
    ({}, ""),
  ],
)
def test_a_split_that_is_a_part_of_its_source_is_named(origins, wanted):
  manifest = {"source_splits": origins} if origins else {}
  folder = data_dirs.DataDir("data.dir", "geo", pathlib.Path("d"), 1, manifest)
  found = data_dirs.parts([folder], "eval")
  assert len(found) == bool(wanted)
  assert wanted in "".join(found)
