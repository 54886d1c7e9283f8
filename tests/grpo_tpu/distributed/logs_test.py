"""The progress line is not drowned by what libraries have to say."""

import logging

import orbax.checkpoint
import pytest

from data_pipelines import prepare
from grpo_tpu.distributed import logs
from grpo_tpu.train import loop


@pytest.mark.parametrize(
  ("path", "level", "is_shown"),
  [
    (loop.__file__, logging.INFO, True),
    (prepare.__file__, logging.INFO, True),
    (orbax.checkpoint.__file__, logging.INFO, False),
    (orbax.checkpoint.__file__, logging.WARNING, True),
    (orbax.checkpoint.__file__, logging.ERROR, True),
  ],
)
def test_only_warnings_pass_from_files_that_are_not_ours(path, level, is_shown):
  record = logging.LogRecord("absl", level, path, 1, "words", (), None)
  assert logs.is_worth_showing(record) == is_shown


def test_silence_holds_for_every_logger_that_absl_prints_for(capfd):
  from absl import logging as absl_logging

  handler = absl_logging.get_absl_handler()
  before = list(handler.filters)
  logs.silence_libraries()
  try:
    for level, words in ((logging.INFO, "chat"), (logging.ERROR, "alarm")):
      handler.handle(
        logging.LogRecord("x", level, "/lib/orbax/a.py", 1, words, (), None)
      )
  finally:
    handler.filters[:] = before
  said = capfd.readouterr().err
  assert "alarm" in said and "chat" not in said
