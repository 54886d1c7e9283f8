"""What quotes data on a terminal is text."""

import logging
import os
import subprocess
import sys

import pytest
from absl import logging as absl_logging

from data_pipelines.text import terminal

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x85\u202e\ud800"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\r\x85\u202e\ud800"


@pytest.fixture
def handler(monkeypatch):
  handler = absl_logging.get_absl_handler()
  before = handler.python_handler.formatter
  monkeypatch.setattr(sys, "excepthook", sys.excepthook)
  for name in terminal._QUIET:
    monkeypatch.delenv(name, raising=False)
  terminal.set_up()
  yield handler
  handler.setFormatter(before)
  for name in terminal._QUIET:
    os.environ.pop(name, None)


def record(words, error=None):
  info = error and (type(error), error, None)
  return logging.LogRecord("a", logging.ERROR, "a.py", 1, words, (), info)


def test_a_message_is_logged_with_its_control_characters_escaped(
  handler, capfd
):
  handler.handle(record(f"no problem {HOSTILE}\nis there"))
  shown = capfd.readouterr().err
  assert f"no problem {ESCAPED}\nis there\n" in shown
  assert not set(shown) & set(HOSTILE[0] + "\x07\r\x85")


def test_an_exception_is_logged_so_too(handler, capfd):
  handler.handle(record("it failed", ValueError(HOSTILE)))
  assert f"ValueError: {ESCAPED}\n" in capfd.readouterr().err


def test_an_error_that_ends_a_program_is_shown_so_too(handler, capsys):
  sys.excepthook(ValueError, ValueError(HOSTILE), None)
  assert capsys.readouterr().err == f"ValueError: {ESCAPED}\n"


def test_tensorflow_is_told_to_import_without_a_word(handler, monkeypatch):
  assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
  terminal.set_up()
  assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0", "the user's choice stays"


@pytest.mark.parametrize("module", ["data_pipelines.prepare", "grpo_tpu"])
def test_the_programs_refuse_a_flag_in_plain_text(module):
  result = subprocess.run(
    [sys.executable, "-m", module, f"--x{HOSTILE[:-1]}=1"],
    capture_output=True,
    text=True,
    errors="surrogateescape",
  )
  assert result.returncode == 64
  assert "\x1b" not in result.stderr and r"\x1b[2J" in result.stderr
