"""Problems of any source as ArrayRecord files: writes and reads them.

Pictures keep their published bytes. Reading needs no TensorFlow and is much
faster than decoding.
"""

import hashlib
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from etils import epath
from tensorflow_datasets.core import (
  dataset_info,
  file_adapters,
  naming,
  splits,
)
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines import records, validation
from data_pipelines.storage import host_copy, objects
from data_pipelines.storage.paths import is_remote
from data_pipelines.text import untrusted

NAME, VERSION = "problems", "1.0.0"
MANIFEST = "manifest.json"
# TFDS would read and write the same bytes, three times as slowly. Generated on
# import, unknown to type checkers.
_messages: Any = tf_example_pb2
_SEQUENCES = ("images", "choices", "aliases")


def _features() -> tfds.features.FeaturesDict:
  """The stored type of each field of a problem."""
  text = tfds.features.Text()
  # Not tfds.features.Image, which would decode and encode again.
  picture = tfds.features.Tensor(shape=(), dtype=np.object_)
  others = {
    "images": tfds.features.Sequence(picture),
    "choices": tfds.features.Sequence(text),
    "aliases": tfds.features.Sequence(text),
    "precision": tfds.features.Scalar(dtype=np.int32),
  }
  return tfds.features.FeaturesDict(
    {name: others.get(name, text) for name in records.FIELDS}
  )


def encode(problem: records.Problem) -> bytes:
  """The bytes of a problem in a file; raises for one that cannot be stored."""
  example = _messages.Example()
  for name, value in records.to_example(problem).items():
    feature = example.features.feature[name]
    if name == "precision":
      feature.int64_list.value.append(np.int32(value))
      continue
    values = value if isinstance(value, list) else [value]
    feature.bytes_list.SetInParent()  # Also if it is empty.
    feature.bytes_list.value.extend(
      x.encode() if isinstance(x, str) else x for x in values
    )
  # Otherwise the order of the fields differs from process to process.
  return example.SerializeToString(deterministic=True)


def decode(example: bytes) -> records.Problem:
  """The problem that `encode` was given; raises for damaged bytes."""
  with records.all_faults():
    features = _messages.Example.FromString(example).features.feature
    fields = {name: features[name].bytes_list.value for name in records.FIELDS}
    fields["precision"] = features["precision"].int64_list.value
    for name in records.FIELDS:
      if name not in _SEQUENCES:
        (fields[name],) = fields[name]
    return records.from_example(fields)


class Scratch:
  """Encoded problems on disk, in a file that goes when it is closed."""

  def __init__(self, folder: str | os.PathLike[str]):
    self._file = tempfile.TemporaryFile(dir=folder)
    self._ends = [0]

  def __len__(self) -> int:
    return len(self._ends) - 1

  def append(self, example: bytes) -> int:
    """Adds an encoded problem, and returns its index."""
    self._file.write(example)
    self._ends.append(self._ends[-1] + len(example))
    return len(self) - 1

  def size(self, index: int) -> int:
    """Bytes of an encoded problem."""
    return self._ends[index + 1] - self._ends[index]

  def __getitem__(self, index: int) -> bytes:
    self._file.flush()
    return os.pread(self._file.fileno(), self.size(index), self._ends[index])

  def close(self) -> None:
    """Removes the file."""
    self._file.close()


def write_encoded(
  scratch: Scratch,
  places: Mapping[str, Iterable[tuple[str, int]]],
  data_dir: str | os.PathLike[str],
) -> None:
  """Writes the problems that `source(data_dir, split)` reads, one at a time.

  The files are those that TFDS would write, and TFDS reads them. For each split
  there are pids and indices in `scratch`; a hash of the pids is their order.
  """
  folder = pathlib.Path(data_dir) / NAME / VERSION
  folder.mkdir(parents=True)
  infos = []
  for split, pids in places.items():
    template = naming.ShardedFileTemplate(
      data_dir=epath.Path(folder),
      dataset_name=NAME,
      split=split,
      filetype_suffix="array_record",
    )
    # The order of TFDS's own writer, which would hold all in memory.
    ordered = sorted(
      (hashlib.md5(f"{split}{pid}".encode()).digest(), index)
      for pid, index in pids
    )
    indices = [index for _, index in ordered]
    infos.append(_write_split(scratch, indices, template))
  info = dataset_info.DatasetInfo(
    builder=dataset_info.DatasetIdentity(
      name=NAME,
      version=tfds.core.Version(VERSION),
      data_dir=os.fspath(folder),
      module_name=__name__,
    ),
    features=_features(),
  )
  info.set_file_format("array_record")
  info.set_splits(splits.SplitDict(infos))
  info.write_to_directory(folder)


