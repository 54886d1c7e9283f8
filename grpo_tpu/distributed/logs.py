"""A filter for stderr: messages of this project, and warnings of libraries."""

import logging as std_logging
import pathlib

from absl import logging

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_OURS = (str(_ROOT / "grpo_tpu"), str(_ROOT / "data_pipelines"))


def silence_libraries() -> None:
  """Drops messages of libraries below the level of a warning.

  Orbax, Grain and TFDS use absl's logger and write more lines for one
  checkpoint than a run does in an hour.
  """
  logging.get_absl_handler().addFilter(is_worth_showing)


def is_worth_showing(record: std_logging.LogRecord) -> bool:
  """True for a warning, and for any message of this project's files."""
  return record.levelno >= std_logging.WARNING or record.pathname.startswith(
    _OURS
  )
