"""Groups from results files: verified labels, similar lengths first."""

import collections
import gzip
import json

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.preferences import completions, label_results
from data_pipelines.validation import SettingError
from data_pipelines.verifier import verify
from tests.data_pipelines.sources import taken


def record(pid="1", response="<answer>12</answer>", **changes):
  """A record as in an official results file."""
  fields = dict(
    pid=pid,
    question="How many?",
    image=f"images/{pid}.jpg",
    choices=None,
    unit=None,
    precision=None,
    answer="12",
    question_type="free_form",
    answer_type="integer",
    query="Question: How many?",
    metadata={"source": "FigureQA"},
    response=response,
  )
  return fields | changes


def write(path, *rows):
  path.write_text(json.dumps({row["pid"]: row for row in rows}))
  return path


def groups(path):
  lines = path.read_text(encoding="utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  return {
    row["pid"]: [(x["text"], x["label"]) for x in row["completions"]]
    for row in rows
  }


def paired(tmp_path, *responses, **changes):
  """The counts and groups of one problem with one file per response."""
  files = [
    write(tmp_path / f"{i}.json", record(response=response, **changes))
    for i, response in enumerate(responses)
  ]
  counts = label_results.label_results(files, tmp_path / "out.jsonl")
  return counts, groups(tmp_path / "out.jsonl")


@pytest.fixture(scope="module")
def results(fixtures, tmp_path_factory):
  """The responses of eight runs, one results file per run."""
  path = fixtures / "mathvista_responses" / "responses.jsonl.gz"
  runs = collections.defaultdict(dict)
  with gzip.open(path, "rt", encoding="utf-8") as file:
    for row in map(json.loads, file):
      runs[row["model"]][row["pid"]] = row
  folder = tmp_path_factory.mktemp("results")
  files = []
  for model, rows in sorted(runs.items()):
    files.append(folder / f"output_{model}.json")
    files[-1].write_text(json.dumps(rows))
  return files, runs


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
  """The file of labelled completions of all runs, and its counts."""
  out = tmp_path_factory.mktemp("written") / "pairs.jsonl"
  return out, label_results.label_results(results[0], out)


def test_real_responses_become_groups_that_the_verifier_agrees_with(
  results, written
):
  (_, runs), (out, counts) = results, written
  found = groups(out)
  assert counts["groups"] == len(found) > 600
  assert counts["completions"] == sum(map(len, found.values()))
  rows = list(runs.values())
  assert len(rows[0]) == (
    len(found)
    + counts["without_right"]
    + counts["without_wrong"]
    + counts["without_answer"]
  )
  differences = []
  for pid, group in found.items():
    row = rows[0][pid] | {"decoded_image": {"bytes": b"-"}, "query": "-"}
    problem = records.from_result(row)
    texts = {run[pid]["response"] for run in rows}
    assert {text for text, _ in group} <= texts
    assert len(group) == len({text for text, _ in group})
    for text, label in group:
      assert verify.verify(text, problem).correct == (label == 1.0)
    assert [label for _, label in group[:2]] == [1.0, 0.0]
    differences.append(len(group[0][0]) - len(group[1][0]))
  # In characters: the first right and the first wrong response differ by 16 on
  # average and by 43 in size; over all responses, by 36 and 184.
  assert abs(np.mean(differences)) < 20
  assert np.mean(np.abs(differences)) < 60


def test_training_reads_the_written_file(results, written):
  out, _ = written
  source = completions.from_file(out, 2)
  rng = np.random.default_rng(0)
  rows = next(iter(results[1].values()))
  for pid in groups(out):
    row = rows[pid] | {"decoded_image": {"bytes": b"-"}, "query": "-"}
    better, worse = source(records.from_result(row), rng)
    assert (better.label, worse.label) == (1.0, 0.0)


def test_pairs_closest_in_length_come_first(tmp_path):
  answers = ["12", "12" + " " * 50, "7", "8" + " " * 48, "9" + " " * 20]
  counts, found = paired(tmp_path, *(f"<answer>{x}</answer>" for x in answers))
  assert [label for _, label in found["1"]] == [1.0, 0.0, 1.0, 0.0, 0.0]
  texts = [text[8:-9].strip() for text, _ in found["1"]]
  assert texts == ["12", "7", "12", "8", "9"]
  assert counts["groups"] == 1 and counts["completions"] == 5


