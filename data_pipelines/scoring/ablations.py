"""The same questions with pictures that cannot answer them.

Each ablation is a source of as many problems, alike in all but the picture. A
policy that does as well on it has not looked. Knows nothing of prompts: where
there was a picture there still is one, so that a prompt keeps its layout.
"""

import dataclasses
import io

import numpy as np
from PIL import Image

from data_pipelines import images, records

KINDS = ("removed", "shuffled")

_GREY = (128, 128, 128)


def source(
  kind: str, problems: records.Source, *, num_problems: int, seed: int
) -> records.Source:
  """The problems with other pictures.

  Args:
    kind: "removed" puts a plain grey picture of the same shape in the place
      of each; "shuffled" gives each problem the picture of another one, and
      each picture that can be read to one problem.
    problems: The real ones.
    num_problems: The first so many are shuffled among each other.
    seed: Of the shuffle, which depends on nothing else but the pictures.

  Raises:
    ValueError: No such kind, or the pictures cannot be shuffled so that every
      problem gets another one.
  """
  if kind == "removed":
    return _Removed(problems)
  if kind == "shuffled":
    count = min(num_problems, len(problems))
    return _Shuffled(problems, _givers(problems, count, seed))
  raise ValueError(f"eval.ablations ({kind!r}) must be among {KINDS}.")


def derangement(keys: list[str], seed: int) -> np.ndarray:
  """A permutation that takes no element to one of the same key.

  Equal keys are laid side by side in a random order of keys, and everything
  moves on by the length of the longest run: out of each run, and not around
  into it again as long as no run is longer than half.

  Args:
    keys: What must change, of each element.
    seed: Of the order.

  Returns:
    int64 [len(keys)]: from where each place takes its element.

  Raises:
    ValueError: More than half of the keys are the same, or there are none.
  """
  names, run = np.unique(np.array(keys, str), return_inverse=True)
  longest = int(np.bincount(run).max()) if len(names) else 1
  if 2 * longest > len(keys):
    raise ValueError(
      f"eval.ablations ('shuffled') must have another picture for each problem,"
      f" but {longest} of {len(keys)} show the same one; leave 'shuffled' out, "
      "or raise eval.num_problems."
    )
  ranks = np.random.default_rng(seed).permutation(len(names))
  order = np.argsort(ranks[run], kind="stable")
  givers = np.empty(len(keys), np.int64)
  givers[order] = np.roll(order, -longest)
  return givers


def _givers(problems: records.Source, count: int, seed: int) -> dict[int, int]:
  """From whom each problem with a readable picture gets its picture."""
  hashes = {}
  for index in range(count):
    try:
      image = images.decode(problems[index].image_bytes)
      hashes[index] = images.pixel_hash(image)
    except (ValueError, OSError):
      continue  # It is masked in the real evaluation, so it is here.
  indices = list(hashes)
  return {
    indices[to]: indices[giver]
    for to, giver in enumerate(
      derangement(list(hashes.values()), seed).tolist()
    )
  }


@dataclasses.dataclass(frozen=True)
class _Removed:
  problems: records.Source

  def __len__(self) -> int:
    return len(self.problems)

  def __getitem__(self, index: int, /) -> records.Problem:
    problem = self.problems[index]
    height, width, _ = images.decode(problem.image_bytes).shape
    file = io.BytesIO()
    Image.new("RGB", (width, height), _GREY).save(file, "PNG", compress_level=1)
    return dataclasses.replace(problem, image_bytes=file.getvalue())


@dataclasses.dataclass(frozen=True)
class _Shuffled:
  problems: records.Source
  givers: dict[int, int]

  def __len__(self) -> int:
    return len(self.problems)

  def __getitem__(self, index: int, /) -> records.Problem:
    problem = self.problems[index]
    giver = self.problems[self.givers.get(index, index)]
    return dataclasses.replace(problem, image_bytes=giver.image_bytes)
