"""What drawn problems show, and what can be asked of it.

A scene draws a picture and hands on the facts it drew; a question is answered
from those facts alone, never from the pixels, so every answer is exact. Where
it can be had, answers are drawn evenly: no constant answer does well.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

from data_pipelines.sources import drawing

Canvas = drawing.Canvas


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked of a picture, before options are drawn for it.

  Attributes:
    text: The question in plain English.
    answer: As it should be written.
    answer_type: "text", "integer", "float" or "list".
    pool: Other answers that the question could have had; without them it
      cannot be asked with options.
    solution: The working, or "" where one look answers.
    unit: What a number is measured in, or "".
    precision: Decimal places of a float, or -1.
  """

  text: str
  answer: str
  answer_type: str
  pool: tuple[str, ...]
  solution: str = ""
  unit: str = ""
  precision: int = -1


@dataclasses.dataclass(frozen=True)
class Scene:
  """A way to draw pictures, and the kinds of question that they answer.

  Attributes:
    drawn: Draws on the canvas and returns the facts.
    questions: For each kind, what it asks of those facts.
    category: MathVista's words for such a problem, as are the next three.
    context: The sort of picture.
    task: The sort of problem.
    skills: What answering takes.
  """

  drawn: Callable[[Canvas], Any]
  questions: dict[str, Callable[[Canvas, Any], Question]]
  category: str
  context: str
  task: str
  skills: tuple[str, ...]


def _word(
  text: str, answer: str, words: Iterable[str], solution: str = ""
) -> Question:
  pool = tuple(word for word in words if word != answer)
  return Question(text, answer, "text", pool, solution)


def _integer(
  text: str,
  answer: int,
  values: Iterable[int],
  *,
  solution: str = "",
  unit: str = "",
) -> Question:
  pool = tuple(str(value) for value in values if value != answer)
  return Question(text, str(answer), "integer", pool, solution, unit)


def _float(
  text: str,
  parts: int,
  values: Iterable[int],
  *,
  parts_of_one: int,
  precision: int,
  solution: str = "",
  unit: str = "",
) -> Question:
  """An answer of so many parts, and a pool of others, kept exact by it."""
  answer = f"{parts / parts_of_one:.{precision}f}"
  written = (f"{value / parts_of_one:.{precision}f}" for value in values)
  pool = tuple(other for other in dict.fromkeys(written) if other != answer)
  return Question(text, answer, "float", pool, solution, unit, precision)


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
  return _word(text, color, drawing.COLORS)


def _ask_shape(canvas: Canvas, facts: list[tuple[str, str]]) -> Question:
  shape, color = facts[0]
  text = canvas.wording(
    f"What shape is {color}?", f"Which shape has the color {color}?"
  )
  return _word(text, shape, drawing.SHAPES)


# A crowd of shapes, some of them to be counted.


@dataclasses.dataclass(frozen=True)
class _Crowd:
  named: str  # The objects to be counted.
  count: int
  num_others: int


def _draw_crowd(canvas: Canvas) -> _Crowd:
  level = canvas.level
  shape, other_shape = canvas.pick(drawing.SHAPES[:3], 2)
  color, *other_colors = canvas.colors(level.num_colors)
  most_others = level.num_distractors
  # None is an answer too where the question says which objects to count.
  least = 0 if len(level.counts_by) > 1 else 1
  count = canvas.between(least, level.max_count)
  num_others = canvas.between(min(1, most_others), most_others)
  side = math.isqrt(level.max_count + most_others - 1) + 1
  cells = canvas.pick(range(side * side), count + num_others)
  for i, cell in enumerate(cells):
    seen = {"shape": shape, "color": color}
    if i >= count:
      differs = level.counts_by[canvas.below(len(level.counts_by))]
      others = {"shape": [other_shape], "color": other_colors}[differs]
      seen[differs] = others[canvas.below(len(others))]
    drawing.draw_shape(canvas, **seen, cell=cell, side=side)
  words = [color] if "color" in level.counts_by else []
  words.append(f"{shape}s" if "shape" in level.counts_by else "shapes")
  return _Crowd(" ".join(words), count, num_others)


def _ask_count(canvas: Canvas, facts: _Crowd) -> Question:
  text = canvas.wording(
    f"How many {facts.named} are there?",
    f"Count the {facts.named}. How many are there?",
  )
  least = 0 if len(canvas.level.counts_by) > 1 else 1
  counts = range(least, canvas.level.max_count + 1)
  return _integer(text, facts.count, counts)


def _ask_total(canvas: Canvas, facts: _Crowd) -> Question:
  total = facts.count + facts.num_others
  text = canvas.wording(
    "How many shapes are there?", "How many shapes are in the picture?"
  )
  solution = ""
  if facts.num_others:
    solution = f"{facts.count} + {facts.num_others} = {total}."
  most = canvas.level.max_count + canvas.level.num_distractors
  return _integer(text, total, range(1, most + 1), solution=solution)


