r"""Compares two mathematical expressions by value, in a worker process.

math-verify's parser reads the values in them. They are compared here: exactly
if both are rational, else to 45 digits at several points. math-verify's own
comparison is too loose for a reward: it takes `(1,2)` for `\{1,2\}`, 0.333333
for 1/3, `neve` for `even` and `x^2 = 5` for 5. Only workers import this module,
because the parser and sympy take a second.
Values are sympy expressions; their types are unknown here.
"""

import fractions
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import latex2sympy2

from data_pipelines.verifier import latex
from data_pipelines.verifier.latex import Shape

# Expressions that agree at these points are equal.
_POINTS = (1.37, -0.73, 2.61, -3.17, 0.41)
_DIGITS, _MAX_ERROR, _NOISE = 60, 1e-45, 1e-50
# A power or factorial with more binary digits is not computed.
_MAX_BITS = 20_000
_MAX_PARTS = 24


def is_equal(gold: str, answer: str, tolerance: float) -> bool:
  """True if two texts mean the same.

  Args:
    gold: The right answer, normalized and readable, see `latex`.
    answer: Another one.
    tolerance: Largest relative error of a number that is right.
  """
  try:
    match = _Comparison(tolerance).matches
    return match(latex.parse(gold), latex.parse(answer))
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
    return False  # Sympy raises these for what has no value.


class _Comparison(NamedTuple):
  """Comparisons of a right answer with another one, with a tolerance."""

  tolerance: float

  def matches(self, gold: Shape, answer: Shape) -> bool:
    """True if two shapes mean the same."""
    pair = [gold, answer]
    kinds = {gold.kind, answer.kind}
    if "word" in kinds:
      return _words(gold) == _words(answer) != ""
    if kinds == {"system", "tuple"}:
      pair = [x if x.kind == "tuple" else latex.as_tuple(x) for x in pair]
      return self.matches(*pair)
    if "equation" in kinds:
      return self._equations(gold, answer)
    if "set" in kinds and kinds != {"set", "union"}:
      # A set of one value is that value.
      pair = [x if x.kind == "set" else Shape("set", (x,)) for x in pair]
      return self._pair_up(pair[0].parts, pair[1].parts)
    if len(kinds) > 1 and kinds != {"set", "union"}:
      return False
    if gold.kind == "value":
      return self._quantities(gold.text, answer.text)
    if gold.kind in ("set", "union", "system"):
      return self._pair_up(gold.parts, answer.parts)
    if gold.text != answer.text or len(gold.parts) != len(answer.parts):
      return False
    if gold.kind == "relation":
      return _is_same_inequality(gold, answer)
    is_one_name = len({gold.name, answer.name} - {""}) < 2
    return is_one_name and all(map(self.matches, gold.parts, answer.parts))

  def _pair_up(self, gold: Sequence[Shape], answer: Sequence[Shape]) -> bool:
    """True if each part matches another part, in any order."""
    if len(gold) != len(answer) or len(gold) > _MAX_PARTS:
      return False
    left = list(answer)
    for part in gold:
      partner = next((x for x in left if self.matches(part, x)), None)
      if partner is None:
        return False
      left.remove(partner)
    return True

  def _equations(self, gold: Shape, answer: Shape) -> bool:
    """Compares where at least one side is an equation."""
    value = gold.parts[-1] if gold.kind == "equation" else gold
    found = answer.parts[-1] if answer.kind == "equation" else answer
    if answer.kind == "equation" and not self._is_consistent(answer):
      return False
    if gold.kind != "equation":
      return _gives_a_value(answer.parts[0].text) and self.matches(gold, found)
    name = gold.parts[0].text
    if answer.kind != "equation":
      return latex.is_name(name) and self.matches(value, answer)
    other = answer.parts[0].text
    names = {latex.key(name), latex.key(other)}
    are_names = latex.is_name(name) and latex.is_name(other)
    # The graph y = x^2 is that of f(x) = x^2.
    is_graph = "y" in names and any("(" in each for each in names)
    if are_names and (len(names) == 1 or is_graph):
      if self.matches(value, found):
        return True
    texts = [x.text for x in value.parts or (value,) if x.text]
    if latex.is_name(name) and not any(map(_symbols, texts)):
      return False  # 2x = 10 does not solve for x = 5.
    sides = (_difference(x.parts[0], x.parts[-1]) for x in (gold, answer))
    numerators = (sympy.fraction(sympy.together(side))[0] for side in sides)
    return bool(_ratio(*numerators))

  def _is_consistent(self, equation: Shape) -> bool:
    """False if two sides of an equation are different numbers: 2 + 2 = 5."""
    sides = [x.text for x in equation.parts if x.kind == "value"]
    numbers = [x for x in sides if not latex.is_name(x) and not _symbols(x)]
    return all(self._quantities(numbers[0], x) for x in numbers[1:])

  def _quantities(self, gold: str, answer: str) -> bool:
    """True if two values are equal, units included.

    A unit may be left out. Two units must measure the same.
    """
    (value, unit), (found, other) = latex.unit(gold), latex.unit(answer)
    if unit and not other:
      found, other = _with_letter(answer, unit)
    elif other and not unit:
      value, unit = _with_letter(gold, other)
    if unit and other:
      factor = other[1] / unit[1]
      return unit[0] == other[0] and self._values(value, found, factor)
    if unit is other:
      return self._values(value, found)
    dimension, factor = unit or other or (None, fractions.Fraction(1))
    turned = factor if other else 1 / factor
    if dimension == latex.DEGREES:
      turned = sympy.pi / 180 if other else 180 / sympy.pi
    if dimension in (latex.DEGREES, latex.PERCENT):
      if self._values(value, found, turned):
        return True
    if dimension == latex.PERCENT and other:
      number = latex.number(found)  # 0.5 is not 0.5 %.
      if number is None or abs(number) <= 1:
        return False
    return self._values(value, found)

  def _values(self, gold: str, answer: str, factor: Any = 1) -> bool:
    """True if the first value is the second one times the factor."""
    if factor == 1 and latex.key(gold) == latex.key(answer):
      return True
    right, other = read(gold), read(answer)
    if right is None or other is None:
      return False
    pairs = _sample(right, other * sympy.sympify(factor))
    error = max(self.tolerance, _MAX_ERROR)
    return bool(pairs) and all(_is_close(*pair, error) for pair in pairs)


