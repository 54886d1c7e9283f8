"""Logs for a terminal, which would obey control characters in quoted data."""

import os
import sys
import traceback
from typing import Any

from absl import logging

from data_pipelines.validation import printable

# Lines that TensorFlow would print when it is imported.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


class PrintableFormatter(logging.PythonFormatter):
  """Formats a record, and the exception in it, with visible escapes."""

  def format(self, record) -> str:
    """The line of the log."""
    return printable(super().format(record), keep="\n\t")


def set_up() -> None:
  """Escapes what the program logs; silences TensorFlow, if called before it."""
  logging.get_absl_handler().setFormatter(PrintableFormatter())
  sys.excepthook = _show_error
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)


def _show_error(*error: Any) -> None:
  text = "".join(traceback.format_exception(*error))
  sys.stderr.write(printable(text, keep="\n\t"))
