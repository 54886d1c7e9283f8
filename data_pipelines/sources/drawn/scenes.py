"""The scenes of synthetic problems, and the questions about each.

A scene draws an image and returns its facts. Questions are answered from these
facts alone, never from the pixels, so every answer is exact. Answers are drawn
evenly where possible, so that no constant answer does well. The words are in
scenes.toml.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from data_pipelines.sources.drawn import drawing
from data_pipelines.sources.drawn.drawing import Canvas
from data_pipelines.text import tables

_WORDS = tables.read("data_pipelines.sources.drawn", "scenes.toml")


class Question(NamedTuple):
  """A question about an image, before options are drawn for it."""

  text: str
  answer: str
  answer_type: str  # "text", "integer", "float" or "list".
  pool: tuple[str, ...]  # Other possible answers; () for no options.
  solution: str = ""  # The working, or "" where one look answers.
  unit: str = ""
  precision: int = -1  # Decimal places of a float.


class Scene(NamedTuple):
  """A way to draw images, and the kinds of question that they answer."""

  name: str
  draw: Callable[[Canvas], Any]  # Draws on the canvas and returns the facts.
  questions: dict[str, Callable[[Canvas, Any], Question]]  # By kind.

  @property
  def labels(self) -> dict[str, Any]:
    """MathVista's names for such problems."""
    return _WORDS["scenes"][self.name]


def _wording(canvas: Canvas, kind: str, **words: str) -> str:
  """The text of a question, in one of its wordings."""
  return canvas.wording(_WORDS["wordings"][kind]).format(**words)


def _ask_word(
  text: str, answer: str, words: Iterable[str], solution: str = ""
) -> Question:
  """Asks for one of the words."""
  pool = tuple(word for word in words if word != answer)
  return Question(text, answer, "text", pool, solution)


def _ask_integer(
  text: str,
  answer: int,
  values: Iterable[int],
  solution: str = "",
  unit: str = "",
) -> Question:
  """Asks for one of the whole numbers."""
  pool = tuple(str(value) for value in values if value != answer)
  return Question(text, str(answer), "integer", pool, solution, unit)


def _ask_float(
  text: str,
  parts: int,
  values: Iterable[int],
  *,
  parts_of_one: int,
  precision: int,
  solution: str = "",
  unit: str = "",
) -> Question:
  """Asks for a number given in whole parts of one, which keeps it exact."""
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
  text = _wording(canvas, "color", shape=shape)
  return _ask_word(text, color, drawing.COLORS)


def _ask_shape(canvas: Canvas, facts: list[tuple[str, str]]) -> Question:
  shape, color = facts[0]
  text = _wording(canvas, "shape", color=color)
  return _ask_word(text, shape, drawing.SHAPES)


# Many shapes, some of them to be counted.


class _ShapeCounts(NamedTuple):
  name: str  # The objects to be counted.
  num_asked: int
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
  text = _wording(canvas, "count", objects=facts.name)
  counts = range(_least_count(canvas.level), canvas.level.max_count + 1)
  return _ask_integer(text, facts.num_asked, counts)


def _ask_total(canvas: Canvas, facts: _ShapeCounts) -> Question:
  total = facts.num_asked + facts.num_others
  text = _wording(canvas, "total")
  solution = ""
  if facts.num_others:
    solution = f"{facts.num_asked} + {facts.num_others} = {total}."
  most = canvas.level.max_count + canvas.level.num_distractors
  return _ask_integer(text, total, range(1, most + 1), solution)


# Colored values, as bars or as a table.


@dataclasses.dataclass(frozen=True)
class _Values:
  colors: list[str]
  values: list[int]
  most: int  # The largest value that could have been.


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
  text = _wording(canvas, "bar_value", color=facts.colors[asked])
  return _ask_integer(text, facts.values[asked], range(1, facts.most + 1))


def _ask_bar_max(canvas: Canvas, facts: _Bars) -> Question:
  text = _wording(canvas, "bar_max")
  color = facts.colors[facts.values.index(max(facts.values))]
  pairs = zip(facts.colors, facts.values, strict=True)
  solution = ", ".join(f"{color} {value}" for color, value in pairs) + "."
  return _ask_word(text, color, facts.colors, solution)


def _ask_bar_difference(canvas: Canvas, facts: _Bars) -> Question:
  high, low = facts.values[facts.high], facts.values[facts.low]
  names = {"high": facts.colors[facts.high], "low": facts.colors[facts.low]}
  text = _wording(canvas, "bar_difference", **names)
  solution = f"{high} - {low} = {high - low}."
  return _ask_integer(text, high - low, range(1, facts.most), solution)


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
  text = _wording(canvas, "table_value", color=facts.colors[asked])
  return _ask_integer(text, facts.values[asked], range(1, facts.most + 1))


def _ask_table_sum(canvas: Canvas, facts: _Values) -> Question:
  first, second = canvas.pick(range(len(facts.colors)), 2)
  one, other = facts.values[first], facts.values[second]
  names = {"first": facts.colors[first], "second": facts.colors[second]}
  text = _wording(canvas, "table_sum", **names)
  solution = f"{one} + {other} = {one + other}."
  sums = range(2, 2 * facts.most + 1)
  return _ask_integer(text, one + other, sums, solution)


def _ask_table_list(canvas: Canvas, facts: _Values) -> Question:
  text = _wording(canvas, "table_list")
  return Question(text, str(facts.values), "list", ())


