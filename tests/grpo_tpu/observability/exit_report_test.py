"""However the program ends, one line says how, and what to do next."""

import json

import jax
import pytest

from configs import base
from data_pipelines import validation
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import initialize, preemption
from grpo_tpu.observability import exit_report, run_record

CONFIG = run_config.Config.from_config_dict(base.get_config())
WAYS = {
  64: validation.SettingError("seed (-1) must be at least 0"),
  75: preemption.Preempted(),
  1: ValueError("it broke\nand more"),
}


class Left(Exception):
  pass


@pytest.fixture(autouse=True)
def stays(monkeypatch):
  """The process of the tests is not to end."""

  def shutdown(code):
    raise Left(code)

  monkeypatch.setattr(initialize, "shutdown", shutdown)


def end_by(ending, error):
  with pytest.raises(Left) as left:
    ending.exit_with(error)
  return left.value.args[0]


def of_run(workdir, *, has_run_record=True):
  run_record.write(str(workdir), CONFIG, {"data.dir: its records": "a"}, "w")
  ending = exit_report.ExitReport()
  ending.attach_run(workdir)
  ending.has_run_record, ending.step = has_run_record, 7
  return ending


def last_line(caplog):
  lines = [r.getMessage() for r in caplog.records if "The end" in r.message]
  (line,) = lines
  return line


@pytest.mark.parametrize("code", WAYS)
@pytest.mark.parametrize("has_run", [False, True])
def test_every_end_is_one_line_with_code_reason_step_and_what_next(
  tmp_path, caplog, code, has_run
):
  ending = of_run(tmp_path) if has_run else exit_report.ExitReport()
  assert end_by(ending, WAYS[code]) == code
  line = last_line(caplog)
  assert line.startswith(f"The end, with exit code {code}: ")
  assert f"Last step: {7 if has_run else 'none'}. " in line
  assert "Newest checkpoint: none. Next: " in line
  next_step = {
    64: "change what the error names",
    75: "start the same command again",
    1: "docs/troubleshooting.md",
  }
  assert next_step[code] in line
  assert "\n" not in line


def test_a_refusal_says_its_reason_once(caplog):
  end_by(exit_report.ExitReport(), WAYS[64])
  assert caplog.text.count("must be at least 0") == 1


def test_an_interrupted_run_is_told_to_go_on(tmp_path, caplog):
  assert end_by(of_run(tmp_path), KeyboardInterrupt()) == 1
  assert "start the same command again" in last_line(caplog)
  assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
  ("code", "say"),
  [
    (0, lambda ending: ending.report_done()),
    (76, lambda ending: ending.report_stuck("no progress")),
    *(
      (code, lambda ending, error=error: end_by(ending, error))
      for code, error in WAYS.items()
    ),
  ],
)
def test_the_card_says_the_same_to_a_program(tmp_path, caplog, code, say):
  caplog.set_level("INFO", logger="absl")
  ending = of_run(tmp_path)
  say(ending)
  card = json.loads((tmp_path / "run.json").read_text())
  assert card["end"]["exit_code"] == code and card["end"]["step"] == 7
  assert card["end"]["reason"] in last_line(caplog)
  assert card["end"]["next"] in last_line(caplog)
  assert sum(card["end"]["goodput"].values()) == pytest.approx(1)
  (attempt,) = card["attempts"]
  assert attempt["exit_code"] == code and attempt["ended"]


def test_a_run_that_was_refused_leaves_the_card_of_another_alone(tmp_path):
  ending = of_run(tmp_path, has_run_record=False)
  before = (tmp_path / "run.json").read_bytes()
  end_by(ending, WAYS[64])
  assert (tmp_path / "run.json").read_bytes() == before


def test_hosts_but_one_write_nothing(tmp_path, monkeypatch):
  ending = of_run(tmp_path)
  before = (tmp_path / "run.json").read_bytes()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  ending.report_done()
  assert (tmp_path / "run.json").read_bytes() == before


def test_a_damaged_card_does_not_hide_the_end(tmp_path, caplog):
  ending = of_run(tmp_path)
  (tmp_path / "run.json").write_text("{")
  assert end_by(ending, WAYS[1]) == 1
  assert "exit code 1" in last_line(caplog)
  assert "run.json does not say how the run ended" in caplog.text