def test_a_problem_without_both_labels_is_left_out_and_counted(tmp_path):
  first = write(
    tmp_path / "a.json",
    record("1"),
    record("2"),
    record("3", "7"),
    record("4", answer=""),
    record("5", "12"),
  )
  second = write(
    tmp_path / "b.json",
    record("1", "7"),
    record("2", "12"),
    record("3", "8"),
    record("4", "7", answer=""),
    record("5", None),
    record("6", " "),
  )
  out = tmp_path / "out.jsonl"
  counts = label_results.label_results([first, second], out)
  assert list(groups(out)) == ["1"]
  assert counts == {
    "groups": 1,
    "completions": 2,
    "without_right": 2,  # 3, and 6 which has none at all.
    "without_wrong": 2,
    "without_answer": 1,
    "not_in_data_dir": 0,
    "empty": 2,
    "repeated": 0,
    "unusable": 0,
  }


def test_a_record_that_cannot_be_used_costs_itself_alone(tmp_path):
  bad = [
    record("2", response=7),
    record("3", response="12 \ud800"),
    record("4", precision=10**400),
    record("5", metadata={"skills": 3}),
    record("6", answer=12),
  ]
  files = [
    write(tmp_path / f"{i}.json", record("1", text), *bad)
    for i, text in enumerate(["12", "7"])
  ]
  out = tmp_path / "out.jsonl"
  counts = label_results.label_results(files, out)
  assert groups(out) == {"1": [("12", 1.0), ("7", 0.0)]}
  assert counts["groups"] == 1 and counts["unusable"] == 2 * len(bad)


def test_a_response_that_two_files_share_counts_once(tmp_path):
  counts, found = paired(tmp_path, "12", "7", "7", "12")
  assert found["1"] == [("12", 1.0), ("7", 0.0)]
  assert counts["repeated"] == 2


def test_options_are_verified_as_options(tmp_path):
  _, found = paired(
    tmp_path,
    "The answer is (B).",
    "The answer is (A).",
    choices=["red", "blue"],
    answer="blue",
    question_type="multi_choice",
    answer_type="text",
  )
  assert dict(found["1"]) == {
    "The answer is (B).": 1.0,
    "The answer is (A).": 0.0,
  }


def test_lists_and_lines_of_records_are_read_too(tmp_path):
  rows = [record("1"), record("2")]
  lines = tmp_path / "a.jsonl"
  lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
  table = tmp_path / "b.json"
  table.write_text(json.dumps([record("1", "7"), record(2, "8")]))
  single = tmp_path / "c.jsonl"
  single.write_text(json.dumps(record("2", "9")))
  out = tmp_path / "out.jsonl"
  assert label_results.label_results([lines, table, single], out)["groups"] == 2
  assert len(groups(out)["2"]) == 3


def test_the_problems_of_a_data_dir_take_precedence(tmp_path):
  """The data dir's answer is used, and a pid that it lacks is left out."""
  row = record("1", answer="7") | {"decoded_image": {"bytes": b"-"}}
  problem = records.from_result(row)
  data_dir = tmp_path / "data"
  taken.write({"train": [problem]}, data_dir)
  files = [
    write(tmp_path / f"{i}.json", record("1", text), record("2", text))
    for i, text in enumerate(["12", "7"])
  ]
  out = tmp_path / "out.jsonl"
  counts = label_results.label_results(files, out, data_dir=data_dir)
  assert groups(out) == {"1": [("7", 1.0), ("12", 0.0)]}
  assert counts["not_in_data_dir"] == 1


@pytest.mark.parametrize(
  ("text", "rule"),
  [
    (None, "must be a text file"),
    ("{", "must be JSON"),
    ("3", "one JSON object"),
    ("[3]", "record 1 does not: 3"),
    ('{"1": 3}', "one JSON object"),
    (json.dumps([record()] * 2), "hold each pid once.*'1'"),
    (json.dumps([{"response": "7"}]), "a pid in each record.*response"),
    (
      json.dumps([record(response=7)]),
      "unusable': 1.*pid '1' .*response holds a int",
    ),
    (json.dumps([record(answer=12)]), "unusable': 1.*answer holds a int"),
    (json.dumps([record()]), "a right and a wrong response"),
  ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, rule):
  path = tmp_path / "output_a.json"
  if text is not None:
    path.write_text(text)
  with pytest.raises(SettingError, match=f"results .*output_a.*{rule}"):
    label_results.label_results([path], tmp_path / "out.jsonl")
  assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_that_is_no_data_dir_is_refused(tmp_path):
  path = write(tmp_path / "a.json", record())
  with pytest.raises(SettingError, match="^data dir .*prepare"):
    label_results.label_results(
      [path], tmp_path / "out.jsonl", data_dir=tmp_path
    )
