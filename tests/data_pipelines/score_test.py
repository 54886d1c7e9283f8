"""The command that scores a results file, on real and hand-written files."""

import collections
import json
import math
import pathlib
import random
import signal
import subprocess
import sys

import pytest

from data_pipelines.scoring import score_file
from data_pipelines.validation import SettingError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", "data_pipelines.score", *map(str, args)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )


def write_lines(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


# Real responses of eight models in one file.


@pytest.fixture(scope="module")
def real(responses, tmp_path_factory):
  """The command's input, its output and the files that it writes."""
  folder = tmp_path_factory.mktemp("real")
  rows = []
  for number, row in enumerate(responses):
    row = row | {"pid": f"{row['model']}:{row['pid']}"}
    # Some have no stored extraction, like a model's raw output.
    if number % 2:
      row["extraction"] = row.pop("official_extraction")
    row["true_false"] = row.pop("official_true_false")
    rows.append(row)
  path = write_lines(folder / "output.jsonl", rows)
  out, scores = folder / "out.json", folder / "scores.json"
  done = command(path, f"--out={out}", f"--scores={scores}")
  assert done.returncode == 0, done.stderr
  assert sorted(x.name for x in folder.iterdir()) == [
    "out.json",
    "output.jsonl",
    "scores.json",
  ]
  return {
    "rows": rows,
    "printed": done.stdout,
    "out": json.loads(out.read_text()),
    "scores": json.loads(scores.read_text()),
  }


def test_strict_answers_agree_with_official_labels_on_the_core(real):
  core = [row for row in real["out"].values() if not row["flags"]]
  assert len(core) == 7483

  def share(rows):
    same = [x["strict_true_false"] == x["true_false"] for x in rows]
    return sum(same) / len(same)

  assert share(core) >= 0.975
  assert share(x for x in core if x["question_type"] == "free_form") >= 0.99
  wrong = [x["strict_true_false"] for x in core if not x["true_false"]]
  assert sum(wrong) / len(wrong) <= 0.01


def test_out_holds_every_record_with_two_more_fields(real):
  assert list(real["out"]) == [row["pid"] for row in real["rows"]]
  added = {"strict_answer", "strict_true_false"}
  for row in real["rows"]:
    out = dict(real["out"][row["pid"]])
    assert {name: type(out.pop(name)) for name in added}[
      "strict_true_false"
    ] is bool
    assert out == row


def test_the_table_agrees_with_out_and_the_labels(real):
  found = real["scores"]
  whole = found["rows"][0]
  assert (whole["dimension"], whole["name"]) == ("overall", "all")
  out = list(real["out"].values())
  assert whole["strict"]["right"] == sum(x["strict_true_false"] for x in out)
  assert whole["stored"]["right"] == sum(x["true_false"] for x in out)
  assert found["file"] == "output.jsonl"
  assert found["records"] == found["scored"] == 8000
  assert found["no_answer"] == found["no_response"] == 0
  # Two of them are null.
  stored = sum(x.get("extraction") is not None for x in out)
  assert found["stored_extractions"] == stored
  pairs = collections.Counter(
    (x["strict_true_false"], x["true_false"]) for x in out
  )
  assert found["agreement"] == {
    "labelled": 8000,
    "right": whole["stored"]["right"],
    "wrong": 8000 - whole["stored"]["right"],
    "missed_right": pairs[False, True],
    "missed_wrong": pairs[True, False],
  }
  for dimension in ("question_type", "answer_type"):
    rows = [x for x in found["rows"] if x["dimension"] == dimension]
    assert [x["name"] for x in rows] == sorted({x[dimension] for x in out})
    for way in ("strict", "official", "stored"):
      for key in ("problems", "right"):
        assert sum(x[way][key] for x in rows) == whole[way][key]


def test_intervals_are_wilsons(real):
  z = 1.959963984540054
  for row in real["scores"]["rows"]:
    for way in ("strict", "official", "stored"):
      n, p = row[way]["problems"], row[way]["share"]
      assert p == row[way]["right"] / n
      centre = (p + z * z / (2 * n)) / (1 + z * z / n)
      spread = p * (1 - p) / n + z * z / (4 * n * n)
      half = z * math.sqrt(spread) / (1 + z * z / n)
      assert row[way]["low"] == pytest.approx(centre - half, abs=1e-12)
      assert row[way]["high"] == pytest.approx(centre + half, abs=1e-12)


def test_guessing_testminis_options_gives_the_measured_share(real):
  chance = real["scores"]["rows"][0]["multi_choice"]
  assert chance["problems"] == 8 * 540
  assert chance["guess"] == pytest.approx(0.331, abs=5e-4)


def test_the_printed_table_is_that_of_the_written_figures(real):
  assert real["printed"] == score_file.format_scores(real["scores"]) + "\n"


# Hand-written records.


def record(pid, response, answer="5", **changes):
  return {
    "pid": pid,
    "question_type": "multi_choice" if "choices" in changes else "free_form",
    "answer_type": "text" if "choices" in changes else "integer",
    "answer": answer,
    "response": response,
  } | changes


COLOURS = ["red", "blue", "green", "grey"]
NEAREST = ["N/A?", "tan", "grey", "green"]
HAND = [
  record(
    "1",
    "The answer is 5.",
    metadata={"task": "a", "skills": ["x", "y", "x"], "source": "S"},
  ),
  record("2", "5.7", true_false="?", metadata={"task": "a", "skills": ["y"]}),
  # The empty response is closest to the shortest option.
  record("3", None, "tan", choices=NEAREST, metadata={"task": "b"}),
  record("4", "(B)", "blue", choices=COLOURS, metadata={"task": "b"}),
  record("5", "B", "No", choices=["Yes", "No"], true_false=False),
  record(
    "6", "Yes", "No", choices=["Yes", "No"], true_false=True, extraction=""
  ),
  record("7", "<answer>8</answer>", "", extraction="8"),
  record("unreadable:3", "", ""),
  record("9", "no idea", extraction="5.2", true_false=True),
]


@pytest.fixture
def scored(tmp_path):
  def of(rows, name="a.jsonl"):
    path = tmp_path / name
    if path.suffix == ".jsonl":
      write_lines(path, rows)
    else:
      path.write_text(json.dumps({row["pid"]: row for row in rows}))
    out, scores = tmp_path / "out.json", tmp_path / "scores.json"
    printed = score_file.score_file(str(path), out=str(out), scores=str(scores))
    found = json.loads(scores.read_text())
    del found["file"]
    return found, json.loads(out.read_text()), printed

  return of


def test_each_way_of_scoring_by_hand(scored):
  found, out, _ = scored(HAND)
  assert {k: v for k, v in found.items() if k != "rows"} == {
    "records": 9,
    "scored": 8,
    "no_answer": 1,
    "no_response": 1,
    "official_rules": {"mathvista": ["official", 8]},
    "wemath": {},
    "stored_extractions": 2,
    "agreement": {
      "labelled": 3,
      "right": 2,
      "wrong": 1,
      "missed_right": 2,
      "missed_wrong": 1,
    },
  }
  assert {pid for pid, x in out.items() if x["strict_true_false"]} == {
    *("1", "4", "5")
  }
  # None without a public answer.
  assert out["7"]["strict_true_false"] is None
  assert out["7"]["strict_answer"] == "8"
  assert out["unreadable:3"]["strict_true_false"] is False
  assert out["3"] == HAND[2] | {
    "strict_answer": None,
    "strict_true_false": False,
  }
  rows = {
    (x["dimension"], x["name"]): [
      (x[way]["right"], x[way]["problems"]) if x[way] else None
      for way in ("strict", "official", "stored")
    ]
    for x in found["rows"]
  }
  # The official rules do not find the 5 in a sentence, truncate 5.7 to 5, take
  # an empty response for tan, and read stored extractions, even empty ones.
  assert rows == {
    ("overall", "all"): [(3, 8), (6, 8), (2, 3)],
    ("question_type", "free_form"): [(1, 3), (2, 3), (1, 1)],
    ("question_type", "multi_choice"): [(2, 4), (4, 4), (1, 2)],
    ("answer_type", "integer"): [(1, 3), (2, 3), (1, 1)],
    ("answer_type", "text"): [(2, 4), (4, 4), (1, 2)],
    ("task", "a"): [(1, 2), (1, 2), None],
    ("task", "b"): [(1, 2), (2, 2), None],
    ("source", "S"): [(1, 1), (0, 1), None],
    ("skill", "x"): [(1, 1), (0, 1), None],
    ("skill", "y"): [(1, 2), (1, 2), None],
  }


def above_chance(scored, rows):
  return scored(rows)[0]["rows"][0]["multi_choice"]


def test_above_chance_by_hand(scored):
  four = [
    record(str(i), letter, "red", choices=COLOURS)
    for i, letter in enumerate("AABC")
  ]
  two = [record("9", "A", "Yes", choices=["Yes", "No"])]
  # Three of five are right. A guess scores (4 * 1/4 + 1/2) / 5 = 0.3.
  found = above_chance(scored, [*four, *two, record("10", "5")])
  assert found["problems"] == 5
  assert found["guess"] == pytest.approx(0.3)
  assert found["share"] == pytest.approx((0.6 - 0.3) / 0.7)
  whole = scored([*four, *two])[0]["rows"][0]["strict"]
  for bound in ("low", "high"):
    assert found[bound] == pytest.approx((whole[bound] - 0.3) / 0.7)
  assert above_chance(scored, two)["share"] == 1
  # 1/3 of three is right; a guess scores 1/4.
  assert above_chance(scored, four[1:])["share"] == pytest.approx(
    (1 / 3 - 1 / 4) / (3 / 4)
  )
  assert above_chance(scored, [record("1", "5")]) is None
  assert above_chance(scored, [record("1", "A", "a", choices=["a"])]) is None


def test_the_table_depends_on_neither_layout_nor_order(scored):
  wanted, out, printed = scored(HAND)
  assert scored(HAND, "a.json") == (wanted, out, printed)
  shuffled = random.Random(0).sample(HAND, len(HAND))
  assert scored(shuffled)[0] == wanted


def test_every_figure_is_printed_in_percent(scored):
  _, _, printed = scored(HAND)
  lines = printed.splitlines()
  assert lines[0].startswith("8 of 9 records scored (1 have no public answer)")
  assert lines[2] == "official: the rule of MathVista, for 8 records."
  assert "extracted 2 answers; of the other 6 records" in lines[4]
  assert "3 stored labels: right for 1 of 1 labelled wrong" in lines[5]
  whole = lines[lines.index("overall") + 1]
  assert " ".join(whole.split()) == (
    "all 8 37.5 [ 13.7, 69.4] 75.0 [ 40.9, 92.9] 66.7 [ 20.8, 93.9] "
    "20.0 [-36.0, 76.0]"
  )
  slices = [" ".join(line.split()) for line in lines]
  assert (
    "b 2 50.0 [ 9.5, 90.5] 100.0 [ 34.2, 100.0] - 33.3 [-20.7, 87.4]" in slices
  )


def test_text_is_written_unchanged(scored, tmp_path):
  """Even a lone surrogate, which UTF-8 does not have."""
  row = record("1", "\u7b54\u6848\u662f5 \ud83d")
  _, out, _ = scored([row])
  assert out["1"]["response"] == row["response"]
  assert "\u7b54\u6848" in (tmp_path / "out.json").read_text("utf-8")


@pytest.mark.parametrize(
  ("out", "scores", "message"),
  [
    ("a.jsonl", "", "must be different files"),
    ("", "./a.jsonl", "must be different files"),
    ("b.json", "b.json", "must be different files"),
    ("none/b.json", "", "--out ('none/b.json') must be a file"),
    ("", "folder", "--scores ('folder') must be a file"),
  ],
)
def test_outputs_must_be_writable_files_of_their_own(
  tmp_path, monkeypatch, out, scores, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder").mkdir()
  before = write_lines(tmp_path / "a.jsonl", HAND).read_bytes()
  with pytest.raises(SettingError) as caught:
    score_file.score_file("a.jsonl", out=out, scores=scores)
  assert message in str(caught.value)
  assert sorted(x.name for x in tmp_path.iterdir()) == ["a.jsonl", "folder"]
  assert (tmp_path / "a.jsonl").read_bytes() == before


def test_the_table_of_a_hostile_file_is_text(tmp_path):
  """A terminal would obey it, and its encoding has no lone surrogates."""
  hostile = "\x1b]0;owned\x07\r\u202e\ud800"
  rows = [record("1", "5")]
  rows[0]["metadata"] = {"source": hostile, "skills": [hostile]}
  path = write_lines(tmp_path / "a.jsonl", rows)
  done = command(path)
  assert done.returncode == 0 and done.stderr == ""
  assert all(line.isprintable() for line in done.stdout.splitlines())
  assert r"\x1b]0;owned\x07\r\u202e\ud800" in done.stdout


def test_a_reader_that_ends_early_ends_it_in_silence(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", HAND)
  # The pipe's reader is gone before anything is written.
  words = f"{sys.executable} -m data_pipelines.score {path} | true"
  done = subprocess.run(
    ["bash", "-c", f"{words}; exit ${{PIPESTATUS[0]}}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.stderr == ""
  assert done.returncode in (0, 128 + signal.SIGPIPE)


def test_a_split_without_public_answers_has_no_score(tmp_path):
  rows = [record("1", "5", ""), record("unreadable:2", "", "")]
  path = write_lines(tmp_path / "a.jsonl", rows)
  with pytest.raises(SettingError, match="must have public answers"):
    score_file.score_file(str(path), out=str(tmp_path / "out.json"), scores="")
  assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([], "arguments ([]) must be one results file"),
    (["a.json", "b.json"], "must be one results file"),
    (["nowhere.json"], "results file ('nowhere.json') must be a text file"),
    (["a.json", "--colour=red"], "'colour'"),
    (["a.json", "--out="], "out ('') must name a file"),
    ([""], "results file ('') must name a file"),
    (["/dev/zero"], "must be a regular file"),
  ],
)
def test_a_user_error_exits_64_with_the_reason(args, message):
  done = command(*args)
  assert done.returncode == 64
  assert message in done.stderr and "Traceback" not in done.stderr
  assert done.stdout == ""


def official(pid, rule, response, answer, **metadata):
  """A record of --mode=evaluate whose set has a rule of its own."""
  metadata |= {"official_rule": rule, "official_answer": answer}
  return record(
    pid,
    response,
    answer,
    answer_type="integer" if answer.isdigit() else "text",
    metadata=metadata,
    official_rule=rule,
  )


def test_each_official_rule_has_a_column_of_its_own(scored):
  rows = [
    official("1", "chartqa", "105", "100", human_or_machine=0),
    official("2", "chartqa", "<answer>100</answer>", "100", human_or_machine=1),
    official("3", "mathvision", "The answer is 100.", "100", level=2, key="3"),
    record("4", "100", "100", official_rule=""),
    record("unreadable:4", "", "", official_rule=""),
  ]
  found, _, printed = scored(rows)
  assert found["official_rules"] == {
    "chartqa": ["official_chartqa", 2],
    "mathvision": ["official_mathvision", 1],
  }
  rows = {(x["dimension"], x["name"]): x for x in found["rows"]}
  shares = {
    way: share and (share["right"], share["problems"])
    for way, share in rows["overall", "all"].items()
    if way.startswith(("strict", "official"))
  }
  # What could not be read is wrong by each rule.
  assert shares == {
    "strict": (3, 5),
    "official_chartqa": (1, 3),
    "official_mathvision": (1, 2),
  }
  assert rows["human_or_machine", "0"]["official_chartqa"]["right"] == 1
  assert rows["level", "2"]["official_chartqa"] is None
  assert ("level", "2") in rows and ("key", "3") not in rows
  assert (
    "official_chartqa: the rule of ChartQA relaxed accuracy, for 2 records."
    in printed.splitlines()
  )
  (alone,) = scored([record("1", "5", official_rule="")])[0]["rows"][:1]
  assert alone["official"] is None


def test_we_maths_metric_is_printed_for_both_ways_of_grading(scored):
  keys = ("2steps_1", "2steps_2", "2steps_multi")
  rows = [
    official(key, "wemath", response, "C", key=key, ID="7")
    for key, response in zip(
      keys, ("Answer: C", "<answer>C</answer>", "Answer: C"), strict=True
    )
  ]
  found, _, printed = scored(rows)
  assert found["wemath"]["official"]["RM_strict"] == 1
  assert found["wemath"]["strict"]["CM_strict"] == 1
  assert (
    "We-Math's metric by official grades: S1 0.5, S2 1, problems 1, IK 0, "
    "IG 0, CM_strict 0, RM_strict 1, RM_rate_strict 1, score_strict 0, "
    "CM_loose 1, RM_loose 0, RM_rate_loose 0, score_loose 1." in printed
  )
  assert ("key", keys[2]) in {
    (x["dimension"], x["name"]) for x in found["rows"]
  }


def test_our_reading_never_feeds_the_official_column(scored):
  row = record("1", "So it is 5 cm, I think.", official_rule="mathvista")
  row["metadata"] = {"official_rule": "mathvista"}
  first, out, _ = scored([row])
  again, _, _ = scored(list(out.values()))
  assert out["1"]["strict_answer"] == "5" and "extraction" not in out["1"]
  for found in (first, again):
    assert found["stored_extractions"] == 0
    assert found["rows"][0]["strict"]["right"] == 1
    assert found["rows"][0]["official"]["right"] == 0


def test_a_list_is_read_in_the_spelling_of_the_official_answers(scored):
  row = record("1", "<answer>[1,2]</answer>", "[1, 2]", answer_type="list")
  assert scored([row])[1]["1"]["strict_answer"] == "[1, 2]"
