"""Several data sets as one, and the order in which their records are asked."""

import bisect
import dataclasses
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from data_pipelines import records
from data_pipelines.storage import paths

# Shares are whole numbers whose sum is at most this.
_MAX_PERIOD = 100_000
# The metrics `eval/accuracy/...` of types of problems have these names.
_TAKEN = (*records.QUESTION_TYPES, *records.ANSWER_TYPES)


class Mixture:
  """The problems of several sources, one source after another.

  Two sets may have the same pids, so a pid starts with the name of its set, as
  in "geo/12"; metadata name it as `data_set`. `sets` holds each set's indices.
  """

  def __init__(
    self, sources: Mapping[str, records.Source], counts: Mapping[str, int] = {}
  ):
    """Takes the first `counts` problems of a source, or all of them."""
    self.sources = sources
    sizes = [counts.get(name, len(each)) for name, each in sources.items()]
    ends = self._ends = list(itertools.accumulate(sizes))
    self.sets = {
      name: range(end - size, end)
      for name, size, end in zip(sources, sizes, ends, strict=True)
    }

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int, /) -> records.Problem:
    if not 0 <= index < len(self):
      raise IndexError(f"{index} is not in 0 .. {len(self) - 1}")
    name = list(self.sets)[bisect.bisect_right(self._ends, index)]
    return _rename(self.sources[name][index - self.sets[name].start], name)


def _rename(problem: records.Problem, name: str) -> records.Problem:
  """The problem as one of a mixture."""
  metadata = {**problem.metadata, "data_set": name}
  pid = f"{name}/{problem.pid}"
  return dataclasses.replace(problem, pid=pid, metadata=metadata)


def first(problems: records.Source, count: int) -> records.Source:
  """The problems; at most `count` of a mixture, as equally as sizes allow."""
  if not isinstance(problems, Mixture):
    return problems
  sets, counts = problems.sets, dict[str, int]()
  # The smallest sets first, so that the others share what these leave over.
  for name in sorted(sets, key=lambda name: len(sets[name])):
    fair = (count - sum(counts.values())) // (len(sets) - len(counts))
    counts[name] = min(len(sets[name]), fair)
  return Mixture(problems.sources, counts)


class Order:
  """Which data set each position of an endless mixture asks, and for what.

  In any prefix of n positions each set has been asked its share of n, up to
  less than one; `grain.MapDataset.mix` rounds the shares.

  References:
    Balinski and Young, The Quota Method of Apportionment, 1975
  """

  def __init__(self, shares: Sequence[int]):
    self._shares, self._period = tuple(shares), list[tuple[int, int]]()
    total, asked = sum(shares), [0] * len(shares)
    for position in range(total):
      # A set's next turn comes before `(asked + 1) * total / share`. Of those
      # that would not get ahead by one, the first to be late goes first.
      _, number = min(
        (-(-(count + 1) * total // share), number)
        for number, (count, share) in enumerate(zip(asked, shares, strict=True))
        if count * total < share * (position + 1)
      )
      self._period.append((number, asked[number]))
      asked[number] += 1

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, position: int) -> tuple[int, int]:
    """The number of the data set, and how often it has been asked before."""
    periods, rest = divmod(position, len(self._period))
    number, asked = self._period[rest]
    return number, periods * self._shares[number] + asked


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
  """The smallest whole numbers in the ratio of positive weights; none is 0."""
  exact = np.array(weights, np.float64) / max(weights)
  exact /= exact.sum()
  periods = np.arange(1, _MAX_PERIOD + 1)[:, None]
  shares = np.maximum(np.rint(exact * periods), 1)
  # A third as written in a config has 16 digits.
  errors = np.abs(shares - exact * periods).max(axis=1)
  fits = np.flatnonzero(errors < 1e-9 * periods[:, 0])
  best = fits[0] if fits.size else _MAX_PERIOD - 1
  return tuple(shares[best].astype(int).tolist())


def names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
  """A name for each folder: its last part as one word, made unique."""
  found: list[str] = []
  for folder in folders:
    last = pathlib.Path(os.path.abspath(folder)).name
    base = re.sub(r"[^\w.-]+", "_", last) or "data"
    numbered = (f"{base}-{number}" for number in itertools.count(2))
    candidates = itertools.chain([base], numbered)
    found.append(next(x for x in candidates if x not in (*_TAKEN, *found)))
  return found


def problems_by_pid(
  data_dirs: str | os.PathLike[str], pids: Collection[str]
) -> dict[str, records.Problem]:
  """Reads the problems of some pids from a run's data dirs, DIR or DIR,DIR.

  Damaged records are left out.
  """
  # Slow to import, and the settings need the names alone.
  from data_pipelines.sources import stored

  named = os.fspath(data_dirs)
  parts = [named] if os.path.isdir(named) else named.split(",")
  folders = [paths.to_path("data_dir", part) for part in parts]
  found = {}
  for name, folder in zip(names(folders), folders, strict=True):
    splits = stored.require_sources(folder).values()
    for each in itertools.chain.from_iterable(map(stored.read_all, splits)):
      if isinstance(each, records.Problem):
        each = _rename(each, name) if len(folders) > 1 else each
        found |= {each.pid: each} if each.pid in pids else {}
  return found
