"""A canvas for synthetic problems: randomness, colors, shapes and digits.

Knows nothing of questions. No font file is read, because fonts differ
between machines: the few digits that an image needs come from a bitmap.
"""

import dataclasses
import functools
import math
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.text import tables

_TABLES = tables.read("data_pipelines.sources.drawn", "drawing.toml")
COLORS = {name: tuple(color) for name, color in _TABLES["colors"].items()}
SHAPES = tuple(_TABLES["shapes"])
INK, FAINT, WHITE = (40, 40, 40), (200, 200, 200), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Level:
  """The numbers behind one difficulty."""

  num_colors: int
  num_shapes: int  # Shapes in an image of different shapes.
  max_count: int  # Objects to count.
  num_distractors: int  # Objects not to count, at most.
  max_value: int  # The largest value of a bar or of a table's cell.
  num_rows: int  # Bars, or rows of a table.
  minute_step: int
  max_side: int  # Rows and columns of a dot grid.
  max_shade: int  # How far a color may change, in grey levels.
  wordings: int  # Ways to ask one thing, at most.
  counts_by: list[str]  # How the counted objects differ from others.


LEVELS = {int(n): Level(**level) for n, level in _TABLES["levels"].items()}


@dataclasses.dataclass(frozen=True)
class Canvas:
  """An unfinished square image, with its randomness and its difficulty."""

  image: Image.Image
  draw: ImageDraw.ImageDraw  # Draws on `image`.
  rng: np.random.Generator  # For the image and the question about it.
  level: Level

  @property
  def size(self) -> int:
    """The side of the image, in pixels."""
    return self.image.width

  def index(self, count: int) -> int:
    """A random index below `count`."""
    return int(self.rng.integers(count))

  def integer(self, low: int, high: int) -> int:
    """A random number from low to high."""
    return int(self.rng.integers(low, high + 1))

  def pick(self, items: Sequence[Any], count: int) -> list[Any]:
    """Picks `count` different items in random order."""
    return [items[i] for i in self.rng.permutation(len(items))[:count]]

  def wording(self, texts: Sequence[str]) -> str:
    """One of the texts, among as many as the level uses."""
    return texts[self.index(min(len(texts), self.level.wordings))]

  def colors(self, count: int) -> list[str]:
    """Different color names, among those that the level uses."""
    return self.pick(list(COLORS)[: self.level.num_colors], count)

  def shade(self, color: str) -> tuple[int, ...]:
    """The color, randomly changed as far as the level allows."""
    most = self.level.max_shade
    if not most:
      return COLORS[color]
    stray = self.rng.integers(-most, most + 1, 3)
    return tuple(np.clip(COLORS[color] + stray, 0, 255).tolist())


def make_canvas(
  rng: np.random.Generator, *, size: int, difficulty: int
) -> Canvas:
  """An empty square canvas, `size` pixels wide."""
  # A random tint makes images of few objects differ.
  image = Image.new("RGB", (size, size), tuple(rng.integers(236, 256, 3)))
  return Canvas(image, ImageDraw.Draw(image), rng, LEVELS[difficulty])


