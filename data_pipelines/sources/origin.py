"""The request for a data dir, and its origin: drawn problems or files."""

import dataclasses
import functools
import itertools
from collections.abc import Container, Mapping
from dataclasses import field
from typing import NamedTuple

from absl import logging

from data_pipelines import validation
from data_pipelines.sources import files
from data_pipelines.sources.drawn import reasoning_gym, synthetic
from data_pipelines.sources.rows import columns
from data_pipelines.storage import paths
from data_pipelines.validation import at_least, interval, one_of

SYNTHETIC = "synthetic"
_UNCHECKED, _NEAR = ("reject", "keep"), ("exact", "perceptual", "none")
# What `--source` is: drawn problems, a path, or one for each of our splits.
type Source = synthetic.Spec | reasoning_gym.Spec | str | Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Request:
  """The source and the contents of a data dir.

  The flags of `data_pipelines.prepare` of the same names say what they mean.
  """

  source: Source
  data_dir: str
  seed: int = field(metadata=at_least(0))
  eval_fraction: float = field(metadata=interval("[0, 1]", 0.2))
  vocab_size: int
  max_reject_fraction: float = field(metadata=interval("[0, 1)", 0.01))
  columns: Mapping[str, str] = field(default_factory=dict)
  unchecked_answers: str = field(default="reject", metadata=one_of(_UNCHECKED))
  tolerance: float | None = field(
    default=None, metadata=interval("[0, 1)", 0.05)
  )
  split: tuple[str, ...] = ()
  near_duplicates: str = field(default="exact", metadata=one_of(_NEAR))
  exclude: tuple[str, ...] = ()

  def __post_init__(self):
    with validation.user_errors():
      validation.check_fields(self)
      paths.to_path("data_dir", self.data_dir)
      if isinstance(self.source, str):
        paths.to_path("source", self.source)


class Origin(NamedTuple):
  """An opened source."""

  name: str  # In words.
  # Splits of several paths have names that begin with ours, as "train/val".
  readers: files.Readers
  parts: list[list[str]]  # The splits of each path, which have equal columns.
  files: dict[str, str]  # The hash of each file's content.
  counts: dict[str, int] = {}  # The records of each split where that is known.


def open_source(source: Source) -> Origin:
  """Opens a source without reading its records."""
  if isinstance(source, synthetic.Spec):
    draw = functools.cache(lambda: list(synthetic.problems(source)))
    counts = {SYNTHETIC: source.num_problems}
    return Origin(SYNTHETIC, {SYNTHETIC: draw}, [], {}, counts)
  if isinstance(source, reasoning_gym.Spec):
    draw = functools.partial(reasoning_gym.problems, source)
    return Origin(str(source), {"": draw}, [], {}, {"": source.num_problems})
  if isinstance(source, str):
    folder = files.find(source)
    parts = [list(folder.readers)]
    return Origin(source, folder.readers, parts, folder.files, folder.counts)
  readers, parts, hashes, counts = {}, [], {}, {}
  for ours, path in source.items():
    folder = files.find(path)
    chosen = _matching(ours, list(folder.readers))
    keys = {name: f"{ours}/{name}".rstrip("/") for name in chosen}
    parts.append(list(keys.values()))
    readers |= {key: folder.readers[name] for name, key in keys.items()}
    counts |= {keys[x]: n for x, n in folder.counts.items() if x in keys}
    hashes |= {f"{ours}/{name}": each for name, each in folder.files.items()}
  name = ",".join(f"{ours}={path}" for ours, path in source.items())
  return Origin(name, readers, parts, hashes, counts)


def _matching(ours: str, names: list[str]) -> list[str]:
  """The splits at a path that is given for one of ours; all if no name fits."""
  if len(names) > 1:
    similar = {"eval": ("validation", "valid", "val", "dev")}.get(ours, ())
    for name in (ours, *similar):
      if name in names:
        logging.info("Of the source for %s, the split %r is read.", ours, name)
        return [name]
  return names


def choose_columns(
  origin: Origin, given: Mapping[str, str], used: Container[str]
) -> dict[str, columns.Columns]:
  """The columns of each used split, by the first rows, if it holds rows."""
  chosen: dict[str, columns.Columns] = {}
  for part in origin.parts:
    names = [name for name in part if name in used]
    firsts = (
      itertools.islice(origin.readers[name](), max(1, 100 // len(names)))
      for name in names
    )
    records = itertools.chain.from_iterable(firsts)
    if rows := [raw.values for raw in records if isinstance(raw, files.Row)]:
      found = columns.choose(rows, given)
      logging.info("%s", found.described)
      chosen |= dict.fromkeys(names, found)
  return chosen
