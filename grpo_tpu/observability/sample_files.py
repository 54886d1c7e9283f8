"""The completions of a run: a parquet file for each logged step.

A file is put whole, by a background thread, so that no step waits for it.
"""

import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.storage import paths
from data_pipelines.text import tables
from grpo_tpu.observability import background

COLUMNS: dict[str, str] = tables.read(__package__, "sample_files.toml")


@dataclasses.dataclass(frozen=True)
class Sample:
  """A completion for people to read."""

  columns: dict[str, Any]  # Its values of `COLUMNS` and of each reward.
  question: str | None = None  # Without one, TensorBoard does not show it.
  image: np.ndarray | None = None  # uint8 [H, W, 3], for TensorBoard.


class SampleFiles(background.Background):
  """The files `step_00000010.parquet` in one folder."""

  def __init__(self, folder: pathlib.Path, *, resume_step: int | None) -> None:
    """Makes the folder and removes later steps; all of them for None."""
    super().__init__(f"Samples in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    kept = "" if resume_step is None else _name(resume_step)
    for path in folder.glob("step_*.parquet"):
      if path.name > kept:
        path.unlink()
    for path in folder.glob(".step_*.tmp"):  # A kill cut its writing short.
      path.unlink()
    self._folder = folder

  def write(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Starts to write a step's rows, once the file before is written."""
    self.flush()
    rows = [{"step": step, **row} for row in rows]
    self.submit(write_rows, self._folder / _name(step), rows)


def write_rows(
  path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]
) -> None:
  """Writes or replaces a parquet file of rows with the same columns."""
  import pyarrow as pa  # Imported here: a run starts without it.
  from pyarrow import parquet

  names = []
  for name in COLUMNS:
    names += [name] * (name in rows[0])
    if name == "reward":
      names += [x for x in rows[0] if x.startswith("reward/")]
  columns = {}
  for name in names:
    kind = pa.type_for_alias(COLUMNS.get(name, "float32"))
    values = [_encodable(row[name]) for row in rows]
    columns[name] = pa.array(values, kind)
  file = io.BytesIO()
  parquet.write_table(pa.table(columns), file, compression="zstd")
  paths.write_whole(path, file.getvalue())


def _name(step: int) -> str:
  return f"step_{step:08}.parquet"


def _encodable(value: Any) -> Any:
  """The value; in a text, escapes stand for what UTF-8 cannot encode."""
  if isinstance(value, str):
    return value.encode("utf-8", "backslashreplace").decode()
  return value
