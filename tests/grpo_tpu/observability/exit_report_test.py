"""However the program ends, its last lines say how, and what to do next."""

import json
import shutil

import jax
import pytest

from configs import base
from data_pipelines import validation
from data_pipelines.workers import pool
from grpo_tpu.checkpoint import manifest
from grpo_tpu.config import schema
from grpo_tpu.distributed import initialize, interrupt, preemption
from grpo_tpu.observability import exit_report, mirror, run_record

CONFIG = schema.Config.from_config_dict(base.get_config())
ERRORS = {
  64: validation.SettingError("seed (-1) must be at least 0"),
  75: preemption.Preempted(),
  1: ValueError("it broke\nand more"),
}


class Shutdown(Exception):
  pass


@pytest.fixture(autouse=True)
def keep_process(monkeypatch):
  """Replaces the end of the process by an exception."""

  def shutdown(code):
    raise Shutdown(code)

  monkeypatch.setattr(initialize, "shutdown", shutdown)


def exit_code_of(report, error):
  with pytest.raises(Shutdown) as shutdown:
    report.exit_with(error)
  return shutdown.value.args[0]


def run_report(workdir, *, has_run_record=True):
  run_record.RunRecord(
    str(workdir), CONFIG.to_dict(), {}, {"data.dir: its records": "a"}
  ).write("w")
  report = exit_report.ExitReport()
  report.attach_run(workdir, mirror.Mirror(workdir))
  report.has_run_record, report.step = has_run_record, 7
  return report


def last_lines(caplog):
  """The logged lines from the headline on."""
  lines = [record.getMessage() for record in caplog.records]
  (start,) = (i for i, line in enumerate(lines) if "(exit code " in line)
  return [line for line in lines[start:] if "run.json" not in line]


def remove(folder):
  shutil.rmtree(folder)


def replace_by_file(folder):
  folder.mkdir(exist_ok=True)
  remove(folder)
  folder.write_text("")


def write_manifest(folder, text):
  (folder / "checkpoints" / "00000007").mkdir(parents=True)
  path = folder / "checkpoints" / "00000007.manifest.json"
  assert path == manifest.path_for(path.with_name("00000007"))
  path.write_text(text)


DAMAGES = {
  "no record": lambda folder: (folder / "run.json").unlink(),
  "no workdir": remove,
  "a file for the checkpoints": lambda folder: replace_by_file(
    folder / "checkpoints"
  ),
  "a folder for the record": lambda folder: (
    (folder / "run.json").unlink(),
    (folder / "run.json").mkdir(),
  ),
  "a foreign manifest": lambda folder: write_manifest(folder, '{"files": 3}'),
  "a list for a manifest": lambda folder: write_manifest(folder, "[]"),
} | {
  f"a record of {text[:16]}": lambda folder, text=text: (
    folder / "run.json"
  ).write_text(text)
  for text in ("{}", "[]", "3", '{"attempts":[]}', '{"atte', "[" * 10**5)
}
ENDS = {
  0: lambda report: report.report_done(),
  76: lambda report: report.report_stuck("no progress"),
} | {
  code: lambda report, error=error: exit_code_of(report, error)
  for code, error in ERRORS.items()
}


