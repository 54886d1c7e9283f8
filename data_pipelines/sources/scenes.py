"""The scenes of synthetic problems, and the questions about each.

A scene draws an image and returns its facts. Questions are answered from these
facts alone, never from the pixels, so every answer is exact. Answers are drawn
evenly where possible, so that no constant answer does well.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from data_pipelines.sources import drawing
from data_pipelines.sources.drawing import Canvas
from data_pipelines.sources.questions import (
  Question,
  ask_float,
  ask_integer,
  ask_word,
)


@dataclasses.dataclass(frozen=True)
class Scene:
  """A way to draw images, and the kinds of question that they answer."""

  draw: Callable[[Canvas], Any]  # Draws on the canvas and returns the facts.
  questions: dict[str, Callable[[Canvas, Any], Question]]  # By kind.
  # MathVista's names for such problems:
  category: str
  context: str
  task: str
  skills: tuple[str, ...]


# Different shapes, one of each color.


def _draw_shapes(canvas: Canvas) -> list[tuple[str, str]]:
  count = canvas.level.num_shapes
  side = math.isqrt(count - 1) + 1
  shapes = canvas.pick(drawing.SHAPES[: max(3, count)], count)
  colors = canvas.colors(count)
  cells = canvas.pick(range(side * side), count)
  for shape, color, cell in zip(shapes, colors, cells, strict=True):
    drawing.draw_shape(canvas, shape=shape, color=color, cell=cell, side=side)
  return list(zip(shapes, colors, strict=True))


def _ask_color(canvas: Canvas, facts: list[tuple[str, str]]) -> Question:
  shape, color = facts[0]
  text = canvas.wording(
    f"What color is the {shape}?",
    f"Which color does the {shape} have?",
    f"The {shape} is drawn in which color?",
  )
  return ask_word(text, color, drawing.COLORS)


def _ask_shape(canvas: Canvas, facts: list[tuple[str, str]]) -> Question:
  shape, color = facts[0]
  text = canvas.wording(
    f"What shape is {color}?", f"Which shape has the color {color}?"
  )
  return ask_word(text, shape, drawing.SHAPES)


# Many shapes, some of them to be counted.


@dataclasses.dataclass(frozen=True)
class _ShapeCounts:
  name: str  # The objects to be counted.
  count: int
  num_others: int


def _least_count(level: drawing.Level) -> int:
  """0 where the question says which objects to count, else 1."""
  return 0 if len(level.counts_by) > 1 else 1


def _draw_counted_shapes(canvas: Canvas) -> _ShapeCounts:
  level = canvas.level
  shape, other_shape = canvas.pick(drawing.SHAPES[:3], 2)
  color, *other_colors = canvas.colors(level.num_colors)
  most_others = level.num_distractors
  count = canvas.integer(_least_count(level), level.max_count)
  num_others = canvas.integer(min(1, most_others), most_others)
  side = math.isqrt(level.max_count + most_others - 1) + 1
  cells = canvas.pick(range(side * side), count + num_others)
  for i, cell in enumerate(cells):
    seen = {"shape": shape, "color": color}
    if i >= count:
      differs = level.counts_by[canvas.index(len(level.counts_by))]
      others = {"shape": [other_shape], "color": other_colors}[differs]
      seen[differs] = others[canvas.index(len(others))]
    drawing.draw_shape(canvas, **seen, cell=cell, side=side)
  words = [color] if "color" in level.counts_by else []
  words.append(f"{shape}s" if "shape" in level.counts_by else "shapes")
  return _ShapeCounts(" ".join(words), count, num_others)


def _ask_count(canvas: Canvas, facts: _ShapeCounts) -> Question:
  text = canvas.wording(
    f"How many {facts.name} are there?",
    f"Count the {facts.name}. How many are there?",
  )
  counts = range(_least_count(canvas.level), canvas.level.max_count + 1)
  return ask_integer(text, facts.count, counts)


def _ask_total(canvas: Canvas, facts: _ShapeCounts) -> Question:
  total = facts.count + facts.num_others
  text = canvas.wording(
    "How many shapes are there?", "How many shapes are in the picture?"
  )
  solution = ""
  if facts.num_others:
    solution = f"{facts.count} + {facts.num_others} = {total}."
  most = canvas.level.max_count + canvas.level.num_distractors
  return ask_integer(text, total, range(1, most + 1), solution)


# Colored values, as bars or as a table.


@dataclasses.dataclass(frozen=True)
class _Values:
  colors: list[str]
  values: list[int]
  most: int  # The largest value that could have been.

  @property
  def row_list(self) -> str:
    pairs = zip(self.colors, self.values, strict=True)
    return ", ".join(f"{color} {value}" for color, value in pairs) + "."


@dataclasses.dataclass(frozen=True)
class _Bars(_Values):
  high: int  # The index of one bar.
  low: int  # The index of a shorter bar; the difference is drawn evenly.


def _draw_bars(canvas: Canvas) -> _Bars:
  count = canvas.level.num_rows
  # A unit is at least two pixels high, so that it can be read.
  most = min(canvas.level.max_value, (canvas.size - 4) // 2)
  difference = canvas.integer(1, most - 1)
  low = canvas.integer(1, most - difference)
  pair = [low + difference, low]
  rest = [value for value in range(1, most + 1) if value not in pair]
  values = pair + canvas.pick(rest, count - 2)
  order = canvas.pick(range(count), count)
  facts = _Bars(
    colors=canvas.colors(count),
    values=[values[i] for i in order],
    most=most,
    high=order.index(0),
    low=order.index(1),
  )
  drawing.draw_bars(canvas, facts.colors, facts.values, most=most)
  return facts


def _ask_bar_value(canvas: Canvas, facts: _Bars) -> Question:
  # The values of the pair depend on their difference: ask about another bar.
  asked = next(
    i for i in range(len(facts.values)) if i not in (facts.high, facts.low)
  )
  color = facts.colors[asked]
  text = canvas.wording(
    f"What is the value of the {color} bar?", f"How tall is the {color} bar?"
  )
  return ask_integer(text, facts.values[asked], range(1, facts.most + 1))


def _ask_bar_max(canvas: Canvas, facts: _Bars) -> Question:
  text = canvas.wording(
    "What color is the tallest bar?", "Which bar has the largest value?"
  )
  color = facts.colors[facts.values.index(max(facts.values))]
  return ask_word(text, color, facts.colors, facts.row_list)


def _ask_bar_difference(canvas: Canvas, facts: _Bars) -> Question:
  high, low = facts.values[facts.high], facts.values[facts.low]
  one, other = facts.colors[facts.high], facts.colors[facts.low]
  text = canvas.wording(
    f"How much taller is the {one} bar than the {other} bar?",
    f"What is the value of the {one} bar minus that of the {other} bar?",
  )
  solution = f"{high} - {low} = {high - low}."
  return ask_integer(text, high - low, range(1, facts.most), solution)


def _draw_table(canvas: Canvas) -> _Values:
  count, most = _num_rows(canvas), canvas.level.max_value
  values = [canvas.integer(1, most) for _ in range(count)]
  facts = _Values(canvas.colors(count), values, most)
  drawing.draw_rows(canvas, facts.colors, [str(value) for value in values])
  return facts


def _num_rows(canvas: Canvas) -> int:
  """As many rows as the level asks for and digits of five pixels allow."""
  return min(canvas.level.num_rows, canvas.size // 7)


def _ask_table_value(canvas: Canvas, facts: _Values) -> Question:
  asked = canvas.index(len(facts.colors))
  color = facts.colors[asked]
  text = canvas.wording(
    f"What number is next to {color}?", f"Which value does {color} have?"
  )
  return ask_integer(text, facts.values[asked], range(1, facts.most + 1))


def _ask_table_sum(canvas: Canvas, facts: _Values) -> Question:
  first, second = canvas.pick(range(len(facts.colors)), 2)
  one, other = facts.values[first], facts.values[second]
  colors = facts.colors[first], facts.colors[second]
  text = canvas.wording(
    f"What is the sum of the numbers next to {colors[0]} and {colors[1]}?",
    f"What do {colors[0]} and {colors[1]} add up to?",
  )
  solution = f"{one} + {other} = {one + other}."
  sums = range(2, 2 * facts.most + 1)
  return ask_integer(text, one + other, sums, solution)


def _ask_table_list(canvas: Canvas, facts: _Values) -> Question:
  text = canvas.wording(
    "What are the numbers from top to bottom?",
    "List the numbers from top to bottom.",
  )
  return Question(text, str(facts.values), "list", ())


# A table of prices in quarters, or of weights in tenths.


@dataclasses.dataclass(frozen=True)
class _Decimals:
  color: str  # The row that is asked about.
  parts: int  # The row's value, in quarters or tenths.
  most: int  # The largest value that could have been.


def _draw_decimals(
  canvas: Canvas, *, parts_of_one: int, precision: int
) -> _Decimals:
  count = _num_rows(canvas)
  most = min(9, canvas.level.max_value) * parts_of_one
  parts = [canvas.integer(parts_of_one, most) for _ in range(count)]
  colors = canvas.colors(count)
  cells = [f"{part / parts_of_one:.{precision}f}" for part in parts]
  drawing.draw_rows(canvas, colors, cells)
  asked = canvas.index(count)
  return _Decimals(colors[asked], parts[asked], most)


def _ask_price(canvas: Canvas, facts: _Decimals) -> Question:
  text = canvas.wording(
    f"What is the price of {facts.color}?", f"How much does {facts.color} cost?"
  )
  prices = range(4, facts.most + 1)
  return ask_float(
    text, facts.parts, prices, parts_of_one=4, precision=2, unit="$"
  )


def _ask_weight(canvas: Canvas, facts: _Decimals) -> Question:
  text = canvas.wording(
    f"What is the weight of {facts.color}?", f"How heavy is {facts.color}?"
  )
  weights = range(10, facts.most + 1)
  return ask_float(
    text, facts.parts, weights, parts_of_one=10, precision=1, unit="kg"
  )


# A clock.


@dataclasses.dataclass(frozen=True)
class _Clock:
  hour: int
  minute: int
  step: int  # Minutes are a multiple of this.


def _draw_clock(canvas: Canvas) -> _Clock:
  # On a small image the hand's tip moves less than two pixels a minute.
  step = max(canvas.level.minute_step, 1 if canvas.size >= 64 else 5)
  facts = _Clock(canvas.integer(1, 12), step * canvas.index(60 // step), step)
  drawing.draw_clock(canvas, hour=facts.hour, minute=facts.minute)
  return facts


def _ask_clock_hour(canvas: Canvas, facts: _Clock) -> Question:
  text = canvas.wording(
    "What is the hour on the clock?",
    "The red hand is the hour hand. Which hour does the clock show?",
  )
  return ask_integer(text, facts.hour, range(1, 13))


def _ask_clock_minutes(canvas: Canvas, facts: _Clock) -> Question:
  text = canvas.wording(
    "How many minutes past the hour is it?",
    "The blue hand is the minute hand. How many minutes does it show?",
  )
  minutes = range(0, 60, facts.step)
  return ask_integer(text, facts.minute, minutes, unit="minutes")


def _ask_clock_time(canvas: Canvas, facts: _Clock) -> Question:
  text = canvas.wording("What time is it?", "What time does the clock show?")
  minutes = range(0, 60, facts.step)
  times = (f"{hour}:{m:02d}" for hour in range(1, 13) for m in minutes)
  return ask_word(text, f"{facts.hour}:{facts.minute:02d}", times)


# A grid of dots, some of them black.


@dataclasses.dataclass(frozen=True)
class _Dots:
  rows: int
  columns: int
  num_black: int

  @property
  def total(self) -> int:
    return self.rows * self.columns


def _draw_dots(canvas: Canvas) -> _Dots:
  sides = range(2, canvas.level.max_side + 1)
  # Evenly over the totals, then over the grids that have the total.
  totals = sorted({rows * columns for rows in sides for columns in sides})
  total = totals[canvas.index(len(totals))]
  [rows] = canvas.pick([n for n in sides if total / n in sides], 1)
  # No halves: 1/8 could be rounded to 0.12 or to 0.13.
  clear = [n for n in range(1, total) if 200 * n % (2 * total) != total]
  [num_black] = canvas.pick(clear, 1)
  facts = _Dots(rows, total // rows, num_black)
  black = set(canvas.pick(range(total), num_black))
  drawing.draw_dots(canvas, facts.rows, facts.columns, black)
  return facts


def _ask_dot_total(canvas: Canvas, facts: _Dots) -> Question:
  text = canvas.wording(
    "How many dots are there?", "Count all the dots. How many are there?"
  )
  solution = f"{facts.rows} x {facts.columns} = {facts.total}."
  totals = range(4, canvas.level.max_side**2 + 1)
  return ask_integer(text, facts.total, totals, solution)


def _ask_dot_black(canvas: Canvas, facts: _Dots) -> Question:
  text = canvas.wording(
    "How many dots are black?", "Count the black dots. How many are there?"
  )
  return ask_integer(text, facts.num_black, range(1, facts.total))


def _ask_dot_fraction(canvas: Canvas, facts: _Dots) -> Question:
  text = canvas.wording(
    "What fraction of the dots is black?", "Which share of the dots is black?"
  )
  fraction = facts.num_black / facts.total
  return ask_float(
    text,
    facts.num_black,
    range(1, facts.total),
    parts_of_one=facts.total,
    precision=2,
    solution=f"{facts.num_black} / {facts.total} = {fraction:.2f}.",
  )


SCENES = (
  Scene(
    _draw_shapes,
    {"color": _ask_color, "shape": _ask_shape},
    "general-vqa",
    "synthetic scene",
    "visual question answering",
    ("numeric commonsense",),
  ),
  Scene(
    _draw_counted_shapes,
    {"count": _ask_count, "total": _ask_total},
    "general-vqa",
    "synthetic scene",
    "visual question answering",
    ("arithmetic reasoning",),
  ),
  Scene(
    _draw_bars,
    {
      "bar_value": _ask_bar_value,
      "bar_max": _ask_bar_max,
      "bar_difference": _ask_bar_difference,
    },
    "general-vqa",
    "bar chart",
    "figure question answering",
    ("statistical reasoning",),
  ),
  Scene(
    _draw_table,
    {
      "table_value": _ask_table_value,
      "table_sum": _ask_table_sum,
      "table_list": _ask_table_list,
    },
    "math-targeted-vqa",
    "table",
    "math word problem",
    ("statistical reasoning", "arithmetic reasoning"),
  ),
  Scene(
    functools.partial(_draw_decimals, parts_of_one=4, precision=2),
    {"price": _ask_price},
    "math-targeted-vqa",
    "table",
    "math word problem",
    ("arithmetic reasoning",),
  ),
  Scene(
    functools.partial(_draw_decimals, parts_of_one=10, precision=1),
    {"weight": _ask_weight},
    "math-targeted-vqa",
    "table",
    "math word problem",
    ("numeric commonsense",),
  ),
  Scene(
    _draw_clock,
    {
      "clock_hour": _ask_clock_hour,
      "clock_minutes": _ask_clock_minutes,
      "clock_time": _ask_clock_time,
    },
    "general-vqa",
    "abstract scene",
    "visual question answering",
    ("numeric commonsense",),
  ),
  Scene(
    _draw_dots,
    {
      "dot_total": _ask_dot_total,
      "dot_black": _ask_dot_black,
      "dot_fraction": _ask_dot_fraction,
    },
    "math-targeted-vqa",
    "abstract scene",
    "figure question answering",
    ("arithmetic reasoning",),
  ),
)
