r"""Reads mathematics in LaTeX or plain text as text, without evaluating it.

Finds the shape of an answer: one value, a set, a tuple, an interval, a matrix,
an equation or an inequality. Shapes are compared in `expressions`: `(1,2)` is
never `\{1,2\}`. Takes time linear in the text, which is at most `MAX_LENGTH`
characters long. Knows nothing of sympy.
"""

import fractions
import functools
import itertools
import re
from typing import NamedTuple

from data_pipelines.text import tables
from data_pipelines.verifier import numbers

# A longer answer is compared as text alone, as is one that nests deeper: the
# parser takes seconds for what nests deeply.
MAX_LENGTH = 1000
_MAX_DEPTH, _MAX_COMMANDS, _MAX_DIGITS = 8, 100, 40
_MAX_BRACKETED = 4000
_MAX_SIGNS = 10  # Bars and slashes, which the parser tries in many ways.

_TABLES = tables.read("data_pipelines.verifier", "latex.toml")
_RULES = [(re.compile(pattern), to) for pattern, to in _TABLES["rules"]]
_COMMANDS = frozenset(_TABLES["commands"].split())
_CHARACTERS = numbers.FULL_WIDTH | {
  character: latex
  for latex, characters in _TABLES["characters"].items()
  for character in characters
}
_UNITS = {
  name: (dimension, fractions.Fraction(factor))
  for dimension, units in _TABLES["units"].items()
  for name, factor in units.items()
}
_UNITS |= {name: _UNITS[x] for name, x in _TABLES["unit_names"].items()}
_RE = tables.patterns("latex")


class Shape(NamedTuple):
  """An answer and its parts.

  Attributes:
    kind: "value", "set", "tuple" (also an interval), "union", "matrix",
      "equation", "system" (of equations), "relation" (an inequality that is
      not solved) or "word".
    parts: The parts' shapes; of a relation and an equation its sides.
    text: The text of a value or a word, the brackets of a tuple, the operators
      of a relation, the size of a matrix.
    name: The variable that an interval is for, if one is named.
  """

  kind: str
  parts: tuple["Shape", ...] = ()
  text: str = ""
  name: str = ""


@functools.lru_cache(maxsize=4096)
def normalize(text: str) -> str:
  """The text in the one spelling that is compared.

  Longer texts than `MAX_LENGTH` only lose the space around them.
  """
  if len(text) > MAX_LENGTH:
    return text.strip()
  text = "".join(_CHARACTERS.get(x, x) for x in numbers.raise_digits(text))
  for pattern, replacement in _RULES:
    text = pattern.sub(replacement, text)
  if text.strip()[:1] not in ("(", "[", "{", "\\"):
    text = _RE.thousands.sub(lambda match: match[0].replace(",", ""), text)
  text = _RE.repeating.sub(_repeating, _add_braces(text))
  return text.strip(" *").rstrip(" .,;:*").strip() or text.strip()


def key(text: str) -> str:
  """The normalized text without the space that means nothing."""
  return _RE.mere_space.sub("", normalize(text))


def number(text: str) -> fractions.Fraction | None:
  """The value of a text that is one number without a unit, else None."""
  match = _RE.number.fullmatch(normalize(text))
  if not match or len(match[0]) > _MAX_DIGITS:
    return None
  below = fractions.Fraction(match["below"] or match["bottom"] or 1)
  if not below:
    return None
  value = fractions.Fraction(match["above"] or match["top"]) / below
  return -value if match["sign"] else value


def is_readable(text: str) -> bool:
  """True for a text so small that evaluating it cannot take long."""
  text = normalize(text)
  if len(text) > MAX_LENGTH or text.count("\\") > _MAX_COMMANDS:
    return False
  if _RE.too_long.search(text) or max(map(text.count, "|/")) > _MAX_SIGNS:
    return False
  if any(name not in _COMMANDS for name in _RE.command.findall(text)):
    return False
  steps = ((x in "({[") - (x in ")}]") for x in text)
  return max(itertools.accumulate(steps), default=0) <= _MAX_DEPTH


def _add_braces(text: str) -> str:
  """The text with braces where plain text has them round: "sqrt(2)"."""
  while match := _RE.round_argument.search(text):
    end = find_end(text, match.end(), "()")
    if end < 0:
      break
    inside = text[match.end() : end]
    text = f"{text[: match.start()]}{match[1]}{{{inside}}}{text[end + 1 :]}"
  return text


def find_end(text: str, start: int, brackets: str = "{}") -> int:
  """The index of the bracket that closes one right before `start`, or -1."""
  depth = 1
  for i in range(start, min(len(text), start + _MAX_BRACKETED)):
    depth += (text[i] == brackets[0]) - (text[i] == brackets[1])
    if not depth:
      return i
  return -1


def _repeating(match: re.Match[str]) -> str:
  r"""The fraction of a repeating decimal, as 0.\overline{3}."""
  before, after, again = match[1] or "0", match[2], match[3]
  if len(match[0]) > _MAX_DIGITS:
    return match[0]
  nines = (10 ** len(again) - 1) * 10 ** len(after)
  value = int(before + after + again) - int(before + after)
  return rf"\frac{{{value}}}{{{nines}}}"