def _write_split(
  scratch: Scratch, indices: Sequence[int], template: Any
) -> tfds.core.SplitInfo:
  """Writes the files of one split, and returns what TFDS must know of it."""
  count, num_bytes = len(indices), sum(map(scratch.size, indices))
  config = shard_utils.ShardConfig
  num_shards = config.calculate_number_shards(num_bytes, count)
  ends = shard_utils.get_shard_boundaries(count, num_shards)
  shards = [indices[x:y] for x, y in itertools.pairwise([0, *ends])]
  for number, shard in enumerate(shards):
    path = template.sharded_filepath(shard_index=number, num_shards=num_shards)
    examples = ((index, scratch[index]) for index in shard)
    file_adapters.ArrayRecordFileAdapter.write_examples(path, examples)
  return tfds.core.SplitInfo(
    name=template.split,
    shard_lengths=[len(shard) for shard in shards],
    num_bytes=num_bytes,
    filename_template=template,
  )


class Source:
  """The problems of one split by index, also in another process."""

  def __init__(self, paths: Sequence[pathlib.Path | str]):
    self.paths = [os.fspath(path) for path in paths]
    self._reader = array_record_data_source.ArrayRecordDataSource(self.paths)

  def __len__(self) -> int:
    return len(self._reader)

  def __getitem__(self, index: int, /) -> records.Problem:
    if not 0 <= index < len(self):
      raise IndexError(f"{index} is not in 0 .. {len(self) - 1}")
    with records.all_faults():
      example = self._reader[index]
    return decode(example)

  def __reduce__(self):
    return type(self), (self.paths,)


def on_this_host(
  data_dir: str | os.PathLike[str], *, what: str
) -> pathlib.Path:
  """The folder of a data dir; a bucket's files that prepare made are copied.

  Raises:
    FileNotFoundError: There is no manifest in the bucket's folder.
    ValueError: It is damaged, or cannot be read; see `host_copy`.
  """
  if not is_remote(data_dir):
    return pathlib.Path(data_dir)
  place = f"{os.fspath(data_dir)}/{MANIFEST}"
  if not objects.exists(place, what=what):
    raise FileNotFoundError(f"there is no {place}")
  manifest = untrusted.read_json(place)
  names = untrusted.get_field(manifest, "files", dict, place)
  return host_copy.host_copy(data_dir, what=what, names={*names, MANIFEST})


def sources(data_dir: str | os.PathLike[str]) -> dict[str, Source]:
  """Every split in the folder of a data dir, or in its subfolder."""
  files: dict[str, list[pathlib.Path]] = {}
  try:
    root = on_this_host(data_dir, what="data dir")
  except FileNotFoundError:
    return {}
  for folder in (root / NAME / VERSION, root):
    names = sorted(folder.glob(f"{NAME}-*.array_record-*"))
    for path in names if not files else ():
      files.setdefault(path.name.split("-")[1].split(".")[0], []).append(path)
  found = {}
  for split, paths in files.items():
    try:
      if not paths[-1].name.endswith(f"-of-{len(paths):05d}"):
        raise ValueError("some are missing")
      found[split] = Source(paths)
    except Exception as error:  # As for torn bytes, a folder or no access.
      if validation.is_machine_failure(error):
        raise
      text = (
        f"split ({split!r}) must have whole files, all of them, in "
        f"{paths[0].parent}: {error}; make them again with 'python -m "
        "data_pipelines.prepare'."
      )
      text = text.replace(str(root), os.fspath(data_dir))
      raise validation.SettingError(text) from error
  return found


def source(data_dir: str | os.PathLike[str], split: str) -> Source:
  """Random access to the problems of a split of a data dir."""
  found = require_sources(data_dir)
  if split not in found:
    raise ValueError(
      f"split ({split!r}) must be one of {sorted(found)} in "
      f"{os.fspath(data_dir)}; a split that got no problem is not written."
    )
  return found[split]


def read_all(source: Source) -> Iterator[records.Problem | records.BadRecord]:
  """Reads the problems of a split in order; a damaged one is its fault."""
  for index in range(len(source)):
    try:
      yield source[index]
    except records.BadRecord as error:
      yield error


def require_sources(data_dir: str | os.PathLike[str]) -> dict[str, Source]:
  """Every split of a data dir, of which there must be one."""
  found = sources(data_dir)
  if not found:
    raise ValueError(
      f"data dir ({os.fspath(data_dir)!r}) must hold prepared problems; make "
      "them with 'python -m data_pipelines.prepare'."
    )
  return found
