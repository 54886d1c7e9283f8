"""Images with text below, for samples in TensorBoard."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.validation import printable

# Smaller images are enlarged by a whole number, pixel by pixel.
_MIN_WIDTH = 320
_CHARACTERS_PER_LINE = 32
_MAX_LINES = 12


def add_caption(image: np.ndarray, texts: Sequence[str]) -> np.ndarray:
  """Puts the texts on a white strip below a uint8 [height, width, 3] image.

  Each begins a new line, and has at most a third of the strip unless it is the
  last one. Lines that do not fit are dropped. Returns [1, height', width', 3].
  """
  scale = -(-_MIN_WIDTH // image.shape[1])
  enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
  width = enlarged.shape[1]
  # Most letters are 0.6 times as wide as the font size.
  size = width / (0.62 * _CHARACTERS_PER_LINE)
  lines = []
  for number, text in enumerate(texts, start=1):
    rest = max(_MAX_LINES - len(lines), 1)
    room = rest if number == len(texts) else _MAX_LINES // 3
    lines += textwrap.wrap(
      printable(" ".join(text.split())),
      _CHARACTERS_PER_LINE,
      max_lines=room,
      placeholder=" ...",
    ) or [""]
  line_height = round(1.35 * size)
  strip = Image.new("RGB", (width, line_height * len(lines) + 8), "white")
  draw = ImageDraw.Draw(strip)
  font = ImageFont.load_default(size)
  for index, line in enumerate(lines):
    draw.text((6, 4 + index * line_height), line, fill="black", font=font)
  return np.concatenate([enlarged, np.asarray(strip)])[None]
