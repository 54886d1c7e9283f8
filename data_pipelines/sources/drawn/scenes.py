"""The scenes of synthetic problems, and the questions about each.

A scene draws an image, then asks about what it has drawn and never about the
pixels, so every answer is exact. Answers are drawn evenly where possible, so
that no constant answer does well. The words are in scenes.toml.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from data_pipelines.sources.drawn import drawing
from data_pipelines.sources.drawn.drawing import Canvas
from data_pipelines.text import tables

_WORDS = tables.read("data_pipelines.sources.drawn", "scenes.toml")
LABELS = _WORDS["scenes"]  # MathVista's names for problems of each scene.


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
  ask: Callable[[Canvas, str], Question]  # Draws; asks a question of a kind.
  kinds: tuple[str, ...]


def _wording(canvas: Canvas, kind: str, **words: str) -> str:
  """The text of a question, in one of its wordings."""
  return canvas.wording(_WORDS["wordings"][kind]).format(**words)


def _ask(
  text: str,
  answer: str | int,
  possible: Iterable[str | int],
  answer_type: str = "integer",
  **others: Any,
) -> Question:
  """Asks for one of the possible answers."""
  written = dict.fromkeys(map(str, possible))
  pool = tuple(each for each in written if each != str(answer))
  return Question(text, str(answer), answer_type, pool, **others)


def _ask_float(
  text: str,
  parts: int,
  possible: Iterable[int],
  *,
  parts_of_one: int,
  precision: int,
  **others: Any,
) -> Question:
  """Asks for a number given in whole parts of one, which keeps it exact."""
  answer, *written = (
    f"{value / parts_of_one:.{precision}f}" for value in (parts, *possible)
  )
  return _ask(text, answer, written, "float", precision=precision, **others)


def _shapes(canvas: Canvas, kind: str) -> Question:
  """Draws different shapes, one of each color."""
  count = canvas.level.num_shapes
  side = math.isqrt(count - 1) + 1
  shapes = canvas.pick(drawing.SHAPES[: max(3, count)], count)
  colors = canvas.colors(count)
  cells = canvas.pick(range(side * side), count)
  for shape, color, cell in zip(shapes, colors, cells, strict=True):
    drawing.draw_shape(canvas, shape=shape, color=color, cell=cell, side=side)
  first = {"shape": shapes[0], "color": colors[0]}
  words = drawing.COLORS if kind == "color" else drawing.SHAPES
  return _ask(_wording(canvas, kind, **first), first[kind], words, "text")


def _counted_shapes(canvas: Canvas, kind: str) -> Question:
  """Draws many shapes, some of them to be counted."""
  level = canvas.level
  shape, other_shape = canvas.pick(drawing.SHAPES[:3], 2)
  color, *other_colors = canvas.colors(level.num_colors)
  most_others = level.num_distractors
  # None only where the question says which objects to count.
  least = 0 if len(level.counts_by) > 1 else 1
  count = canvas.integer(least, level.max_count)
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
  if kind == "count":
    words = [color] if "color" in level.counts_by else []
    words.append(f"{shape}s" if "shape" in level.counts_by else "shapes")
    text = _wording(canvas, kind, objects=" ".join(words))
    return _ask(text, count, range(least, level.max_count + 1))
  total = count + num_others
  solution = f"{count} + {num_others} = {total}." if num_others else ""
  totals = range(1, level.max_count + most_others + 1)
  return _ask(_wording(canvas, kind), total, totals, solution=solution)


def _bars(canvas: Canvas, kind: str) -> Question:
  """Draws bars, of which the difference of two is drawn evenly."""
  count = canvas.level.num_rows
  # A unit is at least two pixels high, so that it can be read.
  most = min(canvas.level.max_value, (canvas.size - 4) // 2)
  difference = canvas.integer(1, most - 1)
  shorter = canvas.integer(1, most - difference)
  pair = [shorter + difference, shorter]
  rest = [value for value in range(1, most + 1) if value not in pair]
  drawn = pair + canvas.pick(rest, count - 2)
  order = canvas.pick(range(count), count)
  values = [drawn[i] for i in order]
  colors = canvas.colors(count)
  drawing.draw_bars(canvas, colors, values, most=most)
  high, low = order.index(0), order.index(1)
  if kind == "bar_value":
    # The values of the pair depend on their difference: ask about another bar.
    asked = next(i for i in range(count) if i not in (high, low))
    text = _wording(canvas, kind, color=colors[asked])
    return _ask(text, values[asked], range(1, most + 1))
  if kind == "bar_max":
    pairs = zip(colors, values, strict=True)
    solution = ", ".join(f"{color} {value}" for color, value in pairs) + "."
    tallest = colors[values.index(max(values))]
    text = _wording(canvas, kind)
    return _ask(text, tallest, colors, "text", solution=solution)
  text = _wording(canvas, kind, high=colors[high], low=colors[low])
  solution = f"{values[high]} - {values[low]} = {difference}."
  return _ask(text, difference, range(1, most), solution=solution)


def _num_rows(canvas: Canvas) -> int:
  """As many rows as the level asks for and digits of five pixels allow."""
  return min(canvas.level.num_rows, canvas.size // 7)


def _table(canvas: Canvas, kind: str) -> Question:
  """Draws a table of colored whole numbers."""
  count, most = _num_rows(canvas), canvas.level.max_value
  values = [canvas.integer(1, most) for _ in range(count)]
  colors = canvas.colors(count)
  drawing.draw_rows(canvas, colors, [str(value) for value in values])
  if kind == "table_value":
    asked = canvas.index(count)
    text = _wording(canvas, kind, color=colors[asked])
    return _ask(text, values[asked], range(1, most + 1))
  if kind == "table_sum":
    first, second = canvas.pick(range(count), 2)
    one, other = values[first], values[second]
    text = _wording(canvas, kind, first=colors[first], second=colors[second])
    solution = f"{one} + {other} = {one + other}."
    sums = range(2, 2 * most + 1)
    return _ask(text, one + other, sums, solution=solution)
  return Question(_wording(canvas, kind), str(values), "list", ())


def _decimals(
  canvas: Canvas, kind: str, *, parts_of_one: int, precision: int, unit: str
) -> Question:
  """Draws a table of prices in quarters, or of weights in tenths."""
  count = _num_rows(canvas)
  most = min(9, canvas.level.max_value) * parts_of_one
  parts = [canvas.integer(parts_of_one, most) for _ in range(count)]
  colors = canvas.colors(count)
  cells = [f"{part / parts_of_one:.{precision}f}" for part in parts]
  drawing.draw_rows(canvas, colors, cells)
  asked = canvas.index(count)
  return _ask_float(
    _wording(canvas, kind, color=colors[asked]),
    parts[asked],
    range(parts_of_one, most + 1),
    parts_of_one=parts_of_one,
    precision=precision,
    unit=unit,
  )


def _clock(canvas: Canvas, kind: str) -> Question:
  """Draws a clock."""
  # On a small image the hand's tip moves less than two pixels a minute.
  step = max(canvas.level.minute_step, 1 if canvas.size >= 64 else 5)
  hour, minute = canvas.integer(1, 12), step * canvas.index(60 // step)
  drawing.draw_clock(canvas, hour=hour, minute=minute)
  text, minutes = _wording(canvas, kind), range(0, 60, step)
  if kind == "clock_hour":
    return _ask(text, hour, range(1, 13))
  if kind == "clock_minutes":
    return _ask(text, minute, minutes, unit="minutes")
  times = (f"{each}:{m:02d}" for each in range(1, 13) for m in minutes)
  return _ask(text, f"{hour}:{minute:02d}", times, "text")


def _dots(canvas: Canvas, kind: str) -> Question:
  """Draws a grid of dots, some of them black."""
  sides = range(2, canvas.level.max_side + 1)
  # Evenly over the totals, then over the grids that have the total.
  totals = sorted({rows * columns for rows in sides for columns in sides})
  total = totals[canvas.index(len(totals))]
  [rows] = canvas.pick([n for n in sides if total / n in sides], 1)
  # No halves: 1/8 could be rounded to 0.12 or to 0.13.
  clear = [n for n in range(1, total) if 200 * n % (2 * total) != total]
  [num_black] = canvas.pick(clear, 1)
  columns = total // rows
  black = set(canvas.pick(range(total), num_black))
  drawing.draw_dots(canvas, rows, columns, black)
  text = _wording(canvas, kind)
  if kind == "dot_total":
    solution = f"{rows} x {columns} = {total}."
    most = canvas.level.max_side**2
    return _ask(text, total, range(4, most + 1), solution=solution)
  if kind == "dot_black":
    return _ask(text, num_black, range(1, total))
  return _ask_float(
    text,
    num_black,
    range(1, total),
    parts_of_one=total,
    precision=2,
    solution=f"{num_black} / {total} = {num_black / total:.2f}.",
  )


_prices = functools.partial(_decimals, parts_of_one=4, precision=2, unit="$")
_weights = functools.partial(_decimals, parts_of_one=10, precision=1, unit="kg")

SCENES = (
  Scene("shapes", _shapes, ("color", "shape")),
  Scene("counted_shapes", _counted_shapes, ("count", "total")),
  Scene("bars", _bars, ("bar_value", "bar_max", "bar_difference")),
  Scene("table", _table, ("table_value", "table_sum", "table_list")),
  Scene("prices", _prices, ("price",)),
  Scene("weights", _weights, ("weight",)),
  Scene("clock", _clock, ("clock_hour", "clock_minutes", "clock_time")),
  Scene("dots", _dots, ("dot_total", "dot_black", "dot_fraction")),
)
