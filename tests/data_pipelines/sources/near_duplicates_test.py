"""Copies of an image are its near-duplicates; other images are not."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from data_pipelines import images
from data_pipelines.sources import near_duplicates


def encoded(image, format="PNG", **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return images.decode(file.getvalue())


def chart(heights, width=300, height=200):
  image = Image.new("RGB", (width, height), "white")
  draw = ImageDraw.Draw(image)
  step = width // len(heights)
  for i, bar in enumerate(heights):
    box = (i * step + 4, height - bar, (i + 1) * step - 4, height)
    draw.rectangle(box, fill=(200, 40 * i % 256, 30))
  return image


CHART = chart([120, 60, 150, 90, 30])
COPIES = {
  "grey": lambda image: encoded(image.convert("L")),
  "palette": lambda image: encoded(image.convert("P")),
  "transparent": lambda image: encoded(image.convert("RGBA")),
  "JPEG": lambda image: encoded(image, "JPEG", quality=50),
  "half": lambda image: encoded(image.reduce(2)),
  "larger": lambda image: encoded(image.resize((510, 340)), "WEBP"),
}


def group(*arrays):
  hashes = {images.pixel_hash(x): near_duplicates.hash_image(x) for x in arrays}
  return set(near_duplicates.groups(hashes).values())


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_a_duplicate(copied):
  assert len(group(np.asarray(CHART), copied(CHART))) == 1


@pytest.mark.parametrize(
  "other",
  [
    chart([120, 60, 150, 90, 60]),
    chart([60, 120, 150, 90, 30]),
    chart([120, 60, 150, 90, 30], width=330),
    CHART.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    Image.new("RGB", CHART.size, "white"),
  ],
  ids=["one bar", "two bars", "stretched", "mirrored", "blank"],
)
def test_another_image_is_none(other):
  assert len(group(np.asarray(CHART), np.asarray(other))) == 2


def test_blank_images_are_duplicates_by_their_brightness():
  blank = [np.full((40, 60, 3), level, np.uint8) for level in (0, 230, 250)]
  assert len(group(*blank)) == 2


# Bits of the code, width instead of 100, and grey levels of one cell.
@pytest.mark.parametrize(
  "bits, width, level, similar",
  [
    (0, 100, 0, True),
    (8, 100, 0, True),
    (9, 100, 0, False),
    (0, 102, 0, True),
    (0, 104, 0, False),
    (0, 97, 0, False),
    (0, 100, 24, True),
    (0, 100, 25, False),
  ],
)
def test_each_limit_is_where_it_says(bits, width, level, similar):
  plain = near_duplicates.ImageHash(code=0, ratio=1.0, cells=bytes(256))
  other = near_duplicates.ImageHash(
    code=(1 << 64) - (1 << (64 - bits)),
    ratio=width / 100,
    cells=bytes(99) + bytes([level]) + bytes(156),
  )
  assert (
    list(near_duplicates.similar_pairs([plain, other])) == [(0, 1)] * similar
  )


def hash_of(code):
  return near_duplicates.ImageHash(code=code, ratio=1.0, cells=bytes(256))


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_a_duplicates_duplicate_is_in_the_group_in_whatever_order(order):
  """a-b and b-c differ in 8 bits, a-c in 16; d differs from all."""
  hashes = {"a": hash_of(0), "b": hash_of(0xFF), "c": hash_of(0xFFFF)}
  assert list(near_duplicates.similar_pairs([hashes["a"], hashes["c"]])) == []
  found = near_duplicates.groups(
    {name: hashes[name] for name in order} | {"d": hash_of(2**64 - 1)}
  )
  assert found == {"a": "a", "b": "a", "c": "a", "d": "d"}


def test_an_image_without_a_hash_has_no_duplicates():
  found = near_duplicates.groups({"a": hash_of(0), "b": None, "c": None})
  assert found == {"a": "a", "b": "b", "c": "c"}


def test_nothing_has_no_duplicates():
  assert near_duplicates.groups({}) == {}


def test_the_code_is_that_of_a_plain_cosine_transform():
  """Compares with the textbook's sum, on an image without ties."""
  rng = np.random.default_rng(0)
  grey = rng.integers(0, 256, (32, 32), np.uint8)
  sample, frequency = np.arange(32), np.arange(8)
  basis = np.cos(np.pi * frequency[:, None] * (sample + 0.5) / 32)
  waves = np.einsum("uy,yx,vx->uv", basis, grey.astype(float), basis).ravel()
  median = sorted(waves[1:])[31]
  code = sum(1 << (63 - i) for i in range(64) if waves[i] > median)
  image_hash = near_duplicates.hash_image(
    np.repeat(grey[:, :, None], 3, axis=2)
  )
  assert image_hash.code == code
  cells = np.frombuffer(image_hash.cells, np.uint8).reshape(16, 16)
  np.testing.assert_allclose(
    cells, grey.reshape(16, 2, 16, 2).mean((1, 3)), atol=1
  )


@pytest.fixture(scope="module")
def snapshot(fixtures):
  """The distinct images of the snapshot, by their first pid."""
  folder = fixtures / "mathvista_schema" / "data"
  found = {}
  for path in sorted(folder.glob("*.parquet")):
    columns = ["pid", "decoded_image"]
    for row in pq.read_table(path, columns=columns).to_pylist():
      image = images.decode(row["decoded_image"]["bytes"])
      found.setdefault(images.pixel_hash(image), (row["pid"], image))
  return dict(found.values())


def test_the_snapshots_one_grey_copy_is_found_and_no_other(snapshot):
  """pids 16 and 313 show one image, once in grey."""
  assert len(snapshot) == 365
  groups = near_duplicates.groups(
    {pid: near_duplicates.hash_image(x) for pid, x in snapshot.items()}
  )
  merged = [(pid, group) for pid, group in groups.items() if pid != group]
  assert merged == [("313", "16")]


@pytest.mark.parametrize("copied, least", [("JPEG", 0.98), ("half", 0.93)])
def test_most_copies_of_real_images_are_found(snapshot, copied, least):
  arrays = list(snapshot.values())[:60]
  copies = [COPIES[copied](Image.fromarray(array)) for array in arrays]
  found = [len(group(*pair)) == 1 for pair in zip(arrays, copies, strict=True)]
  assert np.mean(found) >= least
