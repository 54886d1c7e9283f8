"""MathVista's files: reads the parquet snapshot, writes and reads ArrayRecord.

Images keep their published bytes. The ArrayRecord files hold problems of any
source; reading them needs no TensorFlow and is much faster than decoding.

References:
  The snapshot: https://huggingface.co/datasets/AI4Math/MathVista
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from data_pipelines import records, tables, validation

# Values of `metadata.source`; MathVista's terms cover all of them.
SOURCES = frozenset(
  tables.read("data_pipelines.sources", "mathvista.toml")["sources"]
)


def is_original(metadata: Mapping[str, Any]) -> bool:
  """True for a record that looks like MathVista's, whose terms forbid training.

  Its `source` and its `split` must be MathVista's: the training split of
  Geometry3K belongs to Geometry3K.
  """
  split = metadata.get("split") or "testmini"
  return metadata.get("source") in SOURCES and split in ("testmini", "test")


def terms(num_original: int, num_problems: int) -> str:
  """The terms that forbid training on such a mixture: "mathvista", or "".

  More than one original in twenty is enough. Fewer prove nothing, because other
  data sets in this schema may use the same sources.
  """
  return "mathvista" if 20 * num_original > num_problems else ""


def shards(folder: epath.PathLike) -> dict[str, list[epath.Path]]:
  """The snapshot's parquet files by split, each in order; {} without any.

  The split is the part of the file name before the first dash. The files lie in
  the folder itself or in `data/` under it, locally or on gs://.

  Raises:
    SettingError: A file of a split is missing.
  """
  root = epath.Path(folder)
  found: dict[str, list[epath.Path]] = {}
  for parent in (root, root / "data"):
    for path in sorted(parent.glob("*-*.parquet")) if not found else ():
      found.setdefault(path.name.partition("-")[0], []).append(path)
  for paths in found.values():
    # A name without a count, such as train-all.parquet, cannot be checked.
    counts = [re.search(r"-of-(\d+)\b", path.name) for path in paths]
    if any(count and int(count[1]) != len(paths) for count in counts):
      raise validation.SettingError(
        f"source ({os.fspath(folder)!r}) must have all files of a split, but "
        f"not all those that belong to {paths[0].name} are there, or there is "
        "another set; fetch it again into an empty folder."
      )
  return found


def rows(
  paths: Iterable[epath.Path],
) -> Iterator[dict[str, Any] | records.BadRecord]:
  """The rows of the files, in order, for `records.from_row`.

  Columns that no problem has are not read.

  Raises:
    SettingError: A file is damaged or no parquet file.
  """
  import pyarrow as pa  # Imported here: ArrayRecord does not need it.
  import pyarrow.parquet as pq

  for path in paths:
    try:
      # Arrow cannot open a remote path, so the file is read whole.
      remote = "://" in os.fspath(path)
      content = pa.BufferReader(path.read_bytes()) if remote else path
      with pq.ParquetFile(content) as file:
        columns = [x for x in file.schema_arrow.names if x in records.COLUMNS]
        # Few rows at a time: each carries a whole image.
        for batch in file.iter_batches(batch_size=64, columns=columns):
          yield from _batch_rows(batch)
    except Exception as error:  # Damaged bytes raise nearly every kind.
      if validation.is_machine_failure(error):
        raise
      raise validation.SettingError(
        f"source file ({path}) must be a whole parquet file: {error}; fetch it "
        "again."
      ) from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | records.BadRecord]:
  """The rows of an Arrow batch, with a BadRecord for each that is damaged."""
  try:
    yield from batch.to_pylist()
  except (ArithmeticError, ValueError):  # A text that is no UTF-8, a date.
    for index in range(batch.num_rows):
      try:
        with records.all_faults():
          row = batch.slice(index, 1).to_pylist()[0]
      except records.BadRecord as error:
        row = error
      yield row