def draw_shape(
  canvas: Canvas, *, shape: str, color: str, cell: int, side: int
) -> None:
  """Draws a shape of random size in a cell of a side x side grid."""
  width = canvas.size / side
  radius = max(2, canvas.integer(round(0.26 * width), round(0.42 * width)))
  # One pixel stays free, so that neighbors never touch.
  slack = max(0, int(width) - 2 * radius - 2)
  x = int(cell % side * width) + radius + canvas.integer(0, slack)
  y = int(cell // side * width) + radius + canvas.integer(0, slack)
  left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
  fill = canvas.shade(color)
  if shape == "circle":
    canvas.draw.ellipse((left, top, right, bottom), fill)
  elif shape == "square":
    canvas.draw.rectangle((left, top, right, bottom), fill)
  elif shape == "triangle":
    canvas.draw.polygon([(x, top), (right, bottom), (left, bottom)], fill)
  elif shape == "diamond":
    corners = [(x, top), (right, y), (x, bottom), (left, y)]
    canvas.draw.polygon(corners, fill)
  else:
    arm = max(1, radius // 3)
    canvas.draw.rectangle((x - arm, top, x + arm, bottom), fill)
    canvas.draw.rectangle((left, y - arm, right, y + arm), fill)


def draw_number(
  canvas: Canvas, text: str, *, x: int, y: int, scale: int
) -> None:
  """Draws digits of 3 x 5 pixels times scale, from the top left (x, y)."""
  for i, character in enumerate(text):
    at = (x + 4 * scale * i, y)
    canvas.draw.bitmap(at, _glyph(character, scale), INK)


def draw_rows(canvas: Canvas, colors: list[str], cells: list[str]) -> None:
  """Draws a table of two columns: a color swatch and a number."""
  size, height = canvas.size, canvas.size // len(cells)
  widest = max(len(cell) for cell in cells)
  scale = max(1, min(height // 8, size // 2 // (4 * widest)))
  middle = size // 2 - 1
  canvas.draw.line((middle - 2, 0, middle - 2, size), FAINT)
  for i, (color, cell) in enumerate(zip(colors, cells, strict=True)):
    top = i * height
    swatch = (2, top + 1, middle - 5, top + height - 2)
    canvas.draw.rectangle(swatch, canvas.shade(color))
    if i:
      canvas.draw.line((0, top - 1, size, top - 1), FAINT)
    y = top + max(0, (height - 5 * scale) // 2)
    draw_number(canvas, cell, x=middle, y=y, scale=scale)


def draw_bars(
  canvas: Canvas, colors: list[str], values: list[int], *, most: int
) -> None:
  """Draws bars over ruled lines, from 0 to most, in whole pixels per unit."""
  size = canvas.size
  unit, floor, scale = (size - 4) // most, size - 2, max(1, size // 64)
  margin = scale * 4 * len(str(most)) + 1
  step = next(step for step in (1, 2, 5, 10) if step * unit > 6 * scale)
  for tick in range(0, most + 1, step):
    y = floor - tick * unit
    canvas.draw.line((margin, y, size, y), FAINT)
    top = min(max(0, y - 2 * scale), size - 5 * scale)
    draw_number(canvas, str(tick), x=0, y=top, scale=scale)
  slot = (size - margin) / len(values)
  for i, (color, value) in enumerate(zip(colors, values, strict=True)):
    x = margin + int(slot * (i + 0.15))
    box = (x, floor - value * unit, x + int(0.7 * slot), floor)
    canvas.draw.rectangle(box, canvas.shade(color))


def draw_clock(canvas: Canvas, *, hour: int, minute: int) -> None:
  """Draws a clock of random size: hour hand red, minute hand blue."""
  half = canvas.size // 2
  radius = canvas.integer(round(0.8 * half), half - 1)
  slack = half - 1 - radius
  x = half + canvas.integer(-slack, slack)
  y = half + canvas.integer(-slack, slack)

  def point(turn: float, length: float) -> tuple[int, int]:
    angle = 2 * math.pi * turn
    return (
      x + round(length * radius * math.sin(angle)),
      y - round(length * radius * math.cos(angle)),
    )

  box = (x - radius, y - radius, x + radius, y + radius)
  canvas.draw.ellipse(box, WHITE, INK)
  for tick in range(12):
    ends = (point(tick / 12, 0.85), point(tick / 12, 0.95))
    canvas.draw.line(ends, INK)
  width, turn = max(1, canvas.size // 32), minute / 60
  hour_hand = ((x, y), point((hour + turn) / 12, 0.5))
  canvas.draw.line(((x, y), point(turn, 0.8)), canvas.shade("blue"), width)
  canvas.draw.line(hour_hand, canvas.shade("red"), 2 * width)


def draw_dots(
  canvas: Canvas, rows: int, columns: int, black: Container[int]
) -> None:
  """Draws a grid of dots, black at these indices and white elsewhere."""
  cell = canvas.size // max(rows, columns)
  left = canvas.integer(0, canvas.size - columns * cell)
  top = canvas.integer(0, canvas.size - rows * cell)
  inset = max(1, cell // 8)
  for i in range(rows * columns):
    x, y = left + i % columns * cell, top + i // columns * cell
    box = (x + inset, y + inset, x + cell - inset - 1, y + cell - inset - 1)
    fill = INK if i in black else WHITE
    canvas.draw.ellipse(box, fill, INK)


@functools.cache
def _glyph(character: str, scale: int) -> Image.Image:
  rows = [int(digit) for digit in _TABLES["glyphs"][character]]
  bits = [[row >> shift & 1 for shift in (2, 1, 0)] for row in rows]
  return Image.fromarray(
    np.kron(bits, np.full((scale, scale), 255)).astype(np.uint8)
  )
