"""Copies of an image are its near-duplicates; other images are not."""

import contextlib
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from data_pipelines import images, records
from data_pipelines.sources import near_duplicates, stored
from tests.data_pipelines.sources import layouts


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


def similar(first, second):
  """True if two arrays of pixels are taken for copies."""
  hashes = [[near_duplicates.hash_image(each)] for each in (first, second)]
  one, two = (Image.fromarray(each).convert("L") for each in (first, second))
  is_candidate = [*near_duplicates.similar_pairs(*hashes)] == [(0, 0)]
  return is_candidate and near_duplicates.are_copies(one, two)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_a_duplicate(copied):
  assert similar(np.asarray(CHART), copied(CHART))


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
  assert not similar(np.asarray(CHART), np.asarray(other))


def test_blank_images_are_duplicates_by_their_brightness():
  dark, grey, light = (
    np.full((40, 60, 3), level, np.uint8) for level in (0, 240, 250)
  )
  assert similar(grey, light) and not similar(dark, grey)


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
  pairs = list(near_duplicates.similar_pairs([plain], [other]))
  assert pairs == [(0, 0)] * similar


def test_nothing_has_no_duplicates():
  assert list(near_duplicates.similar_pairs([], [])) == []


def problem_of(image):
  file = io.BytesIO()
  image.save(file, "PNG")
  return records.Problem(
    pid="",
    question="?",
    images=(file.getvalue(),),
    answer="1",
    question_type="free_form",
    answer_type="integer",
  )


def found(tmp_path, names, others):
  """The copies among named images, as a division finds them."""
  with contextlib.closing(stored.Scratch(tmp_path)) as scratch:
    looks = near_duplicates.Looks(scratch)
    for name, image in (names | others).items():
      image_hash = near_duplicates.hash_image(np.asarray(image))
      looks.add(
        {name: (0, image_hash)},
        scratch.append(stored.encode(problem_of(image))),
      )
    return looks.find(names, others)


def test_copies_are_found_among_others(tmp_path):
  copy = Image.fromarray(COPIES["half"](CHART))
  names = {"chart": CHART, "blank": Image.new("RGB", CHART.size, "white")}
  others = {"copy": copy, "other": chart([120, 60, 150, 90, 60])}
  assert found(tmp_path, names, others) == {"chart": "copy"}
  # Text has no perceptual hash, and neither has a drawn image.
  with contextlib.closing(stored.Scratch(tmp_path)) as scratch:
    assert near_duplicates.Looks(scratch).find(["a"], ["b"]) == {}


@pytest.mark.parametrize(
  "layout", layouts.LAYOUTS.values(), ids=layouts.LAYOUTS
)
def test_pictures_of_one_layout_are_no_copies(tmp_path, layout):
  """And JPEGs of half the size of them are."""
  drawn = {f"{seed}": layout(seed) for seed in range(24)}
  distinct = {image.tobytes(): name for name, image in drawn.items()}
  drawn = {name: drawn[name] for name in distinct.values()}
  names, others = list(drawn)[:18], list(drawn)[18:]
  chosen = [{name: drawn[name] for name in each} for each in (names, others)]
  assert found(tmp_path, *chosen) == {}
  small = {}
  for name in others:
    image = drawn[name].resize([side // 2 for side in drawn[name].size])
    small[f"{name}+"] = Image.fromarray(encoded(image, "JPEG", quality=60))
  assert found(tmp_path, small, drawn).keys() == small.keys()


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
  hashes = [near_duplicates.hash_image(x) for x in snapshot.values()]
  pairs = near_duplicates.similar_pairs(hashes, hashes)
  pids = list(snapshot)
  merged = [(pids[i], pids[j]) for i, j in pairs if i > j]
  assert merged == [("313", "16")]
  assert similar(snapshot["313"], snapshot["16"])


@pytest.mark.parametrize("copied, least", [("JPEG", 0.98), ("half", 0.93)])
def test_most_copies_of_real_images_are_found(snapshot, copied, least):
  arrays = list(snapshot.values())[:60]
  copies = [COPIES[copied](Image.fromarray(array)) for array in arrays]
  pairs = zip(arrays, copies, strict=True)
  assert np.mean([similar(*pair) for pair in pairs]) >= least
