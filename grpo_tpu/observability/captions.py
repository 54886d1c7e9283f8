"""Pictures with words under them, as a sample is looked at in TensorBoard."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Smaller pictures are enlarged by a whole number, pixel by pixel.
_MIN_WIDTH = 320
_CHARACTERS_PER_LINE = 32
_MAX_LINES = 12


def captioned(image: np.ndarray, texts: Sequence[str]) -> np.ndarray:
  """The picture over a white strip with the texts.

  Args:
    image: uint8 [height, width, 3].
    texts: Each begins a line of its own. What is too long for the strip is cut.

  Returns:
    uint8 [1, height', width', 3], as an image summary wants it.
  """
  times = -(-_MIN_WIDTH // image.shape[1])
  picture = image.repeat(times, axis=0).repeat(times, axis=1)
  width = picture.shape[1]
  size = width / (
    0.62 * _CHARACTERS_PER_LINE
  )  # Of a letter, most are 0.6 wide.
  lines = [
    line
    for text in texts
    for line in textwrap.wrap(text, _CHARACTERS_PER_LINE) or [""]
  ]
  if len(lines) > _MAX_LINES:
    lines = [*lines[: _MAX_LINES - 1], "..."]
  line_height = round(1.35 * size)
  strip = Image.new("RGB", (width, line_height * len(lines) + 8), "white")
  draw = ImageDraw.Draw(strip)
  font = ImageFont.load_default(size)
  for index, line in enumerate(lines):
    draw.text((6, 4 + index * line_height), line, fill="black", font=font)
  return np.concatenate([picture, np.asarray(strip)])[None]
