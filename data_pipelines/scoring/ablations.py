"""Ablations: the same questions with images that cannot answer them.

An ablation is a source of the same problems with other images. A policy with
the same accuracy on it does not use the image. Every image is replaced and none
is dropped, so prompts keep their layout.
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
  """Makes an ablation of some problems.

  Args:
    kind: "removed" replaces each image by a plain grey one of the same shape;
      "shuffled" permutes the readable images so that each problem gets another
      image.
    problems: The real problems.
    num_problems: The number of problems, from the first, that are shuffled.
    seed: Seed of the shuffle, which depends only on the seed and the images.

  Raises:
    ValueError: The kind is unknown, or the images cannot be shuffled so that
      every problem gets another one.
  """
  if kind == "removed":
    return _Ablation(problems, None)
  if kind == "shuffled":
    count = min(num_problems, len(problems))
    return _Ablation(problems, _givers(problems, count, seed))
  raise ValueError(f"eval.ablations ({kind!r}) must be one of {KINDS}.")


def derangement(keys: list[str], seed: int) -> np.ndarray:
  """A random permutation that changes the key at every index.

  Equal keys are placed side by side, in a random order of keys, and everything
  is rotated by the length of the longest run. That leaves each run, and does
  not wrap around into the same run as long as no run is longer than half.

  Returns:
    int64 [len(keys)], the index from which each index takes its element.

  Raises:
    ValueError: There are no keys, or more than half of them are equal.
  """
  names, run = np.unique(np.array(keys, str), return_inverse=True)
  longest = int(np.bincount(run).max()) if len(names) else 1
  if 2 * longest > len(keys):
    raise ValueError(
      "eval.ablations ('shuffled') must have another image for each problem, "
      f"but {longest} of {len(keys)} problems have the same image; leave "
      "'shuffled' out, or raise eval.num_problems."
    )
  ranks = np.random.default_rng(seed).permutation(len(names))
  order = np.argsort(ranks[run], kind="stable")
  givers = np.empty(len(keys), np.int64)
  givers[order] = np.roll(order, -longest)
  return givers


def _givers(problems: records.Source, count: int, seed: int) -> dict[int, int]:
  """The index of the problem whose image each problem gets."""
  hashes = {}
  for index in range(count):
    try:
      image = images.decode(problems[index].images[0])
      hashes[index] = images.pixel_hash(image)
    except (ValueError, OSError):
      continue  # The evaluation masks an unreadable image.
  indices = np.array(list(hashes), np.int64)
  givers = indices[derangement(list(hashes.values()), seed)]
  return dict(zip(hashes, givers.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class _Ablation:
  problems: records.Source
  # The index of the problem whose image each problem gets; None for grey ones.
  givers: dict[int, int] | None

  def __len__(self) -> int:
    return len(self.problems)

  def __getitem__(self, index: int, /) -> records.Problem:
    problem = self.problems[index]
    if self.givers is None:
      image = _grey(problem.images[0])
    else:
      image = self.problems[self.givers.get(index, index)].images[0]
    return dataclasses.replace(problem, images=(image,))


def _grey(image: bytes) -> bytes:
  height, width, _ = images.decode(image).shape
  file = io.BytesIO()
  Image.new("RGB", (width, height), _GREY).save(file, "PNG", compress_level=1)
  return file.getvalue()