def _decimal(match: re.Match[str]) -> str:
  """An exact fraction, because the parser reads decimals as floats."""
  before, after = match[1], match[2]
  return rf"\frac{{{int(before + after)}}}{{{10 ** len(after)}}}"


def split(text: str, pattern: re.Pattern[str]) -> list[str]:
  """Splits at the matches of a pattern outside all brackets; keeps groups."""
  parts, start, depth, index = [], 0, 0, 0
  while index < len(text):
    if not depth and (match := pattern.match(text, index)):
      parts += [text[start:index], *match.groups()]
      start = index = match.end()
      continue
    token = _RE.token.match(text, index)
    assert token is not None
    depth += bool(_RE.opening.fullmatch(token[0]))
    depth -= bool(_RE.closing.fullmatch(token[0]))
    index = token.end()
  return [part.strip() for part in (*parts, text[start:])]


def parse(text: str) -> Shape:
  """The shape of a normalized text."""
  text = text.strip()
  if match := _RE.member.match(text) or _RE.named_point.match(text):
    text = text[match.end() :]
  if match := _RE.described.fullmatch(text):
    text = match[1]
  if text == r"\mathbb{R}":
    text = rf"({','.join(_INTERVAL)})"
  elif match := _RE.without_point.fullmatch(text):
    text = rf"x \ne {match[1]}"
  if match := _RE.matrix.fullmatch(text):
    rows = [x for x in split(match[1], _RE.row) if x]
    cells = [split(row, _RE.cell) for row in rows]
    size = f"{len(rows)}x{','.join(str(len(row)) for row in cells)}"
    parts = tuple(parse(cell) for row in cells for cell in row)
    return Shape("matrix", parts, size)
  for pattern, make in (
    (_RE.both, _both),
    (_RE.separator, _several),
    (_RE.relation, _relation),
    (_RE.cup, lambda parts: Shape("union", tuple(map(parse, parts)))),
  ):
    if len(parts := split(text, pattern)) > 1:
      return make(parts)
  if unit(text)[1] is None and _RE.word.search(text):
    return Shape("word", text=text)
  if (bracketed := _parse_brackets(text)) is not None:
    return bracketed
  if r"\pm" in text or r"\mp" in text:
    plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
    minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return Shape("set", (parse(plus), parse(minus)))
  return Shape("value", text=text)


def _several(parts: list[str]) -> Shape:
  """The shape of a list without brackets."""
  shapes = tuple(parse(part) for part in parts if part)
  kinds = {shape.kind for shape in shapes}
  if shapes and shapes[0].kind == "equation" and kinds <= {"equation", "value"}:
    names = [s.parts[0].text for s in shapes if s.kind == "equation"]
    if len(set(names)) > 1 and kinds == {"equation"}:
      return Shape("system", shapes)
    if len(set(names)) == 1:
      values = tuple(s.parts[-1] if s.parts else s for s in shapes)
      return Shape("equation", (shapes[0].parts[0], Shape("set", values)))
  return Shape("union" if any(s.name for s in shapes) else "set", shapes)


def _both(parts: list[str]) -> Shape:
  """The shape of two conditions, or of values, joined by "and"."""
  low, high = shapes = parse(parts[0]), parse(parts[-1])
  if len(parts) == 2 and all(shape.name for shape in shapes):
    if low.parts[0].text == _INTERVAL[0]:
      low, high = high, low
    if low.name == high.name and low.parts[1].text == _INTERVAL[1]:
      ends = low.parts[0], high.parts[1]
      return Shape("tuple", ends, low.text[0] + high.text[1], low.name)
  return parse(", ".join(parts))


_TURNED = {">": "<", r"\ge": r"\le", "<": ">", r"\le": r"\ge"}
_INTERVAL = (r"-\infty", r"\infty")


