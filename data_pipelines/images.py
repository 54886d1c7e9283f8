"""Decodes, resizes and crops images, with the same pixels on every host.

The pixels equal those of transformers' Gemma3ImageProcessorPil, pan-and-scan
included, which a test enforces. Images may come from anywhere: an image at a
limit takes at most 10 seconds of a CPU and 1.2 GB, by measurement.

References:
  Gemma 3 Technical Report (arXiv:2503.19786), section 2.1: pan and scan.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import re
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from data_pipelines import records
from data_pipelines.validation import at_least, check_fields, interval, require

# PIL would hand an EPS file, which is a program, to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
MAX_SIDE = 2**15
# Of a JPEG, whose scans may each be a few bytes and take a pass over all its
# pixels; libtiff allows as many. A progressive JPEG has about ten.
MAX_SCANS = 100
_MAX_SEGMENTS = 10_000
# The start of a segment with a length, or the end of the image.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")

_WARNINGS_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class PanAndScan:
  """Settings of pan and scan, which shows long images again in crops.

  Attributes:
    enabled: False shows each image whole, without crops.
    min_crop_size: Fewest pixels of a crop's shorter side; an image whose crops
      would be smaller has no crops.
    max_num_crops: Most crops of an image; each costs as much as an image.
    min_ratio_to_activate: Smallest ratio of longer to shorter side at which an
      image has crops.
  """

  enabled: bool
  min_crop_size: int
  max_num_crops: int = dataclasses.field(metadata=at_least(2))
  min_ratio_to_activate: float = dataclasses.field(
    metadata=interval("[1, inf)", 1.2)
  )

  def __post_init__(self):
    check_fields(self)
    # Otherwise the last crop of a small image could be empty.
    rule = f"be at least max_num_crops ({self.max_num_crops})"
    holds = self.min_crop_size >= self.max_num_crops
    require(holds, "min_crop_size", self.min_crop_size, rule, "")


# The numbers of transformers' Gemma3ImageProcessor.
WHOLE = PanAndScan(
  enabled=False, min_crop_size=256, max_num_crops=4, min_ratio_to_activate=1.2
)


def decode(image_bytes: bytes) -> np.ndarray:
  """Decodes the first frame of an image as a viewer shows it on a white page.

  Returns:
    uint8 [height, width, 3]: upright by its EXIF orientation, transparency
    composited over white, grey and CMYK as RGB, 16 bits scaled to 8.
  """
  with records.all_faults("undecodable_image"):
    image = _open(image_bytes)
    # Only the tags of a TIFF are read, and warned of, while it is decoded.
    with _silence() if image.format == "TIFF" else contextlib.nullcontext():
      image.load()
    # PIL's EXIF reader raises as freely as its decoders.
    with _silence(), contextlib.suppress(Exception):
      ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(_as_rgb(image))


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes the whole image to uint8 [size, size, 3], bilinearly."""
  bilinear = Image.Resampling.BILINEAR
  return np.asarray(Image.fromarray(image).resize((size, size), bilinear))


def crop_boxes(
  height: int, width: int, settings: PanAndScan
) -> list[tuple[int, int, int, int]]:
  """The crops of an image along its longer side; [] if it has none.

  Their number makes them as square as possible, none smaller than allowed. A
  crop is its top, left, bottom and right, in pixels from the top left.
  """
  longer, shorter = max(height, width), min(height, width)
  if not settings.enabled or longer / shorter < settings.min_ratio_to_activate:
    return []
  # Halves are rounded up; Python's round would take the even number.
  count = math.floor(longer / shorter + 0.5)
  count = max(2, min(count, longer // settings.min_crop_size))
  count = min(count, settings.max_num_crops)
  step = math.ceil(longer / count)
  if min(step, shorter) < settings.min_crop_size:
    return []
  spans = [(i * step, min((i + 1) * step, longer)) for i in range(count)]
  if width >= height:
    return [(0, start, height, stop) for start, stop in spans]
  return [(start, 0, stop, width) for start, stop in spans]


def num_crops(image_bytes: bytes, settings: PanAndScan) -> int:
  """Counts the crops that `views` would make, from the image's header alone."""
  if not settings.enabled:
    return 0
  with records.all_faults("undecodable_image"):
    image = _open(image_bytes)
  return len(crop_boxes(image.height, image.width, settings))


def views(image: np.ndarray, size: int, settings: PanAndScan) -> np.ndarray:
  """The whole image, then its crops: uint8 [1 + crops, size, size, 3]."""
  boxes = crop_boxes(image.shape[0], image.shape[1], settings)
  crops = [image[top:bottom, left:right] for top, left, bottom, right in boxes]
  return np.stack([resize(view, size) for view in (image, *crops)])


def pixel_hash(image: np.ndarray) -> str:
  """A hash of the pixels, whatever their encoding."""
  digest = hashlib.sha256(f"{image.shape}".encode())
  digest.update(np.ascontiguousarray(image))
  return digest.hexdigest()


def _open(image_bytes: bytes) -> Image.Image:
  """Reads the image's header, and refuses an image that is too large."""
  _limit(len(image_bytes), MAX_BYTES, "bytes")
  if image_bytes.startswith(b"\xff\xd8"):
    _limit_scans(image_bytes)
  with _silence():
    try:
      image = Image.open(io.BytesIO(image_bytes), formats=FORMATS)
    except Image.DecompressionBombError as error:
      raise records.BadRecord("image_too_large", str(error)) from error
    except Image.UnidentifiedImageError:  # Its words name an address.
      detail = f"it is none of {', '.join(FORMATS)}"
      raise records.BadRecord("undecodable_image", detail) from None
  if isinstance(image, TiffImagePlugin.TiffImageFile):
    # A tile is decoded whole, however small the image.
    width = image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 0)
    height = image.tag_v2.get(TiffImagePlugin.TILELENGTH, 0)
    _limit(width * height, MAX_PIXELS, "pixels in a tile")
  _limit(image.width * image.height, MAX_PIXELS, "pixels")
  _limit(max(image.size), MAX_SIDE, "pixels on a side")
  return image


def _limit_scans(jpeg: bytes) -> None:
  """Refuses a JPEG of very many scans or other segments."""
  scans = segments = 0
  start = 2
  while (match := _JPEG_MARKER.search(jpeg, start)) and match[0] != b"\xff\xd9":
    scans += match[0] == b"\xff\xda"
    segments += 1
    _limit(scans, MAX_SCANS, "scans")
    _limit(segments, _MAX_SEGMENTS, "segments")
    start = match.end() + int.from_bytes(jpeg[match.end() : match.end() + 2])


def _limit(number: int, limit: int, unit: str) -> None:
  if number > limit:
    detail = f"{number} {unit}, and the limit is {limit}"
    raise records.BadRecord("image_too_large", detail)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Suppresses PIL's warnings; nothing slow belongs inside, as threads wait."""
  with _WARNINGS_LOCK, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield


def _as_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):
    # PIL's own conversion clips at 255 instead of scaling.
    values = np.clip(np.asarray(image), 0, 65535)
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
  if not image.has_transparency_data:
    return image if image.mode == "RGB" else image.convert("RGB")
  page = Image.new("RGBA", image.size, "white")
  page.alpha_composite(image.convert("RGBA"))
  return page.convert("RGB")
