"""MathVista's files: the parquet snapshot in, ArrayRecord out and back again.

The builder keeps each picture's published bytes, and serves any source of
problems. Reading needs no TensorFlow and costs far less than decoding does.

References:
  The snapshot: https://huggingface.co/datasets/AI4Math/MathVista
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from data_pipelines import records

# As they stand in `metadata.source`; MathVista's terms cover all of them.
SOURCES = frozenset(
  {
    "A-OKVQA",
    "AI2D",
    "CLEVR-Math",
    "ChartQA",
    "DVQA",
    "DocVQA",
    "FigureQA",
    "FunctionQA",
    "GEOS",
    "GeoQA+",
    "Geometry3K",
    "IQTest",
    "IconQA",
    "KVQA",
    "MapQA",
    "PMC-VQA",
    "PaperQA",
    "ParsVQA-Caps",
    "PlotQA",
    "SciBench",
    "ScienceQA",
    "Super-CLEVR",
    "TQA",
    "TabMWP",
    "TextVQA",
    "TheoremQA",
    "UniGeo",
    "VQA-AS",
    "VQA-RAD",
    "VQA2.0",
    "VizWiz",
  }
)


class SnapshotError(ValueError):
  """A folder that holds no snapshot, or a damaged one."""


def terms(problems_per_source: Mapping[str, int]) -> str:
  """Whose terms forbid to train on such a mixture: "mathvista", or "".

  Args:
    problems_per_source: How many problems name each `metadata.source`.
  """
  theirs = sum(
    count for source, count in problems_per_source.items() if source in SOURCES
  )
  return "mathvista" if 2 * theirs > sum(problems_per_source.values()) else ""


def shards(folder: str | os.PathLike[str]) -> dict[str, list[pathlib.Path]]:
  """The snapshot's parquet files by split, each in order.

  They are known by what stands before the first dash, `testmini-*.parquet`,
  never by the hash at the end; in the folder itself or in `data/` under it.

  Raises:
    SnapshotError: There are none.
  """
  root = pathlib.Path(folder)
  for place in (root, root / "data"):
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted(place.glob("*-*.parquet")):
      found.setdefault(path.name.partition("-")[0], []).append(path)
    if found:
      return found
  raise SnapshotError(
    f"source ({os.fspath(folder)!r}) must be a folder with files such as "
    "testmini-*.parquet, itself or in its data/; get one with "
    "'hf download AI4Math/MathVista --repo-type dataset --local-dir DIR'."
  )


def rows(paths: Iterable[pathlib.Path]) -> Iterator[dict[str, Any]]:
  """The rows of the files, in order, for `records.from_row`.

  Raises:
    SnapshotError: A file is damaged or no parquet file.
  """
  import pyarrow as pa  # Here, for reading ArrayRecord goes without.
  import pyarrow.parquet as pq

  for path in paths:
    try:
      with pq.ParquetFile(path) as file:
        # Few at a time: a row carries a whole picture.
        for batch in file.iter_batches(batch_size=64):
          yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
      raise SnapshotError(
        f"source file ({path}) must be a whole parquet file: {error}; fetch it "
        "again."
      ) from error


def _features() -> tfds.features.FeaturesDict:
  """How each field of a problem is stored; all but three are text."""
  text = tfds.features.Text()
  others = {
    # Not tfds.features.Image, which would decode and encode anew.
    "image_bytes": tfds.features.Tensor(shape=(), dtype=np.object_),
    "choices": tfds.features.Sequence(text),
    "precision": tfds.features.Scalar(dtype=np.int32),
  }
  return tfds.features.FeaturesDict(
    {name: others.get(name, text) for name in records.FIELDS}
  )


class MathVista(tfds.core.GeneratorBasedBuilder):
  """Problems in MathVista's schema as a TFDS data set."""

  name = "mathvista"
  VERSION = tfds.core.Version("1.0.0")
  # TFDS would look beside this file for checksums of downloads, by way of a
  # package that it does not install.
  code_path = None

  def __init__(
    self, *, problems: Mapping[str, Iterable[records.Problem]], data_dir: str
  ):
    self._problems = problems
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, features=_features())

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in self._problems}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, Any]]:
    for problem in self._problems[split]:
      yield problem.pid, records.to_example(problem)


def write(
  problems: Mapping[str, Iterable[records.Problem]],
  data_dir: str | os.PathLike[str],
) -> None:
  """Makes `source(data_dir, split)` yield the problems of each split.

  Args:
    problems: By split, each with at least one problem and read once. Their
      order on disk is that of a hash of their pids.
    data_dir: An empty or new folder.
  """
  builder = MathVista(problems=problems, data_dir=os.fspath(data_dir))
  scratch = pathlib.Path(data_dir) / "downloads"
  tfds.disable_progress_bar()
  # TFDS announces itself on stdout, which belongs to the caller.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_dir=os.fspath(scratch),
      # It would ask the network whether Google has the data set already.
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
  for folder in (scratch / "extracted", scratch):
    if folder.is_dir():
      folder.rmdir()


class Source:
  """The problems of one split by index.

  Files are opened where they are first read, so that a source can be sent to
  a worker process.
  """

  def __init__(self, paths: Sequence[pathlib.Path]):
    self._paths = [os.fspath(path) for path in paths]
    self._open()
    self._length = len(self._reader)

  def _open(self) -> None:
    self._reader = array_record_data_source.ArrayRecordDataSource(self._paths)
    self._features = _features()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int, /) -> records.Problem:
    if not 0 <= index < self._length:
      raise IndexError(f"{index} is not in 0 .. {self._length - 1}")
    example: Any = self._features.deserialize_example_np(self._reader[index])
    return records.from_example(example)

  def __getstate__(self) -> dict[str, Any]:
    return {"_paths": self._paths, "_length": self._length}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __repr__(self) -> str:
    return f"Source({self._paths})"


def source(data_dir: str | os.PathLike[str], split: str) -> Source:
  """Random access to the problems that `write` wrote.

  Raises:
    ValueError: Nothing has been written there, or no such split.
  """
  folder = pathlib.Path(data_dir) / MathVista.name / str(MathVista.VERSION)
  files: dict[str, list[pathlib.Path]] = {}
  for path in sorted(folder.glob(f"{MathVista.name}-*.array_record-*")):
    files.setdefault(path.name.split("-")[1].split(".")[0], []).append(path)
  if not files:
    raise ValueError(
      f"data dir ({os.fspath(data_dir)!r}) must hold prepared problems; make "
      "them with 'python -m data_pipelines.prepare'."
    )
  if split not in files:
    raise ValueError(
      f"split ({split!r}) must be one of {sorted(files)} in "
      f"{os.fspath(data_dir)}; a split that got no problem is not written."
    )
  paths = files[split]
  if not paths[-1].name.endswith(f"-of-{len(paths):05d}"):
    raise ValueError(
      f"split ({split!r}) must have all its files in {folder}; some are "
      "missing, so make them again with 'python -m data_pipelines.prepare'."
    )
  return Source(paths)
