"""Problems of any source as ArrayRecord files: writes and reads them.

Pictures keep their published bytes. Reading needs no TensorFlow and is much
faster than decoding.
"""

import contextlib
import functools
import io
import os
import pathlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_data_source

from data_pipelines import records, validation
from data_pipelines.validation import printable


def check_storable(problem: records.Problem) -> None:
  """Raises for a problem that `write` cannot write."""
  _features().serialize_example(records.to_example(problem))


@functools.cache
def _features() -> tfds.features.FeaturesDict:
  """The stored type of each field of a problem."""
  text = tfds.features.Text()
  others = {
    # Not tfds.features.Image, which would decode and encode again.
    "images": tfds.features.Sequence(
      tfds.features.Tensor(shape=(), dtype=np.object_)
    ),
    "choices": tfds.features.Sequence(text),
    "aliases": tfds.features.Sequence(text),
    "precision": tfds.features.Scalar(dtype=np.int32),
  }
  return tfds.features.FeaturesDict(
    {name: others.get(name, text) for name in records.FIELDS}
  )


class Problems(tfds.core.GeneratorBasedBuilder):
  """Problems as a TFDS data set."""

  name = "problems"
  VERSION = tfds.core.Version("1.0.0")
  # Otherwise TFDS looks for checksums beside this file, with a package that it
  # does not install.
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
  """Writes the problems that `source(data_dir, split)` reads.

  Args:
    problems: By split, each with at least one problem and read once. Their
      order on disk follows a hash of their pids.
    data_dir: An empty or new folder.
  """
  builder = Problems(problems=problems, data_dir=os.fspath(data_dir))
  scratch = pathlib.Path(data_dir) / "downloads"
  tfds.disable_progress_bar()
  verbosity = logging.get_verbosity()
  logging.set_verbosity(min(verbosity, logging.WARNING))
  try:
    # TFDS prints to stdout, which belongs to the caller.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(
        download_dir=os.fspath(scratch),
        # Otherwise TFDS asks the network for a published copy.
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  except OSError:
    raise
  except Exception as error:  # Its message may hold a whole picture.
    why = f"{type(error).__name__}: {printable(str(error)[:200])}"
    raise RuntimeError(f"cannot write the problems: {why}") from None
  finally:
    logging.set_verbosity(verbosity)
  for folder in (scratch / "extracted", scratch):
    if folder.is_dir():
      folder.rmdir()


class Source:
  """The problems of one split by index.

  A source can be sent to a worker process, which opens the files again.
  """

  def __init__(self, paths: Sequence[pathlib.Path]):
    self.paths = [os.fspath(path) for path in paths]
    self._open()
    self._length = len(self._reader)

  def _open(self) -> None:
    self._reader = array_record_data_source.ArrayRecordDataSource(self.paths)
    self._features = _features()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int, /) -> records.Problem:
    if not 0 <= index < self._length:
      raise IndexError(f"{index} is not in 0 .. {self._length - 1}")
    # TFDS raises many kinds of errors for a damaged or foreign example.
    with records.all_faults():
      example: Any = self._features.deserialize_example_np(self._reader[index])
      return records.from_example(example)

  def __getstate__(self) -> dict[str, Any]:
    return {"paths": self.paths, "_length": self._length}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()


def sources(data_dir: str | os.PathLike[str]) -> dict[str, Source]:
  """Every split in the folder that `write` was given, or in its subfolder.

  Raises:
    SettingError: A file of a split is missing or damaged.
  """
  root = pathlib.Path(data_dir)
  files: dict[str, list[pathlib.Path]] = {}
  for folder in (root / Problems.name / str(Problems.VERSION), root):
    found = sorted(folder.glob(f"{Problems.name}-*.array_record-*"))
    for path in found if not files else ():
      files.setdefault(path.name.split("-")[1].split(".")[0], []).append(path)
  for split, paths in files.items():
    if not paths[-1].name.endswith(f"-of-{len(paths):05d}"):
      raise validation.SettingError(
        f"split ({split!r}) must have all its files in {paths[0].parent}, but "
        "some are missing; make them again with 'python -m "
        "data_pipelines.prepare'."
      )
  return {split: _open_source(split, files[split]) for split in files}


def _open_source(split: str, paths: Sequence[pathlib.Path]) -> Source:
  try:
    return Source(paths)
  except Exception as error:  # As for torn bytes, a folder or no access.
    if validation.is_machine_failure(error):
      raise
    raise validation.SettingError(
      f"split ({split!r}) must have whole files in {paths[0].parent}: {error}; "
      "make them again with 'python -m data_pipelines.prepare'."
    ) from error


def source(data_dir: str | os.PathLike[str], split: str) -> Source:
  """Random access to the problems of a split that `write` wrote.

  Raises:
    ValueError: No problems have been written there, or no such split.
  """
  found = _require_sources(data_dir)
  if split not in found:
    raise ValueError(
      f"split ({split!r}) must be one of {sorted(found)} in "
      f"{os.fspath(data_dir)}; a split that got no problem is not written."
    )
  return found[split]


def problems_by_pid(
  data_dir: str | os.PathLike[str], pids: Container[str]
) -> dict[str, records.Problem]:
  """Reads the problems of some pids from all splits, except damaged records.

  Raises:
    ValueError: No problems have been written there.
  """
  problems = {}
  for split in _require_sources(data_dir).values():
    for index in range(len(split)):
      with contextlib.suppress(ValueError, OSError):
        if (problem := split[index]).pid in pids:
          problems[problem.pid] = problem
  return problems


def _require_sources(data_dir: str | os.PathLike[str]) -> dict[str, Source]:
  found = sources(data_dir)
  if not found:
    raise ValueError(
      f"data dir ({os.fspath(data_dir)!r}) must hold prepared problems; make "
      "them with 'python -m data_pipelines.prepare'."
    )
  return found
