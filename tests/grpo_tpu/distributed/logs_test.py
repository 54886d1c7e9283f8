"""Messages of libraries do not hide the progress line."""

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
def test_libraries_may_log_warnings_only(path, level, is_shown):
  record = logging.LogRecord("absl", level, path, 1, "words", (), None)
  assert logs.is_worth_showing(record) == is_shown


def test_the_filter_holds_for_every_logger_of_absl(capfd):
  from absl import logging as absl_logging

  handler = absl_logging.get_absl_handler()
  before = list(handler.filters)
  logs.set_up()
  try:
    for level, words in ((logging.INFO, "chat"), (logging.ERROR, "alarm")):
      handler.handle(
        logging.LogRecord("x", level, "/lib/orbax/a.py", 1, words, (), None)
      )
  finally:
    handler.filters[:] = before
  shown = capfd.readouterr().err
  assert "alarm" in shown and "chat" not in shown
