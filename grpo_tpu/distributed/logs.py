"""What a run says on stderr: its own words, and the warnings of everyone."""

import logging as std_logging
import pathlib

from absl import logging

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_OURS = (str(_ROOT / "grpo_tpu"), str(_ROOT / "data_pipelines"))


def silence_libraries() -> None:
  """Drops what libraries log below a warning.

  Orbax, Grain and TFDS share absl's logger with the progress line, and say
  more at each checkpoint than the run does in an hour.
  """
  logging.get_absl_handler().addFilter(is_worth_showing)


def is_worth_showing(record: std_logging.LogRecord) -> bool:
  """Whether it is a warning, or comes from this project's own files."""
  return record.levelno >= std_logging.WARNING or record.pathname.startswith(
    _OURS
  )
