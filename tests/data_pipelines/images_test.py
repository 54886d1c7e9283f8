import concurrent.futures
import dataclasses
import io
import itertools
import os
import struct
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, TiffImagePlugin

from data_pipelines import images, records


def encoded(image, format="PNG", **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def make_image(height=12, width=20, seed=0):
  """Pixels without any symmetry."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def one_pixel(mode, color):
  return images.decode(encoded(Image.new(mode, (1, 1), color)))[0, 0].tolist()


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF"])
def test_lossless_images_decode_to_the_pixel(format):
  data = encoded(Image.fromarray(make_image()), format, lossless=True)
  decoded = images.decode(data)
  np.testing.assert_array_equal(decoded, make_image())
  assert decoded.dtype == np.uint8


@pytest.mark.parametrize(
  "mode, color, expected",
  [
    ("L", 77, [77, 77, 77]),
    ("1", 1, [255, 255, 255]),
    ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
    ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
    # Half of 255 and half of the color: 0.502 * 10 + 0.498 * 255 = 132.
    ("RGBA", (10, 20, 30, 128), [132, 137, 142]),
    ("LA", (10, 0), [255, 255, 255]),
    ("LA", (10, 128), [132, 132, 132]),
    ("I;16", 0, [0, 0, 0]),
    ("I;16", 256, [0, 0, 0]),  # 65535 / 255 = 257.
    ("I;16", 257 * 77, [77, 77, 77]),
    ("I;16", 65535, [255, 255, 255]),
  ],
)
def test_every_mode_is_shown_as_on_a_white_page(mode, color, expected):
  assert one_pixel(mode, color) == expected


def test_a_palette_may_have_a_transparent_color():
  image = Image.new("P", (2, 1))
  image.putpalette([10, 20, 30, 40, 50, 60])
  image.putpixel((1, 0), 1)
  assert images.decode(encoded(image)).tolist() == [
    [[10, 20, 30], [40, 50, 60]]
  ]
  for transparency in (1, bytes([255, 0])):
    shown = images.decode(encoded(image, transparency=transparency))
    assert shown.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_ink_is_subtracted_from_white():
  image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
  cyan = images.decode(encoded(image, "TIFF"))
  np.testing.assert_array_equal(cyan[0, 0], [0, 255, 255])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation, format):
  image = Image.fromarray(make_image())
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(image, format, exif=exif)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  np.testing.assert_array_equal(
    images.decode(data), np.asarray(upright.convert("RGB"))
  )


def header_only_png(width, height):
  """A PNG whose header claims a size, without any data."""
  chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  crc = struct.pack(">I", zlib.crc32(chunk))
  data = struct.pack(">I", 100) + b"IDAT"
  return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + data


@pytest.mark.parametrize(
  "width, height, reason",
  [
    (10_000, 5_000, "undecodable_image"),  # 50 Mpx may be tried.
    (10_000, 5_001, "image_too_large"),
    (12_000, 9_000, "image_too_large"),  # PIL would warn.
    (30_000, 30_000, "image_too_large"),  # PIL would raise.
  ],
)
def test_a_huge_image_is_refused_by_its_header(width, height, reason):
  with pytest.raises(records.BadRecord) as caught:
    images.decode(header_only_png(width, height))
  assert caught.value.reason == reason


def refusal(data):
  with pytest.raises(records.BadRecord) as caught:
    images.decode(data)
  return caught.value


def test_a_program_is_no_picture_and_is_not_run(tmp_path, monkeypatch):
  """PIL would hand it to Ghostscript, which it looks for on PATH."""
  called = tmp_path / "called"
  (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
  (tmp_path / "gs").chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
  program = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop"
  )
  for read in (
    images.decode,
    lambda data: images.num_crops(data, PAN_AND_SCAN),
  ):
    with pytest.raises(records.BadRecord, match="undecodable_image") as caught:
      read(program)
    assert not called.exists()
    assert "none of PNG, JPEG, WEBP, GIF, BMP, TIFF" in caught.value.detail


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PCX", "JPEG2000"])
def test_only_known_formats_are_opened(format):
  data = encoded(Image.fromarray(make_image(16, 16)), format)
  assert refusal(data).reason == "undecodable_image"


@pytest.mark.parametrize("format", ["TIFF", "GIF", "WEBP", "PNG"])
def test_of_several_pages_the_first_is_shown(format):
  first, *others = (
    Image.new("RGB", (9, 7), (index, 250, 3)) for index in range(200)
  )
  options = {"lossless": True} if format == "WEBP" else {}
  data = encoded(first, format, save_all=True, append_images=others, **options)
  decoded = images.decode(data)
  assert decoded.shape == (7, 9, 3)
  assert (decoded == (0, 250, 3)).all()


def progressive(scans):
  """A progressive JPEG whose last scan is repeated up to `scans` scans."""
  data = encoded(Image.fromarray(make_image()), "JPEG", progressive=True)
  last, found = data.rindex(b"\xff\xda"), data.count(b"\xff\xda")
  return data[:-2] + data[last:-2] * (scans - found) + b"\xff\xd9"


def huge_tile():
  """A TIFF of 4 x 4 pixels whose one tile claims 50 megapixels."""
  tags = {256: 4, 257: 4, 258: 8, 259: 8, 262: 1, 277: 1}
  tags |= {322: 10_000, 323: 5_001, 324: 8, 325: 8}
  entries = [struct.pack("<HHLL", tag, 4, 1, tags[tag]) for tag in tags]
  start = b"II*\0" + struct.pack("<L", 16) + bytes(8)
  return start + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize(
  "data, unit",
  [
    (header_only_png(images.MAX_SIDE + 1, 1), "pixels on a side"),
    (header_only_png(1, 40_000_000), "pixels on a side"),
    (progressive(images.MAX_SCANS + 1), "scans"),
    (b"\xff\xd8" + b"\xff\xe5\0\2" * 11_000, "segments"),
    (b"\x89PNG\r\n\x1a\n" + bytes(images.MAX_BYTES), "bytes"),
    (huge_tile(), "pixels in a tile"),
  ],
  ids=["wide", "tall", "scans", "segments", "bytes", "tile"],
)
def test_limits_hold_before_anything_is_decoded(monkeypatch, data, unit):
  monkeypatch.setattr(
    images.Image.Image, "load", lambda image: pytest.fail("decoded")
  )
  error = refusal(data)
  assert error.reason == "image_too_large"
  assert f" {unit}, and the limit is " in error.detail


def test_what_follows_a_jpeg_is_not_counted():
  """Phones append films, whose bytes hold what starts a scan."""
  data = progressive(images.MAX_SCANS)
  assert images.decode(data + b"\xff\xda\0\2" * 200).shape == (12, 20, 3)


def test_lying_tags_of_a_tiff_warn_nobody():
  info = TiffImagePlugin.ImageFileDirectory_v2()
  info[34665] = 7  # The address of more tags.
  data = encoded(
    Image.fromarray(make_image()), "TIFF", tiffinfo=info, compression="tiff_lzw"
  )
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert images.decode(data).shape == (12, 20, 3)
  assert said == []


def test_sixteen_bits_take_no_more_memory_than_needed():
  side = 1000
  data = encoded(Image.new("I;16", (side, side), 257 * 3), "PNG")
  tracemalloc.start()
  try:
    assert (images.decode(data) == 3).all()
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 15 * side**2  # Bytes; 64-bit integers would take 24 and more.


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_a_truncated_image_is_bad(format):
  data = encoded(Image.fromarray(make_image(64, 64)), format)
  for kept in (0, 1, 10, len(data) // 4, len(data) // 2):
    with pytest.raises(records.BadRecord, match="undecodable_image"):
      images.decode(data[:kept])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_damage_is_a_bad_record_or_an_image_never_another_error(format):
  data = np.frombuffer(encoded(Image.fromarray(make_image()), format), np.uint8)
  rng = np.random.default_rng(0)
  for _ in range(100):
    damaged = data.copy()
    at = rng.integers(len(data), size=4)
    damaged[at] = rng.integers(0, 256, 4)
    try:
      assert images.decode(damaged.tobytes()).shape[2] == 3
    except records.BadRecord as error:
      assert error.reason in ("undecodable_image", "image_too_large")


def test_damaged_metadata_does_not_cost_the_image():
  data = encoded(
    Image.fromarray(make_image()), "JPEG", exif=b"Exif\0\0II*\0\xff\0\0\0junk"
  )
  assert images.decode(data).shape == (12, 20, 3)


def test_threads_may_decode_at_once_and_leave_warnings_as_they_were(
  monkeypatch,
):
  data = encoded(Image.fromarray(make_image()))
  before = list(warnings.filters)
  # Threads change over inside the header, where a race would show.
  monkeypatch.setattr(
    images.Image,
    "open",
    lambda file, open=Image.open, **options: (
      time.sleep(0) or open(file, **options)
    ),
  )
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    decoded = list(pool.map(images.decode, [data] * 200))
  assert list(warnings.filters) == before
  assert all(np.array_equal(image, make_image()) for image in decoded)


def test_images_of_the_snapshot_have_the_size_it_says(fixtures):
  modes = set()
  folder = fixtures / "mathvista_schema" / "data"
  for path in sorted(folder.glob("testmini-*.parquet")):
    columns = ["decoded_image", "metadata"]
    for row in pq.read_table(path, columns=columns).to_pylist():
      data = row["decoded_image"]["bytes"]
      size = row["metadata"]["img_height"], row["metadata"]["img_width"]
      assert images.decode(data).shape == (*size, 3)
      modes.add(Image.open(io.BytesIO(data)).mode)
  assert modes == {"RGB", "RGBA", "L", "P"}


def test_resizing_squashes_the_whole_image():
  image = np.zeros((10, 40, 3), np.uint8)
  image[:, 20:] = 255
  square = images.resize(image, 8)
  assert square.shape == (8, 8, 3) and square.dtype == np.uint8
  assert (square[:, :3] == 0).all() and (square[:, 5:] == 255).all()
  np.testing.assert_array_equal(images.resize(square, 8), square)


def test_the_hash_is_of_pixels_and_shape_not_of_bytes():
  image = Image.fromarray(make_image())
  hashes = {
    images.pixel_hash(images.decode(encoded(image, format)))
    for format in ("PNG", "BMP")
  }
  assert len(hashes) == 1
  other = make_image()
  other[0, 0, 0] ^= 1
  flat = make_image().reshape(6, 40, 3)
  hashes |= {images.pixel_hash(other), images.pixel_hash(flat)}
  hashes.add(images.pixel_hash(make_image()[:, ::-1]))
  assert len(hashes) == 4


PAN_AND_SCAN = dataclasses.replace(images.WHOLE, enabled=True)


def across(height, *edges):
  """Crops side by side, between these edges."""
  return [(0, a, height, b) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
  "height, width, boxes",
  [
    # 5.57 to 1 asks for 6 crops, and 4 are allowed: 1838 / 4 rounded up is 460.
    (330, 1838, across(330, 0, 460, 920, 1380, 1838)),
    # 1.31 asks for 1, and 2 is the least.
    (704, 537, [(0, 0, 352, 537), (352, 0, 704, 537)]),
    # 2.5 asks for 3: halves are rounded up, not to even.
    (1000, 2500, across(1000, 0, 834, 1668, 2500)),
    # 3.85 asks for 4, of which 3 are at least 256 wide.
    (260, 1000, across(260, 0, 334, 668, 1000)),
    # Two crops of 511 are 256 wide; of 510, too small.
    (300, 511, across(300, 0, 256, 511)),
    (300, 510, []),
    (255, 1000, []),
    # 1.2 is enough, less is not.
    (1000, 1200, across(1000, 0, 600, 1200)),
    (1000, 1199, []),
    (1000, 1000, []),
  ],
)
def test_a_long_image_is_cut_along_its_longer_side(height, width, boxes):
  assert images.crop_boxes(height, width, PAN_AND_SCAN) == boxes
  turned = [(left, top, right, bottom) for top, left, bottom, right in boxes]
  assert images.crop_boxes(width, height, PAN_AND_SCAN) == turned
  assert images.crop_boxes(height, width, images.WHOLE) == []


def test_each_number_of_pan_and_scan_is_a_setting():
  def boxes(height, width, **changes):
    settings = dataclasses.replace(PAN_AND_SCAN, **changes)
    return images.crop_boxes(height, width, settings)

  assert boxes(330, 1838, max_num_crops=3) == across(330, 0, 613, 1226, 1838)
  assert boxes(300, 510, min_crop_size=255) == across(300, 0, 255, 510)
  assert boxes(1000, 1200, min_ratio_to_activate=1.21) == []
  # A square is cut as a wide image is.
  assert boxes(600, 600, min_ratio_to_activate=1.0) == across(600, 0, 300, 600)


def test_crops_cover_the_image_and_are_never_empty():
  settings = images.PanAndScan(
    enabled=True, min_crop_size=4, max_num_crops=4, min_ratio_to_activate=1.0
  )
  for height, width in np.ndindex(41, 41):
    seen = np.zeros((height + 1, width + 1), int)
    boxes = images.crop_boxes(height + 1, width + 1, settings)
    for top, left, bottom, right in boxes:
      assert top < bottom and left < right
      seen[top:bottom, left:right] += 1
    assert (seen == bool(boxes)).all()


def test_views_are_the_image_and_its_crops_each_resized():
  image = make_image(260, 1000)
  views = images.views(image, 16, PAN_AND_SCAN)
  boxes = images.crop_boxes(260, 1000, PAN_AND_SCAN)
  assert views.shape == (4, 16, 16, 3) and views.dtype == np.uint8
  np.testing.assert_array_equal(views[0], images.resize(image, 16))
  for view, (top, left, bottom, right) in zip(views[1:], boxes, strict=True):
    cut = Image.fromarray(image).crop((left, top, right, bottom))
    expected = cut.resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(view, expected)
  alone = images.views(image, 16, images.WHOLE)
  np.testing.assert_array_equal(alone, views[:1])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(260, 1000), (1000, 260), (300, 300)])
def test_the_header_tells_how_many_crops_there_are(size, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(Image.fromarray(make_image(*size)), "JPEG", exif=exif)
  views = images.views(images.decode(data), 8, PAN_AND_SCAN)
  assert images.num_crops(data, PAN_AND_SCAN) == len(views) - 1
  assert images.num_crops(data, images.WHOLE) == 0
  # Nothing behind the header is read.
  assert images.num_crops(data[:1000], PAN_AND_SCAN) == len(views) - 1


def test_a_header_that_cannot_be_read_is_a_bad_record():
  for data, reason in (
    (b"", "undecodable_image"),
    (b"no picture", "undecodable_image"),
    (header_only_png(10_000, 5_001), "image_too_large"),
  ):
    with pytest.raises(records.BadRecord) as caught:
      images.num_crops(data, PAN_AND_SCAN)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
  "name, value",
  [
    ("max_num_crops", 1),
    ("min_crop_size", 3),
    ("min_ratio_to_activate", 0.9),
    ("min_ratio_to_activate", float("nan")),
    ("min_ratio_to_activate", float("inf")),
  ],
)
def test_numbers_of_pan_and_scan_that_make_no_sense_are_refused(name, value):
  with pytest.raises(ValueError, match=rf"^{name} \({value}\) must be "):
    dataclasses.replace(PAN_AND_SCAN, **{name: value})
