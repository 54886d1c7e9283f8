"""Finds copies of images: grey, of fewer colors, of other quality or size.

Two images are candidates if all of these hold:

- 64-bit codes at most `MAX_DISTANCE` bits apart: the signs of the 8 x 8 lowest
  frequencies of the grey image, compared with their median;
- side ratios within `MAX_STRETCH` of each other;
- no cell of 16 x 16 that differs by more than `MAX_CONTRAST` grey levels.

Charts and tables of one layout are candidates too, so the images themselves are
then compared, see `are_copies`. docs/adr/0006 has measurements.

References:
  The code is pHash's: Zauner, Implementation and Benchmarking of Perceptual
    Image Hash Functions, 2010.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from data_pipelines import images
from data_pipelines.sources import stored

MAX_DISTANCE = 8
MAX_STRETCH = 0.03
MAX_CONTRAST = 24
# The largest part of the contrast within a window that may differ. Windows are
# as large as a letter; windows of less contrast than the noise have its.
MAX_DIFFERENCE = 0.15
_WINDOW, _NOISE, _MAX_SIDE = 4, 1600.0, 640
_CACHED = 4096

# Rows are frequencies 0 to 7 of 32 samples. Integers, because a sum of floats
# may differ between machines and change a bit of a code.
_COSINES = np.rint(
  1024 * np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)
).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class ImageHash:
  """The perceptual hash of an image."""

  code: int  # 64 bits of the lowest frequencies.
  ratio: float  # Width over height.
  cells: bytes  # Grey levels of 16 x 16 cells.


def hash_image(image: np.ndarray) -> ImageHash:
  """The perceptual hash of an image, uint8 [height, width, 3]."""
  height, width, _ = image.shape
  grey_image = Image.fromarray(image).convert("L")
  small = grey_image.resize((32, 32), Image.Resampling.BOX)
  grey = np.asarray(small, np.int64)
  waves = (_COSINES @ grey @ _COSINES.T).ravel()
  # The first is the mean brightness, which is no shape.
  bits = np.packbits(waves > np.median(waves[1:]))
  cells = grey.reshape(16, 2, 16, 2).sum((1, 3)) // 4
  return ImageHash(
    code=int.from_bytes(bits.tobytes()),
    ratio=width / height,
    cells=cells.astype(np.uint8).tobytes(),
  )


def similar_pairs(
  hashes: Sequence[ImageHash], others: Sequence[ImageHash]
) -> Iterator[tuple[int, int]]:
  """The indices of every image and every other one that may be its copy."""
  codes = np.array([each.code for each in others], np.uint64)
  ratios = np.log([each.ratio for each in others])
  cells = np.frombuffer(b"".join(each.cells for each in others), np.uint8)
  cells = cells.reshape(-1, 16 * 16)
  for i, each in enumerate(hashes):
    distances = np.bitwise_count(codes ^ np.uint64(each.code))
    found = np.flatnonzero(distances <= MAX_DISTANCE)
    stretches = np.abs(ratios[found] - np.log(each.ratio))
    found = found[stretches <= np.log1p(MAX_STRETCH)]
    own = np.frombuffer(each.cells, np.uint8).astype(np.int16)
    contrasts = np.abs(cells[found] - own).max(axis=1, initial=0)
    for j in found[contrasts <= MAX_CONTRAST]:
      yield i, int(j)


def are_copies(first: Image.Image, second: Image.Image) -> bool:
  """True if two grey images show the same, letter by letter.

  Both are shrunk. In each window of 4 x 4, the mean square of the difference is
  compared with the contrast of both.
  """
  width, height = map(min, first.size, second.size)
  scale = min(0.5, _MAX_SIDE / max(width, height))
  width, height = (
    max(_WINDOW, int(side * scale) // _WINDOW * _WINDOW)
    for side in (width, height)
  )
  one, two = (_windows(each, (width, height)) for each in (first, second))
  difference = np.square(one - two).mean(axis=1)
  contrast = one.var(axis=1) + two.var(axis=1) + _NOISE
  return bool((difference <= MAX_DIFFERENCE * contrast).all())


def _windows(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
  """The grey levels of each window, [windows, 16]."""
  # Not BOX, of which a line at a border is in one cell or in the next.
  small = image.resize(size, Image.Resampling.BILINEAR)
  grey = np.asarray(small, np.float32)
  rows, columns = size[1] // _WINDOW, size[0] // _WINDOW
  grey = grey.reshape(rows, _WINDOW, columns, _WINDOW)
  return grey.transpose(0, 2, 1, 3).reshape(rows * columns, -1)


class Looks:
  """The perceptual hashes of images, whose problems are in a scratch file."""

  def __init__(self, scratch: stored.Scratch):
    self._scratch = scratch
    self._found: dict[str, tuple[ImageHash, int, int]] = {}
    self._grey = functools.lru_cache(_CACHED)(self._read)

  def add(self, hashes: Mapping[str, tuple[int, ImageHash]], at: int) -> None:
    """Adds the hashes of a problem's images, by the hash of their pixels.

    Each has its index among the images; `at` is the problem's in the file.
    """
    for image, (index, each) in hashes.items():
      self._found.setdefault(image, (each, at, index))

  def find(self, names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """The images that are copies of others, each with the first such one."""
    names = [name for name in names if name in self._found]
    others = [name for name in others if name in self._found]
    first, second = ([self._found[x][0] for x in y] for y in (names, others))
    copies: dict[str, str] = {}
    for i, j in similar_pairs(first, second):
      if names[i] not in copies:
        if are_copies(self._grey(names[i]), self._grey(others[j])):
          copies[names[i]] = others[j]
    return copies

  def _read(self, image: str) -> Image.Image:
    """The grey image, of at most twice `_MAX_SIDE`."""
    _, at, index = self._found[image]
    problem = stored.decode(self._scratch[at])
    grey = Image.fromarray(images.decode(problem.images[index])).convert("L")
    grey.thumbnail((2 * _MAX_SIDE, 2 * _MAX_SIDE), Image.Resampling.BILINEAR)
    return grey
