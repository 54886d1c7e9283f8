"""The command that compares results files, on real and hand-written files."""

import io
import json
import math
import pathlib
import subprocess
import sys

import PIL.Image
import pytest

from data_pipelines import records
from data_pipelines.scoring.comparison import compare_files
from data_pipelines.validation import SettingError
from tests.data_pipelines.sources import taken

ROOT = pathlib.Path(__file__).resolve().parents[2]


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", "data_pipelines.compare", *map(str, args)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )


def record(pid, response, answer="5", **changes):
  return {
    "pid": pid,
    "question": f"Question {pid}?",
    "question_type": "multi_choice" if "choices" in changes else "free_form",
    "answer_type": "text" if "choices" in changes else "integer",
    "answer": answer,
    "response": response,
  } | changes


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(list(rows)))
  return str(path)


def results(path, right, pids="123456", **changes):
  """A results file whose problems in `right` are right, the others wrong."""
  rows = (record(p, "5" if p in right else "6", **changes) for p in pids)
  return write(path, rows)


def compare(tmp_path, *args, **options):
  """The figures of one comparison, and the text."""
  scores = tmp_path / "scores.json"
  text = compare_files(*map(str, args), scores=str(scores), **options)
  (found,) = json.loads(scores.read_text())["comparisons"]
  return found, text


# Two models on all of testmini.


@pytest.fixture(scope="module")
def real(responses, tmp_path_factory):
  """The command's figures, its text and its page."""
  folder = tmp_path_factory.mktemp("real")
  names = ("chatgpt", "bard")
  files = [
    write(folder / f"{name}.json", (x for x in responses if x["model"] == name))
    for name in names
  ]
  scores, report = folder / "scores.json", folder / "report.html"
  flags = (f"--scores={scores}", f"--report={report}", "--by=answer_type")
  done = command(*files, *flags)
  assert done.returncode == 0 and done.stderr == "", done.stderr
  (found,) = json.loads(scores.read_text())["comparisons"]
  return found, done.stdout, report.read_text()


def test_real_files_are_compared_by_an_exact_test(real):
  found, text, _ = real
  up, down = len(found["wrong_to_right"]), len(found["right_to_wrong"])
  assert found["problems"] == 1000 and up > down > 50
  tail = sum(math.comb(up + down, i) for i in range(down + 1))
  assert found["p_value"] == pytest.approx(2 * tail / 2 ** (up + down))
  assert found["difference"] == pytest.approx((up - down) / 1000)
  shares = [found[x]["files"][0]["share"] for x in ("before", "after")]
  assert shares[1] - shares[0] == pytest.approx(found["difference"])
  assert f"right -> wrong {down}: " in text and text.endswith(
    "better: p < 0.001.\n"
  )
  assert [
    x["name"] for x in found["slices"]
  ] == "float integer list text".split()
  assert sum(x["wrong_to_right"] for x in found["slices"]) == up


def test_the_page_has_every_pid_and_a_limited_number_of_responses(real):
  found, _, page = real
  assert page.count("<article") == 100 + min(100, len(found["right_to_wrong"]))
  assert ", ".join(found["wrong_to_right"]) in page
  assert len(page) < 2_000_000


# Hand-written files.


def test_changes_are_counted_and_named(tmp_path):
  before = results(tmp_path / "a.json", "123")
  after = results(tmp_path / "b.json", "2345")
  found, text = compare(tmp_path, before, after)
  assert found["wrong_to_right"] == ["4", "5"]
  assert found["right_to_wrong"] == ["1"]
  # Of three changes, one or none for the worse: 2 * (1 + 3) / 8.
  assert found["p_value"] == 1.0
  assert found["difference"] == pytest.approx(1 / 6)
  assert "wrong -> right 2: 4, 5\n" in text
  assert "no difference shown: p = 1.000; with 6 problems" in text


def test_the_order_of_records_and_sides_changes_no_more_than_names(tmp_path):
  before = results(tmp_path / "a.json", "123")
  after = results(tmp_path / "b.json", "2345", pids="654321")
  one, other = (
    compare(tmp_path, *files)[0] for files in ((before, after), (after, before))
  )
  assert one["p_value"] == other["p_value"]
  assert set(one["wrong_to_right"]) == set(other["right_to_wrong"])
  assert (one["low"], one["high"]) == (-other["high"], -other["low"])


def test_problems_of_one_file_alone_are_named_first(tmp_path):
  before = results(tmp_path / "a.json", "1", pids="1234")
  after = results(tmp_path / "b.json", "12", pids="12356")
  found, text = compare(tmp_path, before, after)
  assert found["problems"] == 3
  assert found["before"]["files"][0]["left_out"] == ["4"]
  assert found["after"]["files"][0]["left_out"] == ["5", "6"]
  head = text.splitlines()[:3]
  assert head[0] == "Compared: 3 problems that all files have."
  assert head[2].startswith("Left out: 2 that ") and head[2].endswith(": 5, 6.")