def _solve(sides: list[str], operators: list[str]) -> Shape | None:
  """The interval of an inequality that is solved for a variable."""
  is_name = [_RE.variable.fullmatch(side) is not None for side in sides]
  if operators == [r"\ne"] and any(is_name):
    name, value = sides if is_name[0] else sides[::-1]
    pieces = [name, "<", value], [value, "<", name]
    return Shape("union", tuple(map(_relation, pieces)))
  if not set(operators) <= {"<", r"\le"}:
    return None
  if len(sides) == 2 and any(is_name):
    place = 2 if is_name[1] else 0
    sides.insert(place, _INTERVAL[place // 2])
    operators.insert(place // 2, "<")
  if len(sides) != 3 or not _RE.variable.fullmatch(sides[1]):
    return None
  ends = tuple(Shape("value", text=side) for side in sides[::2])
  opening, closing = (operator == r"\le" for operator in operators)
  return Shape("tuple", ends, "(["[opening] + ")]"[closing], sides[1])


def _relation(parts: list[str]) -> Shape:
  """The shape of an equation or an inequality, which may be a chain."""
  sides, operators = parts[::2], parts[1::2]
  if r"\approx" in operators:  # What stands before it is exact.
    sides = [x for x in sides[: operators.index(r"\approx") + 1] if x]
    operators = operators[: len(sides) - 1]
    if len(sides) < 2:
      return parse(sides[0] if sides else parts[-1])
  if set(operators) != {"="}:
    if operators[0] in (">", r"\ge"):  # Reads it from its right end.
      sides = sides[::-1]
      operators = [_TURNED.get(x, x) for x in operators[::-1]]
    texts = tuple(Shape("value", text=side) for side in sides)
    relation = Shape("relation", texts, " ".join(operators))
    return _solve(sides, operators) or relation
  if _RE.variables.fullmatch(sides[0]) and len(sides) == 2:
    names, values = parse(sides[0]).parts, parse(sides[1]).parts
    if len(names) == len(values):
      pairs = zip(names, values, strict=True)
      return Shape("system", tuple(Shape("equation", pair) for pair in pairs))
  if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]):
    sides = sides[::-1]  # 5 = x.
  first = Shape("value", text=sides[0])
  return Shape("equation", (first, *map(parse, sides[1:])))


def _parse_brackets(text: str) -> Shape | None:
  """The shape of a text in one pair of brackets, with commas in it."""
  opening = _RE.opening.match(text)
  closing = _RE.last_closing.search(text)
  if not opening or not closing:
    return None
  inside = text[opening.end() : closing.start()]
  if len(split(inside, _RE.closing)) > 1:
    return None  # The first bracket closes before the last one.
  parts = tuple(parse(part) for part in split(inside, _RE.comma))
  brackets = opening[0] + closing[0]
  if brackets == "{}" and len(parts) == 1:
    return parts[0]
  if brackets in (r"\{\}", "{}"):
    return Shape("set", parts)
  brackets = brackets.replace(r"\langle", "(").replace(r"\rangle", ")")
  is_tuple = len(parts) > 1 or brackets == "[]"
  return Shape("tuple", parts, brackets) if is_tuple else None


# The exponent of each dimension, and the factor to its base unit.
type Unit = tuple[frozenset[tuple[str, int]], fractions.Fraction]
PERCENT, DEGREES = frozenset({("%", 1)}), frozenset({("degree", 1)})


def unit(text: str, *, is_letter: bool = False) -> tuple[str, Unit | None]:
  """Divides a value from its unit.

  Args:
    text: A normalized value.
    is_letter: True if a last single letter, as in "5 m", is a unit.

  Returns:
    The value, and its unit or None. "%" is a unit without a dimension.
  """
  if text.endswith("%"):
    return text[:-1].strip(), (PERCENT, fractions.Fraction(1, 100))
  if text.endswith("°") and not _RE.trigonometric.search(text):
    return text[:-1].strip(), (DEGREES, fractions.Fraction(1))
  match = _RE.unit.search(text)
  value = text[: match.start()].strip() if match else ""
  if match is None or not _RE.has_value.search(value):
    return text, None
  is_marked = r"\text" in match[0] or "/" in match[0]
  dimensions: dict[str, int] = {}
  factor = fractions.Fraction(1)
  for sign, word, power in _RE.unit_word.findall(
    match[0].replace(r"\text", " ")
  ):
    singular = word.removesuffix("s")
    spellings = (word, singular, word.lower(), singular.lower())
    name = next((x for x in spellings if x in _UNITS), None)
    is_short = len(word) < 3 and (not name or (len(word) < 2 and not is_letter))
    if is_short and not is_marked:
      return text, None
    name = name or singular.lower()
    exponent = int(power or 1) * (-1 if sign.strip() in ("/", "per") else 1)
    dimension, one = _UNITS.get(name, (name, fractions.Fraction(1)))
    dimensions[dimension] = dimensions.get(dimension, 0) + exponent
    factor *= one**exponent
  return value, (frozenset(dimensions.items()), factor)


def as_tuple(system: Shape) -> Shape:
  """The values of a system of equations, in the order of their names."""
  ordered = sorted(system.parts, key=lambda equation: equation.parts[0].text)
  return Shape("tuple", tuple(each.parts[-1] for each in ordered), "()")


def is_name(text: str) -> bool:
  """True for a text that names a value, as "x", "f(x)" and "AB"."""
  return _RE.name.fullmatch(text.strip()) is not None


def spelling(text: str) -> str | None:
  """The text as the parser reads it right, or None if it would misread it.

  The parser takes "2(3)" for 2 + 3, "x(2)" for a function and "AB" for a * b.
  """
  if _RE.trigonometric.search(text):
    text = _RE.degrees.sub(r"(\\frac{\\pi}{180}\\cdot \1)", text)
  else:
    text = text.replace("°", " ")
  text = _RE.decimal.sub(_decimal, text)
  text = _RE.mixed.sub(r"\1\\frac{\2}{\3}", text)
  text = _RE.applied.sub(r"\1\\cdot ", text)
  text = _RE.capitals.sub(lambda match: f"Z_{{{match[0]}}}", text)
  return None if _RE.misread.search(text) else text
