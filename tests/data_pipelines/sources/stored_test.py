import dataclasses
import pathlib
import pickle
import subprocess
import sys

import pytest

from data_pipelines import records, validation
from data_pipelines.sources import stored
from data_pipelines.sources.rows import mathvista
from tests.data_pipelines.sources import taken

ROOT = pathlib.Path(__file__).resolve().parents[3]
PROBLEM = records.Problem(
  pid="1",
  question="图中有几个圆?",
  image_path="images/1.jpg",
  images=(b"\x89PNG\0\xff not really",),
  choices=(),
  unit="g",
  precision=-1,
  tolerance=0.05,
  answer="[1, 2]",
  question_type="free_form",
  answer_type="list",
  query="Hint: ...\nQuestion: 图中有几个圆? (Unit: g)",
  solution="1, 2.",
  metadata={"source": "GeoQA+", "skills": ["a", "b"], "img_width": 3},
)
CHOICE = dataclasses.replace(
  PROBLEM, pid="2", choices=("√3", "", "√3"), answer="√3", precision=2
)


def numbered(count):
  return [dataclasses.replace(PROBLEM, pid=str(i)) for i in range(count)]


def test_what_is_written_is_read_whatever_its_fields_hold(tmp_path):
  taken.write({"train": [PROBLEM, CHOICE], "eval": [CHOICE]}, tmp_path)
  train = stored.source(tmp_path, "train")
  assert len(train) == 2
  assert sorted(train, key=lambda p: p.pid) == [PROBLEM, CHOICE]
  assert list(stored.source(tmp_path, "eval")) == [CHOICE]


def test_writing_keeps_nothing_but_the_data_set(tmp_path, capfd):
  taken.write({"train": [PROBLEM]}, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["problems"]
  assert capfd.readouterr().out == ""


def test_the_same_problems_give_the_same_files(tmp_path):
  def files(name):
    taken.write({"train": numbered(20)}, tmp_path / name)
    return {
      path.name: path.read_bytes()
      for path in (tmp_path / name).rglob("*")
      if path.is_file()
    }

  assert files("a") == files("b")


def test_a_source_goes_to_a_worker_as_its_paths(tmp_path):
  taken.write({"train": numbered(5)}, tmp_path)
  source = stored.source(tmp_path, "train")
  assert source[4]  # An open reader must not be in the way.
  sent = pickle.dumps(source)
  assert len(sent) < 1000
  assert list(pickle.loads(sent)) == list(source)


def test_an_index_outside_is_refused(tmp_path):
  taken.write({"train": numbered(3)}, tmp_path)
  source = stored.source(tmp_path, "train")
  for index in (-1, 3):
    with pytest.raises(IndexError):
      source[index]


def test_a_source_names_what_is_missing(tmp_path):
  with pytest.raises(ValueError, match="data_pipelines.prepare"):
    stored.source(tmp_path, "train")
  taken.write({"train": numbered(3)}, tmp_path)
  with pytest.raises(ValueError, match=r"split \('eval'\).*\['train'\]"):
    stored.source(tmp_path, "eval")
  [file] = tmp_path.rglob("*.array_record-*")
  file.rename(file.with_name(file.name.replace("of-00001", "of-00002")))
  with pytest.raises(ValueError, match="some are missing"):
    stored.source(tmp_path, "train")


READ = """
import sys
from data_pipelines.sources import stored
from data_pipelines.sources.rows import mathvista
[problem] = stored.source(sys.argv[1], "train")
assert problem.pid == "1"
assert "tensorflow" not in sys.modules
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(sys.argv[1] + "/problems/1.0.0")
[example] = builder.as_data_source("train")
assert [bytes(x) for x in example["images"]] == list(problem.images)
"""


def test_reading_takes_no_tensorflow_and_tfds_reads_it_too(tmp_path):
  taken.write({"train": [PROBLEM]}, tmp_path)
  command = [sys.executable, "-c", READ, str(tmp_path)]
  subprocess.run(command, cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
  "metadata, is_original",
  [
    ({"source": "GeoQA+", "split": "testmini"}, True),
    ({"source": "GeoQA+", "split": "test"}, True),
    ({"source": "GeoQA+"}, False),
    ({"source": "GeoQA+", "split": "train"}, False),
    ({"source": "mine", "split": "testmini"}, False),
    ({}, False),
  ],
)
def test_what_is_mathvistas_own_is_known(metadata, is_original):
  assert len(mathvista.SOURCES) == 31
  assert mathvista.is_original(metadata) == is_original


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.write_bytes(b"abc"),
    lambda path: (path.unlink(), path.mkdir()),
  ],
)
def test_a_damaged_split_is_named(tmp_path, damage):
  taken.write({"train": [PROBLEM]}, tmp_path)
  (path,) = tmp_path.rglob("*.array_record-*")
  damage(path)
  with pytest.raises(validation.SettingError, match="'train'.* whole files"):
    stored.source(tmp_path, "train")


def test_a_failure_to_write_shows_no_picture(tmp_path):
  """All that `validate` lets through can be written; others are a bug."""
  picture = b"\x89PNG" * 10**6
  problem = records.Problem(
    pid="1",
    question="\ud800",
    answer="1",
    question_type="free_form",
    answer_type="integer",
    images=(picture,),
  )
  with pytest.raises(UnicodeEncodeError) as caught:
    taken.write({"train": [problem]}, tmp_path)
  assert len(str(caught.value)) < 300 and "PNG" not in str(caught.value)


def test_one_original_in_twenty_puts_all_under_its_terms():
  assert mathvista.terms(2, 40) == mathvista.terms(0, 5) == ""
  assert mathvista.terms(3, 59) == mathvista.terms(1, 1) == "mathvista"
