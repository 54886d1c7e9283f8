"""Several data sets as one, and the order in which their records are asked.

Knows nothing of prompts or batches.
"""

import bisect
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from data_pipelines import records, validation
from data_pipelines.sources import stored

# Shares are whole numbers whose sum is at most this.
_MAX_PERIOD = 100_000
# The metrics `eval/accuracy/...` of types of problems have these names.
_TAKEN = (*records.QUESTION_TYPES, *records.ANSWER_TYPES)


class Mixture:
  """The problems of several sources, one source after another.

  A problem's pid starts with the name of its data set, as in "geo/12", because
  two sets may have the same pids. Its metadata name it as `data_set`.

  Attributes:
    sets: The indices of each data set's problems, by its name.
  """

  def __init__(self, sources: Mapping[str, records.Source]):
    self._sources = dict(sources)
    ends = np.cumsum([len(source) for source in sources.values()]).tolist()
    self._ends = ends
    self.sets = {
      name: range(start, end)
      for name, start, end in zip(sources, [0, *ends], ends, strict=False)
    }

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int, /) -> records.Problem:
    if not 0 <= index < len(self):
      raise IndexError(f"{index} is not in 0 .. {len(self) - 1}")
    name = list(self.sets)[bisect.bisect_right(self._ends, index)]
    return _rename(self._sources[name][index - self.sets[name].start], name)

  def first(self, count: int) -> "Mixture":
    """At most `count` problems, as many of each set as its size allows."""
    taken = dict.fromkeys(self._sources, 0)
    # The smallest sets first, so that the others share what these leave over.
    by_size = sorted(self.sets, key=lambda name: len(self.sets[name]))
    for number, name in enumerate(by_size):
      rest = count - sum(taken.values())
      fair = rest // (len(by_size) - number)
      taken[name] = min(len(self.sets[name]), fair)
    return Mixture(
      {name: _First(self._sources[name], x) for name, x in taken.items() if x}
    )


def _rename(problem: records.Problem, name: str) -> records.Problem:
  """The problem as one of a mixture."""
  metadata = {**problem.metadata, "data_set": name}
  pid = f"{name}/{problem.pid}"
  return dataclasses.replace(problem, pid=pid, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class _First:
  """The first problems of a source."""

  source: records.Source
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int, /) -> records.Problem:
    return self.source[index]


def first(problems: records.Source, count: int) -> records.Source:
  """The first `count` problems of a source, or a fair part of a mixture."""
  if isinstance(problems, Mixture):
    return problems.first(count)
  return problems


class Order:
  """Which data set each position of an endless mixture asks, and for what.

  The map of `grain.MapDataset.select_from_datasets`. In any prefix of n
  positions, each set has been asked its share of n, up to less than one.
  `MapDataset.mix` rounds the shares (0.7 and 0.3 to 233 and 100 of 333), and
  with three sets and more a set may be further behind.

  References:
    Balinski and Young, The Quota Method of Apportionment, 1975
  """

  def __init__(self, shares: Sequence[int]):
    """Shares are whole numbers; the order repeats after their sum."""
    self._shares = tuple(shares)
    self._sets, self._earlier = zip(*_quota_order(shares), strict=True)

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, position: int) -> tuple[int, int]:
    """The number of the data set, and how often it has been asked before."""
    period, rest = divmod(position, len(self._sets))
    number = self._sets[rest]
    return number, period * self._shares[number] + self._earlier[rest]


def _quota_order(shares: Sequence[int]) -> Iterator[tuple[int, int]]:
  """One period: each position's set, and how often it was asked before.

  Of the sets that would not get ahead by one, that goes first which would be
  the first to fall behind by one.
  """
  total = sum(shares)
  asked = [0] * len(shares)
  for position in range(total):
    # Once more is due after `asked * total / share` positions, and late at the
    # end of the next such span.
    _, number = min(
      (-(-(count + 1) * total // share), number)
      for number, (count, share) in enumerate(zip(asked, shares, strict=True))
      if count * total < share * (position + 1)
    )
    yield number, asked[number]
    asked[number] += 1


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
  """The smallest whole numbers in the ratio of positive weights.

  Ratios that need a sum above 100,000 are rounded to it; no share becomes 0.
  """
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
  """A name for each folder: its last part, made unique.

  It is one word, fit for the name of a metric.
  """
  found: list[str] = []
  for folder in folders:
    last = pathlib.Path(os.path.abspath(folder)).name
    name = base = re.sub(r"[^\w.-]+", "_", last) or "data"
    number = 1
    while name in (*_TAKEN, *found):
      number += 1
      name = f"{base}-{number}"
    found.append(name)
  return found


def problems_by_pid(
  data_dirs: str | os.PathLike[str], pids: Collection[str]
) -> dict[str, records.Problem]:
  """Reads the problems of some pids from all splits of a run's data dirs.

  Args:
    data_dirs: A data dir, or those of a mixture with commas between them.
    pids: As in the run.

  Raises:
    ValueError: A folder holds no prepared problems.
  """
  named = os.fspath(data_dirs)
  parts = [named] if os.path.isdir(named) else named.split(",")
  folders = [validation.to_path("data_dir", part) for part in parts]
  if len(folders) == 1:
    return stored.problems_by_pid(folders[0], pids)
  problems = {}
  for name, folder in zip(names(folders), folders, strict=True):
    own = {x.removeprefix(f"{name}/") for x in pids if x.startswith(f"{name}/")}
    for problem in stored.problems_by_pid(folder, own).values():
      renamed = _rename(problem, name)
      problems[renamed.pid] = renamed
  return problems
