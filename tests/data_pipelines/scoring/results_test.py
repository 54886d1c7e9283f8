"""Results files: the layouts, and the errors."""

import json

import pytest

from data_pipelines.scoring import results
from data_pipelines.validation import SettingError


def record(pid="1", **changes):
  return {
    "pid": pid,
    "question": "How many?",
    "question_type": "free_form",
    "answer_type": "integer",
    "answer": "5",
    "choices": None,
    "precision": None,
    "metadata": {"skills": ["counting"]},
    "response": "5",
  } | changes


def written(folder, text, name="output.json"):
  path = folder / name
  path.write_text(text, encoding="utf-8")
  return path


def refusal(path):
  with pytest.raises(SettingError) as caught:
    results.read(path)
  message = str(caught.value)
  assert message.startswith(f"results file ('{path}') must ")
  assert message.endswith(".")
  return message


ROWS = [record("2"), record("1", response="6"), record("10", answer="")]


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("a.json", json.dumps({row["pid"]: row for row in ROWS})),
    ("a.json", json.dumps(ROWS)),
    ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
    ("a.jsonl", "\ufeff\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n"),
    # Some programs write the key only, or a number.
    (
      "a.json",
      json.dumps(
        {
          row["pid"]: {k: v for k, v in row.items() if k != "pid"}
          for row in ROWS
        }
      ),
    ),
    (
      "a.jsonl",
      "\n".join(json.dumps(r | {"pid": int(r["pid"])}) for r in ROWS),
    ),
  ],
  ids=["JSON", "list", "JSONL", "blank lines", "keys alone", "numbers"],
)
def test_each_layout_gives_the_same_problems_in_the_order_of_the_file(
  tmp_path, name, text
):
  read = results.read(written(tmp_path, text, name))
  assert [x.problem.pid for x in read] == ["2", "1", "10"]
  assert [x.response for x in read] == ["5", "6", "5"]
  assert [x.counts for x in read] == [True, True, False]
  assert [x.problem.metadata for x in read] == [ROWS[0]["metadata"]] * 3


def test_records_are_kept_unchanged(tmp_path):
  row = record(extra={"a": [1, None]}, response="\u2028 \ud800 \u7b54")
  path = written(tmp_path, json.dumps(row), "a.jsonl")
  assert results.read(path)[0].record == row
  raw = json.dumps(record(response="\u2028 \u7b54"), ensure_ascii=False)
  path = written(tmp_path, raw, "a.jsonl")
  assert results.read(path)[0].response == "\u2028 \u7b54"


def test_nan_and_infinity_are_read_as_none(tmp_path):
  """pandas writes a missing precision as NaN."""
  row = record(precision=float("nan"), response=float("inf"))
  (read,) = results.read(written(tmp_path, json.dumps({"1": row})))
  assert read.record["precision"] is None and read.problem.precision == -1
  assert read.response is None


@pytest.mark.parametrize("missing", [{"response": None}, {}])
def test_a_record_without_a_response_is_read(tmp_path, missing):
  row = record()
  del row["response"]
  text = json.dumps({"1": row | missing | {"error": "timeout"}})
  (read,) = results.read(written(tmp_path, text))
  assert read.response is None and read.counts


def test_an_unreadable_record_counts(tmp_path):
  row = record("unreadable:7", answer="", question="", metadata={})
  (read,) = results.read(written(tmp_path, json.dumps({row["pid"]: row})))
  assert read.counts and not read.problem.is_checkable


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("a.json", "", "be JSON, but"),
    ("a.json", "{", "be JSON, but"),
    ("a.json", "[" * 100_000, "be JSON, but"),
    ("a.json", "{}", "is empty"),
    ("a.jsonl", "\n \n", "is empty"),
    ("a.json", "[]", "is empty"),
    ("a.json", "[5]", "record 1 does not: 5"),
    ("a.json", "5", "one JSON object"),
    (
      "a.json",
      json.dumps([record("1"), record("1")]),
      "'1' is in records 1 and 2",
    ),
    ("a.json", json.dumps(record()), "suffix .jsonl"),
    ("a.json", "\n".join(map(json.dumps, ROWS)), "be JSON, but Extra data"),
    ("a.json", '{"1": {}, "1": {}}', "key '1' occurs twice"),
    ("a.json", '{"1": {"pid": "2"}}', "'1' has pid '2'"),
    ("a.jsonl", f"{json.dumps(record())}\n{{", "be JSONL in line 2, but"),
    ("a.jsonl", f"{json.dumps(record())}\n5", "line 2 does not: 5"),
    ("a.jsonl", '{"pid": ""}', "line 1 does not"),
    ("a.jsonl", '{"pid": true}', "line 1 does not"),
    ("a.jsonl", "[" * 900 + "]" * 900, "line 1 does not: [[[[[["),
    ("a.json", f'{{"{"a" * 10**6}": {{"pid": "2"}}}}', "aaa... has pid '2'"),
    (
      "a.jsonl",
      "\n".join(json.dumps(record(pid)) for pid in ("1", "2", "1")),
      "'1' is in lines 1 and 3",
    ),
  ],
)
def test_a_file_of_another_layout_is_refused(tmp_path, name, text, message):
  said = refusal(written(tmp_path, text, name))
  assert message in said and len(said) < 1000


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
  assert "No such file" in refusal(tmp_path / "none.json")
  for path in (tmp_path, "/dev/zero"):
    assert "regular file" in refusal(path)
  (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
  assert "decode" in refusal(tmp_path / "a.json")


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"question_type": None}, "unknown_question_type"),
    ({"answer_type": "number"}, "unknown_answer_type"),
    ({"answer_type": "float"}, "bad_precision"),
    ({"answer": 5}, "not_text"),
    ({"response": 5}, "not_text"),
    ({"metadata": "none"}, "bad_metadata"),
    ({"metadata": {"skills": 5}}, "bad_metadata"),
    ({"metadata": {"task": ["a"]}}, "bad_metadata"),
    ({"precision": 10**400}, "bad_precision"),
    ({"more": json.loads("[" * 200 + "]" * 200)}, "nested"),
    (
      {"question_type": "multi_choice", "answer_type": "text"},
      "bad_choices",
    ),
    (
      {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["red", "blue"],
      },
      "answer_not_in_choices",
    ),
  ],
)
def test_invalid_records_are_counted_and_the_first_is_named(
  tmp_path, changes, reason
):
  rows = [record("1"), record("2", **changes), record("3", **changes)]
  path = written(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl")
  message = refusal(path)
  assert f"2 of 3 do not match (2 {reason}; the first: pid '2', " in message
