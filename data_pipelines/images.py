"""Published picture bytes to RGB pixels, the same on every host.

Knows nothing of models: what a vision tower does with pixel values is its own
affair.
"""

import contextlib
import hashlib
import io
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image

from data_pipelines import records

MAX_PIXELS = 50_000_000

_WARNINGS_LOCK = threading.Lock()

_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode(image_bytes: bytes) -> np.ndarray:
  """The picture as a viewer shows it on a white page.

  Args:
    image_bytes: An encoded picture in any format and mode that PIL reads; the
      format is found from the bytes, never from a file name.

  Returns:
    uint8 [height, width, 3]: upright by its EXIF orientation, transparency
    composited over white, grey and CMYK as RGB, 16 bits scaled to 8.

  Raises:
    BadRecord: "image_too_large" above `MAX_PIXELS`, found before any pixel is
      decoded; "undecodable_image" for what is corrupt or truncated.
  """
  try:
    image = _opened(image_bytes)
    image.load()
    orientation = _orientation(image)
    rgb = _as_rgb(image)
    if orientation in _UPRIGHT:
      rgb = rgb.transpose(_UPRIGHT[orientation])
    return np.asarray(rgb)
  except records.BadRecord:
    raise
  # On damaged bytes PIL's decoders raise nearly every kind of exception.
  except Exception as error:
    raise records.BadRecord(
      "undecodable_image", f"{type(error).__name__}: {error}"
    ) from error


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """The whole picture squashed to uint8 [size, size, 3], bilinear."""
  square = Image.fromarray(image).resize(
    (size, size), Image.Resampling.BILINEAR
  )
  return np.asarray(square)


def pixel_hash(image: np.ndarray) -> str:
  """Equal for equal pixels, however they were encoded."""
  digest = hashlib.sha256(f"{image.shape}".encode())
  digest.update(np.ascontiguousarray(image))
  return digest.hexdigest()


def _opened(image_bytes: bytes) -> Image.Image:
  """The picture with only its header read, or a refusal by its size."""
  with _silence():
    try:
      image = Image.open(io.BytesIO(image_bytes))
    except Image.DecompressionBombError as error:
      raise records.BadRecord("image_too_large", str(error)) from error
  if image.width * image.height > MAX_PIXELS:
    raise records.BadRecord(
      "image_too_large",
      f"{image.width} x {image.height} is above {MAX_PIXELS} pixels",
    )
  return image


def _orientation(image: Image.Image) -> int:
  """1 (upright) where the EXIF block is absent or damaged."""
  with _silence():
    try:
      return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL's EXIF reader raises as freely as its decoders.
      return 1


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Keeps PIL from warning of damaged metadata and of large pictures.

  Under a lock, since `warnings.catch_warnings` swaps a list that all threads
  share; so nothing slow belongs inside.
  """
  with _WARNINGS_LOCK, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield


def _as_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I"):
    # PIL's own conversion clips at 255 instead of scaling.
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
  if not image.has_transparency_data:
    return image.convert("RGB")
  page = Image.new("RGBA", image.size, "white")
  page.alpha_composite(image.convert("RGBA"))
  return page.convert("RGB")
