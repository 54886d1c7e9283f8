"""The log on stderr: messages of this project, and warnings of libraries."""

import logging as std_logging
import pathlib

from absl import logging

from data_pipelines.text import terminal

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_OURS = (str(_ROOT / "grpo_tpu"), str(_ROOT / "data_pipelines"))


def set_up() -> None:
  """Escapes what the log shows, and drops messages of libraries.

  Warnings of libraries stay. Orbax, Grain and TFDS use absl's logger and write
  more lines for one checkpoint than a run does in an hour.
  """
  terminal.set_up()
  logging.get_absl_handler().addFilter(is_worth_showing)


def is_worth_showing(record: std_logging.LogRecord) -> bool:
  """True for a warning, and for any message of this project's files."""
  return record.levelno >= std_logging.WARNING or record.pathname.startswith(
    _OURS
  )