@pytest.mark.parametrize("code", ENDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_workdir_changes_neither_the_exit_code_nor_the_words(
  tmp_path, caplog, damage, code, monkeypatch
):
  caplog.set_level("INFO", logger="absl")
  closed = []
  monkeypatch.setattr(pool, "close_all", lambda: closed.append(True))
  folder = tmp_path / "run"
  folder.mkdir()
  report = run_report(folder)
  DAMAGES[damage](folder)
  assert ENDS[code](report) in (None, code)
  headline = last_lines(caplog)[0]
  assert f"(exit code {code})" in headline
  assert closed == [True] * (code in ERRORS)


def test_a_failure_to_end_the_workers_does_not_change_the_exit_code(
  monkeypatch,
):
  def fail():
    raise RuntimeError("no such process")

  monkeypatch.setattr(pool, "close_all", fail)
  assert exit_code_of(exit_report.ExitReport(), ERRORS[75]) == 75


def test_an_error_without_words_still_ends_with_1():
  class Mute(Exception):
    def __str__(self):
      raise RuntimeError("no words")

  assert exit_code_of(exit_report.ExitReport(), Mute()) == 1


@pytest.mark.parametrize("code", [75, 1])
@pytest.mark.parametrize("has_run", [False, True])
def test_the_last_lines_have_code_reason_step_checkpoint_and_what_next(
  tmp_path, caplog, code, has_run
):
  report = run_report(tmp_path) if has_run else exit_report.ExitReport()
  assert exit_code_of(report, ERRORS[code]) == code
  headline, *lines = last_lines(caplog)
  step = " at step 7" if has_run else ""
  reason = {75: "preempted", 1: "ValueError: it broke"}
  assert headline.startswith(
    f"Stopped{step} (exit code {code}): {reason[code]}"
  )
  starts = ["Checkpoint: none", "Next: ", "Time: "] if has_run else ["Next: "]
  assert len(lines) == len(starts)
  assert all(map(str.startswith, lines, starts))
  what_next = {
    75: "run the same command again to resume",
    1: "docs/troubleshooting.md",
  }
  assert what_next[code] in lines[starts.index("Next: ")]
  assert not any("\n" in line for line in (headline, *lines))


def test_a_finished_run_points_at_its_checkpoint_and_curves(tmp_path, caplog):
  caplog.set_level("INFO", logger="absl")
  folder = tmp_path / "a run"
  folder.mkdir()
  run_report(folder).report_done()
  assert last_lines(caplog)[:3] == [
    "Finished at step 7 (exit code 0).",
    "Checkpoint: none",
    f"View: tensorboard --logdir='{folder}'"
    "  # http://localhost:6006/#custom_scalars",
  ]


def test_an_interrupted_run_says_so(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(interrupt, "is_pressed", lambda: True)
  assert exit_code_of(run_report(tmp_path), ERRORS[75]) == 75
  assert "interrupted, everything is saved" in last_lines(caplog)[0]


def test_a_mode_says_what_to_do_with_its_result(tmp_path, caplog):
  caplog.set_level("INFO", logger="absl")
  report = exit_report.ExitReport()
  report.what_next = "open runs/smoke/eval/report.html"
  report.report_done()
  assert last_lines(caplog) == [
    "Finished (exit code 0).",
    "Next: open runs/smoke/eval/report.html",
  ]


@pytest.mark.parametrize("has_run", [False, True])
def test_a_refusal_takes_two_lines_that_do_not_repeat(
  tmp_path, caplog, has_run
):
  report = run_report(tmp_path) if has_run else exit_report.ExitReport()
  exit_code_of(report, ERRORS[64])
  assert [record.getMessage() for record in caplog.records] == [
    "seed (-1) must be at least 0",
    "Next: fix what the error names and run the command again (exit code 64).",
  ]


@pytest.mark.parametrize("code", ENDS)
def test_run_json_says_the_same(tmp_path, caplog, code):
  caplog.set_level("INFO", logger="absl")
  ENDS[code](run_report(tmp_path))
  record = json.loads((tmp_path / "run.json").read_text())
  assert record["end"]["exit_code"] == code and record["end"]["step"] == 7
  log = "\n".join(last_lines(caplog))
  if code not in (0, 64):
    assert record["end"]["reason"] in log
  assert record["end"]["next"] in log
  assert sum(record["end"]["goodput"].values()) == pytest.approx(1)
  (attempt,) = record["attempts"]
  assert attempt["exit_code"] == code and attempt["ended"]


def test_a_refused_run_leaves_the_record_of_another_alone(tmp_path):
  report = run_report(tmp_path, has_run_record=False)
  before = (tmp_path / "run.json").read_bytes()
  exit_code_of(report, ERRORS[64])
  assert (tmp_path / "run.json").read_bytes() == before


def test_only_process_0_writes(tmp_path, monkeypatch):
  report = run_report(tmp_path)
  before = (tmp_path / "run.json").read_bytes()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  report.report_done()
  assert (tmp_path / "run.json").read_bytes() == before


def test_a_damaged_record_does_not_hide_the_end(tmp_path, caplog):
  report = run_report(tmp_path)
  (tmp_path / "run.json").write_text("{")
  assert exit_code_of(report, ERRORS[1]) == 1
  assert "exit code 1" in last_lines(caplog)[0]
  assert "run.json does not say how the run ended" in caplog.text