# Colored values, as bars or as a table.


@dataclasses.dataclass(frozen=True)
class _Values:
  colors: list[str]
  values: list[int]
  most: int  # The largest value that could have been.

  @property
  def listed(self) -> str:
    pairs = zip(self.colors, self.values, strict=True)
    return ", ".join(f"{color} {value}" for color, value in pairs) + "."


@dataclasses.dataclass(frozen=True)
class _Bars(_Values):
  high: int  # The place of one bar,
  low: int  # and of a shorter one; their difference is evenly distributed.


def _draw_bars(canvas: Canvas) -> _Bars:
  count = canvas.level.num_rows
  # A unit is at least two pixels high, or it could not be read off.
  most = min(canvas.level.max_value, (canvas.size - 4) // 2)
  difference = canvas.between(1, most - 1)
  low = canvas.between(1, most - difference)
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
  # The values of the pair follow from their difference: ask about another.
  asked = next(
    i for i in range(len(facts.values)) if i not in (facts.high, facts.low)
  )
  color = facts.colors[asked]
  text = canvas.wording(
    f"What is the value of the {color} bar?", f"How tall is the {color} bar?"
  )
  return _integer(text, facts.values[asked], range(1, facts.most + 1))


def _ask_bar_max(canvas: Canvas, facts: _Bars) -> Question:
  text = canvas.wording(
    "What color is the tallest bar?", "Which bar has the largest value?"
  )
  color = facts.colors[facts.values.index(max(facts.values))]
  return _word(text, color, facts.colors, facts.listed)


def _ask_bar_difference(canvas: Canvas, facts: _Bars) -> Question:
  high, low = facts.values[facts.high], facts.values[facts.low]
  one, other = facts.colors[facts.high], facts.colors[facts.low]
  text = canvas.wording(
    f"How much taller is the {one} bar than the {other} bar?",
    f"What is the value of the {one} bar minus that of the {other} bar?",
  )
  solution = f"{high} - {low} = {high - low}."
  return _integer(text, high - low, range(1, facts.most), solution=solution)


def _draw_table(canvas: Canvas) -> _Values:
  count, most = _num_rows(canvas), canvas.level.max_value
  values = [canvas.between(1, most) for _ in range(count)]
  facts = _Values(canvas.colors(count), values, most)
  drawing.draw_rows(canvas, facts.colors, [str(value) for value in values])
  return facts


def _num_rows(canvas: Canvas) -> int:
  """As many as the level asks for and digits of five pixels allow."""
  return min(canvas.level.num_rows, canvas.size // 7)


def _ask_table_value(canvas: Canvas, facts: _Values) -> Question:
  asked = canvas.below(len(facts.colors))
  color = facts.colors[asked]
  text = canvas.wording(
    f"What number is next to {color}?", f"Which value does {color} have?"
  )
  return _integer(text, facts.values[asked], range(1, facts.most + 1))


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
  return _integer(text, one + other, sums, solution=solution)


def _ask_table_list(canvas: Canvas, facts: _Values) -> Question:
  text = canvas.wording(
    "What are the numbers from top to bottom?",
    "List the numbers from top to bottom.",
  )
  return Question(text, str(facts.values), "list", ())


# A table of prices in quarters, or of weights in tenths.


@dataclasses.dataclass(frozen=True)
class _Decimals:
  color: str  # The row that is asked about,
  parts: int  # its value, counted in quarters or tenths,
  most: int  # and the most it could have been.


def _draw_decimals(
  canvas: Canvas, *, parts_of_one: int, precision: int
) -> _Decimals:
  count = _num_rows(canvas)
  most = min(9, canvas.level.max_value) * parts_of_one
  parts = [canvas.between(parts_of_one, most) for _ in range(count)]
  colors = canvas.colors(count)
  cells = [f"{part / parts_of_one:.{precision}f}" for part in parts]
  drawing.draw_rows(canvas, colors, cells)
  asked = canvas.below(count)
  return _Decimals(colors[asked], parts[asked], most)


def _ask_price(canvas: Canvas, facts: _Decimals) -> Question:
  text = canvas.wording(
    f"What is the price of {facts.color}?",
    f"How much does {facts.color} cost?",
  )
  prices = range(4, facts.most + 1)
  return _float(
    text, facts.parts, prices, parts_of_one=4, precision=2, unit="$"
  )


def _ask_weight(canvas: Canvas, facts: _Decimals) -> Question:
  text = canvas.wording(
    f"What is the weight of {facts.color}?", f"How heavy is {facts.color}?"
  )
  weights = range(10, facts.most + 1)
  return _float(
    text, facts.parts, weights, parts_of_one=10, precision=1, unit="kg"
  )


# A clock.


@dataclasses.dataclass(frozen=True)
class _Clock:
  hour: int
  minute: int
  step: int  # Minutes are a multiple of it.


def _draw_clock(canvas: Canvas) -> _Clock:
  # On a small picture the hand's tip moves less than two pixels a minute.
  step = max(canvas.level.minute_step, 1 if canvas.size >= 64 else 5)
  facts = _Clock(canvas.between(1, 12), step * canvas.below(60 // step), step)
  half = canvas.size // 2
  radius = canvas.between(round(0.8 * half), half - 1)
  slack = half - 1 - radius
  x = half + canvas.between(-slack, slack)
  y = half + canvas.between(-slack, slack)

  def point(turn: float, length: float) -> tuple[int, int]:
    angle = 2 * math.pi * turn
    return (
      x + round(length * radius * math.sin(angle)),
      y - round(length * radius * math.cos(angle)),
    )

  box = (x - radius, y - radius, x + radius, y + radius)
  canvas.draw.ellipse(box, drawing.WHITE, drawing.INK)
  for tick in range(12):
    ends = (point(tick / 12, 0.85), point(tick / 12, 0.95))
    canvas.draw.line(ends, drawing.INK)
  width, turn = max(1, canvas.size // 32), facts.minute / 60
  hour_hand = ((x, y), point((facts.hour + turn) / 12, 0.5))
  canvas.draw.line(((x, y), point(turn, 0.8)), canvas.shade("blue"), width)
  canvas.draw.line(hour_hand, canvas.shade("red"), 2 * width)
  return facts


def _ask_clock_hour(canvas: Canvas, facts: _Clock) -> Question:
  text = canvas.wording(
    "What is the hour on the clock?",
    "The red hand is the hour hand. Which hour does the clock show?",
  )
  return _integer(text, facts.hour, range(1, 13))


def _ask_clock_minutes(canvas: Canvas, facts: _Clock) -> Question:
  text = canvas.wording(
    "How many minutes past the hour is it?",
    "The blue hand is the minute hand. How many minutes does it show?",
  )
  minutes = range(0, 60, facts.step)
  return _integer(text, facts.minute, minutes, unit="minutes")


def _ask_clock_time(canvas: Canvas, facts: _Clock) -> Question:
  text = canvas.wording("What time is it?", "What time does the clock show?")
  minutes = range(0, 60, facts.step)
  times = (f"{hour}:{m:02d}" for hour in range(1, 13) for m in minutes)
  return _word(text, f"{facts.hour}:{facts.minute:02d}", times)


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
  # Evenly over the totals, then over the ways to lay one out.
  totals = sorted({rows * columns for rows in sides for columns in sides})
  total = totals[canvas.below(len(totals))]
  [rows] = canvas.pick([n for n in sides if total / n in sides], 1)
  # 1/8 lies halfway between 0.12 and 0.13: who is to say how it is rounded?
  clear = [n for n in range(1, total) if 200 * n % (2 * total) != total]
  [num_black] = canvas.pick(clear, 1)
  facts = _Dots(rows, total // rows, num_black)
  black = set(canvas.pick(range(total), num_black))
  cell = canvas.size // max(rows, facts.columns)
  left = canvas.between(0, canvas.size - facts.columns * cell)
  top = canvas.between(0, canvas.size - rows * cell)
  inset = max(1, cell // 8)
  for i in range(total):
    x, y = left + i % facts.columns * cell, top + i // facts.columns * cell
    box = (x + inset, y + inset, x + cell - inset - 1, y + cell - inset - 1)
    fill = drawing.INK if i in black else drawing.WHITE
    canvas.draw.ellipse(box, fill, drawing.INK)
  return facts


def _ask_dot_total(canvas: Canvas, facts: _Dots) -> Question:
  text = canvas.wording(
    "How many dots are there?", "Count all the dots. How many are there?"
  )
  solution = f"{facts.rows} x {facts.columns} = {facts.total}."
  totals = range(4, canvas.level.max_side**2 + 1)
  return _integer(text, facts.total, totals, solution=solution)


def _ask_dot_black(canvas: Canvas, facts: _Dots) -> Question:
  text = canvas.wording(
    "How many dots are black?", "Count the black dots. How many are there?"
  )
  return _integer(text, facts.num_black, range(1, facts.total))


def _ask_dot_fraction(canvas: Canvas, facts: _Dots) -> Question:
  text = canvas.wording(
    "What fraction of the dots is black?", "Which share of the dots is black?"
  )
  fraction = facts.num_black / facts.total
  return _float(
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
    _draw_crowd,
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