def _words(shape: Shape) -> str:
  """The words of a text, in lower case."""
  text = shape.text.replace(r"\text", " ").replace("{", " ").replace("}", " ")
  return " ".join(text.casefold().split())


def _with_letter(text: str, unit: latex.Unit) -> tuple[str, latex.Unit | None]:
  """Divides "5 m" if the other side has a unit of length."""
  value, found = latex.unit(text, is_letter=True)
  return (value, found) if found and found[0] == unit[0] else (text, None)


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Any:
  """The expression of a text, None if it has none of bounded size."""
  spelling = latex.spelling(text)
  if spelling is None:
    return None
  try:
    found = _parse(spelling)
    return found if _bits(found) <= _MAX_BITS else None
  except Exception:  # The parser raises nearly everything.
    return None


def _parse(text: str) -> Any:
  found = latex2sympy2.latex2sympy(
    text,
    is_real=True,
    normalization_config=None,
    conversion_config=latex2sympy2.ConversionConfig(lowercase_symbols=False),
  )
  if not isinstance(found, sympy.Expr):
    raise ValueError(f"{text} is no value")
  odd = {  # The real root: sympy takes a complex cube root of -8.
    each: -((-each.base) ** each.exp)
    for each in found.atoms(sympy.Pow)
    if each.base.is_negative and (1 / each.exp).is_odd and abs(each.exp) != 1
  }
  # An unknown function has a value of its own for each argument.
  unknown = found.atoms(sympy.core.function.AppliedUndef)
  names = {each: sympy.Symbol(str(each)) for each in unknown}
  return found.xreplace({sympy.Symbol("i", real=True): sympy.I, **names, **odd})


def _bits(expression: Any) -> float:
  """An upper bound of the binary digits of a value at the points."""
  parts = [_bits(part) for part in expression.args]
  if expression.is_Rational:
    return max(expression.p.bit_length(), expression.q.bit_length())
  if isinstance(expression, sympy.Pow | sympy.exp):
    base = parts[0] if len(parts) == 2 else 2
    return max(base, 1) * 2 ** min(parts[-1], 64)
  if isinstance(expression, sympy.factorial):
    return parts[0] * 2 ** min(parts[0], 64)
  return 3 + sum(parts)


def _symbols(text: str) -> set:
  """The variables of a value; of what cannot be read the text itself."""
  found = read(latex.unit(text)[0])
  return {text} if found is None else found.free_symbols


def _gives_a_value(left: str) -> bool:
  """True if an equation with this left side gives a value.

  So do x, f(2), x + y and sin x. But 2x = 10 is unsolved.
  """
  if latex.is_name(left):
    return True
  found = read(left)
  return found is not None and not (
    len(found.free_symbols) == 1 and found.is_rational_function()
  )


def _difference(first: Shape, second: Shape) -> Any:
  left, right = read(first.text), read(second.text)
  if left is None or right is None:
    raise ValueError("a side is no value")
  return left - right


def _is_same_inequality(gold: Shape, answer: Shape) -> bool:
  """True if the sides of two chains differ by positive factors alone."""
  chains = (itertools.pairwise(x.parts) for x in (gold, answer))
  return all(
    (_ratio(_difference(*one), _difference(*other)) or 0) > 0
    for one, other in zip(*chains, strict=True)
  )


def _ratio(first: Any, second: Any) -> float | None:
  """The constant ratio of two expressions that are no constants."""
  pairs = _sample(first, second)
  if len(pairs) < 2 or 0 in pairs[0]:
    return None
  (one, other), *rest = pairs
  same = all(_is_close(one * b, a * other, _MAX_ERROR) for a, b in rest)
  return float(one / other) if same else None


def _sample(first: Any, second: Any) -> list[tuple[Any, Any]]:
  """The values of two expressions at the points where one has a value.

  None at all if one is no number.
  """
  symbols = sorted(first.free_symbols | second.free_symbols, key=str)
  pairs = []
  for i in range(len(_POINTS) if symbols else 1):
    point = {
      symbol: sympy.Rational(str(_POINTS[(i + 2 * j) % 5]))
      + sympy.Rational(j, 7)
      for j, symbol in enumerate(symbols)
    }
    one, two = _value(first, point), _value(second, point)
    if one is None or two is None:
      return []
    if any(value.is_finite or value.is_infinite for value in (one, two)):
      pairs.append((one, two))
  return pairs


def _value(expression: Any, point: dict) -> Any:
  """The value at a point: exact, or to 60 digits; None if it is no number."""
  value = expression.doit() if not point else expression
  if not value.is_Rational and not value.is_infinite:
    value = value.evalf(_DIGITS, subs=point)
  is_number = isinstance(value, sympy.Expr) and value.is_number
  return value if is_number else None


def _is_close(right: Any, other: Any, error: float) -> bool:
  """True if two numbers are equal, or the second is close to the first."""
  if right == other:
    return True
  if not (right.is_finite and other.is_finite):
    return False
  if right.is_Rational and other.is_Rational and error == _MAX_ERROR:
    return False
  return bool(abs(right - other) <= (error * abs(right) or _NOISE))
