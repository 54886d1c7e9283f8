"""A file with one JSON object per line, each with its step.

A full disk neither stops the run nor leaves part of a line in the file. No step
is in the file twice, because a resumed run removes the steps that it repeats.
"""

import collections
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from data_pipelines.text import untrusted

_SECONDS_BETWEEN_WARNINGS = 60.0
_MAX_WAITING_LINES = 1000


class JsonLines:
  """Appends lines. A line that cannot be written waits for the next `append`.

  Attributes:
    failures: The number of failed writes.
    names: The fields of all rows, but for the step.
  """

  def __init__(self, path: pathlib.Path, *, resume_step: int | None) -> None:
    """Opens the file with the lines up to `resume_step`; None keeps no line."""
    self.names = _rewind(path, resume_step)
    # Unbuffered: a line is one write, so a kill cuts at most the last line.
    self._file = path.open("ab", buffering=0)
    self._size = os.fstat(self._file.fileno()).st_size
    self._waiting = collections.deque[bytes](maxlen=_MAX_WAITING_LINES)
    self.failures = 0

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes the row and all lines that wait, if the disk permits.

    JSON has no numbers that are not finite, so these become null.
    """
    numbers = {
      name: None if isinstance(x, float) and not math.isfinite(x) else x
      for name, x in row.items()
    }
    line = json.dumps(numbers, allow_nan=False).encode() + b"\n"
    self._waiting.append(line)
    self.names |= row.keys() - {"step"}
    try:
      while self._waiting:
        self._write(self._waiting[0])
        self._waiting.popleft()
    except OSError as error:
      self.failures += 1
      logging.log_every_n_seconds(
        logging.WARNING,
        "%s: %d lines wait to be written: %s",
        _SECONDS_BETWEEN_WARNINGS,
        *(self._file.name, len(self._waiting), error),
      )

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _write(self, line: bytes) -> None:
    """Writes a whole line, or raises OSError; the next call removes a part."""
    descriptor = self._file.fileno()
    if os.fstat(descriptor).st_size != self._size:
      os.ftruncate(descriptor, self._size)  # Part of a line that failed.
    num_written = self._file.write(line)
    if num_written != len(line):
      raise OSError(
        f"only {num_written} of {len(line)} bytes of a line could be written; "
        "is the disk full?"
      )
    self._size += len(line)


def read_rows(
  path: pathlib.Path | epath.Path,
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
  """Each line of the file and its row; None if the line is no row of a step.

  Others may have written into the file, and a kill cuts the last line short. A
  file that is missing or no regular file has no lines.
  """
  if not path.is_file():
    return
  with path.open("rb") as file:
    for line in file:
      try:
        row = untrusted.parse_json(line, "a line")
        untrusted.get_field(row, "step", int, "a line")
      except ValueError:
        row = None
      yield line, row if line.endswith(b"\n") else None


def _rewind(path: pathlib.Path, resume_step: int | None) -> set[str]:
  """Keeps complete rows up to `resume_step`, or none; returns their fields."""
  num_removed, first = 0, b""
  names: set[str] = set()
  # The rename is atomic: a kill before it leaves the file unchanged.
  temporary = path.with_name(f"{path.name}.tmp")
  with temporary.open("wb") as file:
    for line, row in read_rows(path) if resume_step is not None else ():
      if row is None:
        num_removed, first = num_removed + 1, first or line
      elif row["step"] <= resume_step:
        file.write(line)
        names |= row.keys()
    file.flush()
    os.fsync(file.fileno())
  if num_removed:
    logging.warning(
      "%s: removed %d lines that are not complete rows of a step, first: %s",
      *(
        path,
        num_removed,
        untrusted.shorten(first[:80].decode("utf-8", "replace")),
      ),
    )
  temporary.replace(path)
  return names - {"step"}
