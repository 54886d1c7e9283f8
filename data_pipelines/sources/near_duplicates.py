"""Groups of images that look alike, which must not be divided over splits.

Two images are near-duplicates if their pixels are equal, or if they look alike:
a grey or palette copy, another quality or another size. Two images look alike
if all of these hold:

- 64-bit codes at most `MAX_DISTANCE` bits apart. A code holds the signs of the
  8 x 8 lowest frequencies of the grey image, compared with their median;
- side ratios within `MAX_STRETCH` of each other;
- no cell of 16 x 16 that differs by more than `MAX_CONTRAST` grey levels. By
  the code alone, two charts that differ in one bar would look alike.

docs/adr/0006 has measurements.

References:
  The code is pHash's: Zauner, Implementation and Benchmarking of Perceptual
    Image Hash Functions, 2010.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

MAX_DISTANCE = 8
MAX_STRETCH = 0.03
MAX_CONTRAST = 24

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
  small = (
    Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.BOX)
  )
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


def similar_pairs(hashes: Sequence[ImageHash]) -> Iterator[tuple[int, int]]:
  """The indices of every two images that look alike.

  Compares all with all: 0.2 s for 6,000 images, 1.3 s for 30,000.
  """
  codes = np.array([each.code for each in hashes], np.uint64)
  ratios = np.log([each.ratio for each in hashes])
  cells = np.frombuffer(b"".join(each.cells for each in hashes), np.uint8)
  cells = cells.reshape(-1, 16 * 16).astype(np.int16)
  for i in range(len(hashes)):
    distances = np.bitwise_count(codes[i + 1 :] ^ codes[i])
    others = i + 1 + np.flatnonzero(distances <= MAX_DISTANCE)
    stretches = np.abs(ratios[others] - ratios[i])
    others = others[stretches <= np.log1p(MAX_STRETCH)]
    contrasts = np.abs(cells[others] - cells[i]).max(axis=1, initial=0)
    for j in others[contrasts <= MAX_CONTRAST]:
      yield i, int(j)


def groups(hashes: Mapping[str, ImageHash | None]) -> dict[str, str]:
  """The group of every image, by the hash of its pixels.

  Args:
    hashes: Perceptual hashes by `images.pixel_hash`; None for an image that has
      no duplicates except exact copies.

  Returns:
    For each pixel hash, the smallest one of its group. A near-duplicate of a
    near-duplicate is in the group too, even if the two do not look alike.
  """
  parent = {image: image for image in hashes}

  def root(image: str) -> str:
    while parent[image] != image:
      parent[image] = parent[parent[image]]
      image = parent[image]
    return image

  seen = {name: each for name, each in hashes.items() if each is not None}
  names = list(seen)
  for i, j in similar_pairs(list(seen.values())):
    first, second = sorted((root(names[i]), root(names[j])))
    parent[second] = first
  return {image: root(image) for image in hashes}
