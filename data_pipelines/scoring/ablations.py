"""Ablations: the same questions with images that cannot answer them.

An ablation is a source of the same problems with other images. A policy with
the same accuracy on it does not use the image. Every image is replaced and none
is dropped, so prompts keep their layout. A text problem stays as it is.
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

  "removed" replaces each image by a plain grey one of the same shape.
  "shuffled" permutes the readable images of the first `num_problems`, so that
  another image stands in the place of each; only the seed and the images count.

  Raises:
    ValueError: The images cannot be shuffled so.
  """
  if kind == "removed":
    return _Ablation(problems, None)
  count = min(num_problems, len(problems))
  return _Ablation(problems, _givers(problems, count, seed))


def derangement(keys: list[str], seed: int) -> np.ndarray:
  """A random permutation, int64 [len(keys)], that changes each key.

  Equal keys are placed side by side, in a random order of keys, and everything
  is rotated by the length of the longest run. That leaves each run, and does
  not wrap around into the same run as long as no run is longer than half.

  Raises:
    ValueError: There are no keys, or more than half of them are equal.
  """
  names, run = np.unique(np.array(keys, str), return_inverse=True)
  longest = int(np.bincount(run).max()) if len(names) else 1
  if 2 * longest > len(keys):
    raise ValueError(
      "eval.ablations ('shuffled') must have another image for each image, "
      f"but {longest} of {len(keys)} images are the same; leave 'shuffled' "
      "out, or raise eval.num_problems."
    )
  ranks = np.random.default_rng(seed).permutation(len(names))
  order = np.argsort(ranks[run], kind="stable")
  givers = np.empty(len(keys), np.int64)
  givers[order] = np.roll(order, -longest)
  return givers


def _givers(
  problems: records.Source, count: int, seed: int
) -> dict[tuple[int, int], tuple[int, int]]:
  """The picture that each picture makes way for, as problem and number."""
  hashes = {}
  for index in range(count):
    try:
      found = [images.decode(picture) for picture in problems[index].images]
    except (ValueError, OSError):
      continue  # The evaluation masks an unreadable image.
    for number, image in enumerate(found):
      hashes[index, number] = images.pixel_hash(image)
  places = list(hashes)
  givers = derangement(list(hashes.values()), seed)
  return {
    place: places[giver] for place, giver in zip(places, givers, strict=True)
  }


@dataclasses.dataclass(frozen=True)
class _Ablation:
  problems: records.Source
  # The picture in the place of each, as problem and number; None for grey ones.
  givers: dict[tuple[int, int], tuple[int, int]] | None

  def __len__(self) -> int:
    return len(self.problems)

  def __getitem__(self, index: int, /) -> records.Problem:
    problem = self.problems[index]
    if self.givers is None:
      shown = map(_grey, problem.images)
    else:
      places = ((index, number) for number in range(len(problem.images)))
      givers = (self.givers.get(place, place) for place in places)
      shown = (self.problems[giver].images[number] for giver, number in givers)
    return dataclasses.replace(problem, images=tuple(shown))


def _grey(image: bytes) -> bytes:
  height, width, _ = images.decode(image).shape
  file = io.BytesIO()
  Image.new("RGB", (width, height), _GREY).save(file, "PNG", compress_level=1)
  return file.getvalue()