# A table of prices in quarters, or of weights in tenths.


class _Decimals(NamedTuple):
  color: str  # The row that is asked about.
  parts: int  # The row's value, in quarters or tenths.
  most: int  # The largest value that could have been.
  parts_of_one: int  # 4 or 10.
  precision: int  # Decimal places.


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
  return _Decimals(colors[asked], parts[asked], most, parts_of_one, precision)


def _ask_decimal(
  canvas: Canvas, facts: _Decimals, *, kind: str, unit: str
) -> Question:
  return _ask_float(
    _wording(canvas, kind, color=facts.color),
    facts.parts,
    range(facts.parts_of_one, facts.most + 1),
    parts_of_one=facts.parts_of_one,
    precision=facts.precision,
    unit=unit,
  )


# A clock.


class _Clock(NamedTuple):
  hour: int
  minute: int
  minutes: range  # The minutes that could have been.


def _draw_clock(canvas: Canvas) -> _Clock:
  # On a small image the hand's tip moves less than two pixels a minute.
  step = max(canvas.level.minute_step, 1 if canvas.size >= 64 else 5)
  hour, minute = canvas.integer(1, 12), step * canvas.index(60 // step)
  drawing.draw_clock(canvas, hour=hour, minute=minute)
  return _Clock(hour, minute, range(0, 60, step))


def _ask_clock_hour(canvas: Canvas, facts: _Clock) -> Question:
  text = _wording(canvas, "clock_hour")
  return _ask_integer(text, facts.hour, range(1, 13))


def _ask_clock_minutes(canvas: Canvas, facts: _Clock) -> Question:
  text = _wording(canvas, "clock_minutes")
  return _ask_integer(text, facts.minute, facts.minutes, unit="minutes")


def _ask_clock_time(canvas: Canvas, facts: _Clock) -> Question:
  text = _wording(canvas, "clock_time")
  times = (f"{hour}:{m:02d}" for hour in range(1, 13) for m in facts.minutes)
  return _ask_word(text, f"{facts.hour}:{facts.minute:02d}", times)


# A grid of dots, some of them black.


class _Dots(NamedTuple):
  rows: int
  columns: int
  total: int
  num_black: int


def _draw_dots(canvas: Canvas) -> _Dots:
  sides = range(2, canvas.level.max_side + 1)
  # Evenly over the totals, then over the grids that have the total.
  totals = sorted({rows * columns for rows in sides for columns in sides})
  total = totals[canvas.index(len(totals))]
  [rows] = canvas.pick([n for n in sides if total / n in sides], 1)
  # No halves: 1/8 could be rounded to 0.12 or to 0.13.
  clear = [n for n in range(1, total) if 200 * n % (2 * total) != total]
  [num_black] = canvas.pick(clear, 1)
  facts = _Dots(rows, total // rows, total, num_black)
  black = set(canvas.pick(range(total), num_black))
  drawing.draw_dots(canvas, facts.rows, facts.columns, black)
  return facts


def _ask_dot_total(canvas: Canvas, facts: _Dots) -> Question:
  text = _wording(canvas, "dot_total")
  solution = f"{facts.rows} x {facts.columns} = {facts.total}."
  totals = range(4, canvas.level.max_side**2 + 1)
  return _ask_integer(text, facts.total, totals, solution)


def _ask_dot_black(canvas: Canvas, facts: _Dots) -> Question:
  text = _wording(canvas, "dot_black")
  return _ask_integer(text, facts.num_black, range(1, facts.total))


def _ask_dot_fraction(canvas: Canvas, facts: _Dots) -> Question:
  fraction = facts.num_black / facts.total
  return _ask_float(
    _wording(canvas, "dot_fraction"),
    facts.num_black,
    range(1, facts.total),
    parts_of_one=facts.total,
    precision=2,
    solution=f"{facts.num_black} / {facts.total} = {fraction:.2f}.",
  )


SCENES = (
  Scene("shapes", _draw_shapes, {"color": _ask_color, "shape": _ask_shape}),
  Scene(
    "counted_shapes",
    _draw_counted_shapes,
    {"count": _ask_count, "total": _ask_total},
  ),
  Scene(
    "bars",
    _draw_bars,
    {
      "bar_value": _ask_bar_value,
      "bar_max": _ask_bar_max,
      "bar_difference": _ask_bar_difference,
    },
  ),
  Scene(
    "table",
    _draw_table,
    {
      "table_value": _ask_table_value,
      "table_sum": _ask_table_sum,
      "table_list": _ask_table_list,
    },
  ),
  Scene(
    "prices",
    functools.partial(_draw_decimals, parts_of_one=4, precision=2),
    {"price": functools.partial(_ask_decimal, kind="price", unit="$")},
  ),
  Scene(
    "weights",
    functools.partial(_draw_decimals, parts_of_one=10, precision=1),
    {"weight": functools.partial(_ask_decimal, kind="weight", unit="kg")},
  ),
  Scene(
    "clock",
    _draw_clock,
    {
      "clock_hour": _ask_clock_hour,
      "clock_minutes": _ask_clock_minutes,
      "clock_time": _ask_clock_time,
    },
  ),
  Scene(
    "dots",
    _draw_dots,
    {
      "dot_total": _ask_dot_total,
      "dot_black": _ask_dot_black,
      "dot_fraction": _ask_dot_fraction,
    },
  ),
)