def test_missing_answers_are_left_out_and_missing_responses_are_wrong(tmp_path):
  rows = [record("1", "5", ""), record("2", None), record("3", "5")]
  rows.append(record("unreadable:4", "", "", question=""))
  after = [*rows[:1], record("2", "5"), *rows[2:]]
  found, text = compare(
    tmp_path,
    write(tmp_path / "a.json", rows),
    write(tmp_path / "b.json", after),
  )
  assert (found["problems"], found["no_answer"]) == (3, 1)
  assert found["before"]["files"][0]["no_response"] == 1
  assert found["before"]["share"] == pytest.approx(1 / 3)
  assert found["wrong_to_right"] == ["2"]
  assert "1 without a public answer" in text
  assert "1 without a response count as wrong" in text


def test_slices_of_several_columns_and_values(tmp_path):
  metadata = {
    "1": {"task": "a", "skills": ["x", "y", "x"]},
    "2": {"task": "a", "skills": ["y"]},
    "3": {"task": "b", "skills": "x", "grade": None, "level": 3},
  }
  files = []
  for name, right in (("a", "1"), ("b", "23")):
    rows = (
      record(p, "5" if p in right else "6", metadata=x)
      for p, x in metadata.items()
    )
    files.append(write(tmp_path / f"{name}.json", rows))
  by = ("task", "skill", "level", "question_type", "task")
  found, text = compare(tmp_path, *files, by=by)
  assert [
    (x["dimension"], x["name"], x["problems"], x["wrong_to_right"])
    for x in found["slices"]
  ] == [
    *(("task", "a", 2, 1), ("task", "b", 1, 1)),
    *(("skill", "x", 2, 1), ("skill", "y", 2, 1)),
    *(("level", "3", 1, 1), ("question_type", "free_form", 3, 2)),
  ]
  assert "p, corrected for 6 slices" in text
  assert all(x["p_holm"] >= x["p_value"] for x in found["slices"])
  with pytest.raises(SettingError, match="'topic'.*name some of .*'skills'"):
    compare(tmp_path, *files, by=["topic"])


def test_the_record_that_says_most_describes_a_problem(tmp_path):
  before = results(tmp_path / "a.json", "1", question="")
  after = results(tmp_path / "b.json", "2", metadata={"task": "t"})
  found, _ = compare(tmp_path, before, after, by=["task"])
  assert found["slices"][0]["problems"] == 6


def test_several_runs_have_a_spread(tmp_path):
  files = [
    results(tmp_path / f"{i}.json", right)
    for i, right in enumerate(("12", "1", "123", "1234"))
  ]
  sides = ",".join(files[:2]), ",".join(files[2:])
  found, text = compare(tmp_path, *sides)
  assert found["before"]["share"] == pytest.approx(1.5 / 6)
  assert found["before"]["deviation"] == pytest.approx(math.sqrt(0.5) / 6)
  assert found["wrong_to_right"] == ["2", "3", "4"]
  assert "of 2 runs, standard deviation 11.8 points" in text
  assert "test over problems and runs" in text and "right more often 3" in text
  with pytest.raises(SettingError, match="must be different files"):
    compare(tmp_path, f"{files[0]},{files[0]}", files[2])


def test_workdirs_give_their_results_files_of_the_same_name(tmp_path):
  runs = []
  for name, right in (("a", "1"), ("b", "12")):
    folder = tmp_path / name / "eval"
    results(folder / "output_eval.json", right)
    results(folder / "output_eval_removed.json", "")
    results(folder / "samples" / "output_eval_000.json", "")
    runs.append(tmp_path / name)
  found, text = compare(tmp_path, *runs)
  assert (
    found["before"]["files"][0]["file"] == f"{runs[0]}/eval/output_eval.json"
  )
  one = runs[1] / "eval" / "output_eval.json"
  assert compare(tmp_path, runs[0], one)[0] == found
  # And of named sets.
  for name, right in (("a", "1"), ("b", "23")):
    results(tmp_path / name / "eval" / "geo" / "output_test.json", right)
  results(runs[1] / "eval" / "geo" / "output_other.json", "")
  scores, report = tmp_path / "scores.json", tmp_path / "r.html"
  both = compare_files(*map(str, runs), scores=str(scores), report=str(report))
  assert both.startswith(text) and both.count("Compared: ") == 2
  found = json.loads(scores.read_text())["comparisons"]
  assert [len(x["wrong_to_right"]) for x in found] == [1, 2]
  assert report.read_text().count("<h1>") == 2
  with pytest.raises(SettingError, match="name one file of each"):
    compare(tmp_path, runs[0], one)


EVIL = "<script>alert(1)</script>\x1b]0;owned\x07\u202e{{ 7 * 7 }}"


def test_foreign_text_is_escaped(tmp_path):
  files = []
  for name, response in (("a", "(A)"), ("b", "(B)")):
    row = record(
      EVIL, response + EVIL, EVIL, choices=[EVIL, "x"], question=EVIL
    )
    row |= {
      "metadata": {"task": EVIL},
      "response": f"<answer>{response}</answer>",
    }
    files.append(write(tmp_path / f"{name}.json", [row]))
  report = tmp_path / "report.html"
  _, text = compare(tmp_path, *files, by=["task"], report=str(report))
  page = report.read_text()
  assert "<script" not in page and "49" not in page
  assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
  assert not set("\x1b\x07\u202e") & set(page + text)
  assert all(line.isprintable() for line in text.splitlines())
  assert "default-src 'none'" in page


def problem(pid, colour, **changes):
  file = io.BytesIO()
  PIL.Image.new("RGB", (600, 300), colour).save(file, "png")
  return records.Problem(
    pid=pid,
    question=f"Question {pid}?",
    images=(file.getvalue(),),
    answer="5",
    question_type="free_form",
    answer_type="integer",
    **changes,
  )


def test_the_problems_of_a_data_dir_judge_and_are_shown(tmp_path):
  data_dir = tmp_path / "data"
  made = [problem(p, "red", metadata={"task": "t"}) for p in "1234"]
  taken.write({"eval": made[:2], "train": made[2:]}, data_dir)
  # The files hold an older answer.
  before = results(tmp_path / "a.json", "12", pids="123", answer="6")
  after = results(tmp_path / "b.json", "13", pids="123", answer="7")
  report = tmp_path / "report.html"
  options = {"data_dir": str(data_dir), "by": ["task"], "report": str(report)}
  found, _ = compare(tmp_path, before, after, **options)
  assert found["before"]["share"] == pytest.approx(2 / 3)
  assert found["slices"][0]["problems"] == 3
  page = report.read_text()
  assert page.count('<img src="data:image/') == 2
  assert page.index("Right before, wrong after") < page.index("<h3>2</h3>")
  other = results(tmp_path / "c.json", "1", pids="129")
  with pytest.raises(SettingError, match="'9' is not in --data_dir"):
    compare(tmp_path, other, other, **options)
  other = results(tmp_path / "c.json", "1", question="Another?")
  with pytest.raises(SettingError, match="'1' has another question"):
    compare(tmp_path, other, other, **options)


@pytest.mark.parametrize(
  "changes",
  [
    {"question": "Another?"},
    {"answer": "7"},
    {"unit": "cm"},
    {"aliases": ["five"]},
    {"choices": ["5", "6"]},
  ],
)
def test_files_of_different_problems_are_refused(tmp_path, changes):
  before = results(tmp_path / "a.json", "1")
  after = results(tmp_path / "b.json", "1", **changes)
  with pytest.raises(SettingError, match="of 6 pids in all files 6 differ"):
    compare(tmp_path, before, after)


A = "a.json"


@pytest.mark.parametrize(
  ("after", "options", "message"),
  [
    ("nowhere.json", {}, "'nowhere.json') must be a text file"),
    ("a.json,", {}, "AFTER ('') must name a file"),
    ("empty", {}, "run --mode=evaluate with this --workdir first"),
    ("b.json", {}, "of 0 pids in all files"),
    (A, {"by": ["topic"]}, "--by ('topic') must name columns"),
    (A, {"scores": A}, "must be different files"),
    (A, {"scores": "x", "report": "./x"}, "must be different files"),
    (A, {"report": "no/r.html"}, "--report ('no/r.html') must be a file"),
    (A, {"data_dir": "empty"}, "must hold prepared problems"),
  ],
)
def test_what_cannot_be_compared_is_refused(
  tmp_path, monkeypatch, after, options, message
):
  (tmp_path / "empty").mkdir()
  results(tmp_path / A, "1")
  results(tmp_path / "b.json", "1", pids="789")
  before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SettingError) as caught:
    compare_files(A, after, **options)
  assert message in str(caught.value)
  assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before


def test_a_split_without_public_answers_is_refused(tmp_path):
  file = results(tmp_path / A, "1", answer="")
  with pytest.raises(SettingError, match="must have public answers"):
    compare_files(file, file)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([A], f"arguments (['{A}']) must be two results files"),
    ([A, A, "--data_dir="], "data_dir ('') must name a file"),
    (["/dev/zero", A], "must be a regular file"),
  ],
)
def test_a_user_error_exits_64_with_the_reason_in_one_line(args, message):
  done = command(*args)
  assert done.returncode == 64
  assert message in done.stderr and len(done.stderr.splitlines()) == 1
  assert done.stdout == ""
