"""Numbers in text: every spelling is read, and nothing else."""

import decimal

import hypothesis
import pytest
from hypothesis import strategies

from data_pipelines.verifier import numbers


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("5", "5"),
    ("5.0", "5"),
    ("5.", "5"),
    (".5", "0.5"),
    ("-3", "-3"),
    ("\u22123", "-3"),
    ("+3", "3"),
    ("1,234,567", "1234567"),
    ("1{,}234", "1234"),
    ("3/4", "0.75"),
    (r"\frac{3}{4}", "0.75"),
    (r"$\dfrac{3}{4}$", "0.75"),
    ("1e3", "1000"),
    ("2 \u00d7 10^3", "2000"),
    (r"2 \times 10^{-2}", "0.02"),
    ("$7.50", "7.50"),
    ("30 %", "30"),
    (r"30\%", "30"),
    ("5 cm", "5"),
    ("5 cm^2", "5"),
    (r"145^\circ", "145"),
    (r"$145^{\circ}$", "145"),
    ("145 degrees", "145"),
    ("x = 5 cm", "5"),
    ("about 5", "5"),
    ("five", "5"),
    ("Twelve apples", "12"),
    ("2 thousand", "2000"),
    ("5\u4e2a", "5"),
    ("7 (seven)", "7"),
    ("twenty-one", "21"),
    ("one hundred and forty-five", "145"),
    ("two thousand", "2000"),
    ("hundred", "100"),
    ("negative seven", "-7"),
    ("minus 3", "-3"),
    ("- 3", "-3"),
    ("\u8d1f3", "-3"),
    ("12.5 million", "12500000"),
    ("1250\u4e07", "12500000"),
    ("12 500 000", "12500000"),
    ("2k", "2000"),
    ("7 dozen", "84"),
    ("two dozen", "24"),
    ("1 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    ("1\u00bd", "1.5"),
    (r"1\frac{1}{2}", "1.5"),
    (r"\frac34", "0.75"),
    ("2 \u00d7 10\u207b\u00b2", "0.02"),
    ("5 cm\u00b2", "5"),
    ("10\u207b\u00b2", "0.01"),
    ("\u4e8c\u5341\u4e00", "21"),
    ("\u5341\u4e8c", "12"),
    ("\u4e00\u767e\u56db\u5341\u4e94", "145"),
    ("\u06f5\u066b\u06f2", "5.2"),  # Persian.
    ("\u0665", "5"),  # Arabic-Indic.
    ("\uff15\uff12", "52"),  # Full width.
  ],
)
def test_a_number_reads_the_same_however_it_is_written(text, value):
  assert numbers.only_number(text) == decimal.Decimal(value)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "A",
    "N/A",
    "nan",
    "NaN",
    "inf",
    "-Infinity",
    "1e999",
    "1e99999",
    "1/0",
    "5 or 6",
    "1 2",
    "10-12",
    "5, 6",
    "3:2",
    "1.2.3",
    "2^5",
    "5\u221a3",
    "3\u03c0",
    "\u221a3",
    "A1",
    "five or six",
    "five six",
    "twenty, one",
    "twenty ten",
    "one half",
    "no one",
    "7x",
    "7\u00b2",
    "7 squared",
    "7 or more",
    "> 7",
    "\u00b17",
    "x != 7",
    "1 3/2",
    "I see 5",
    "9" * 50,
    "9" * 1_000_000,
  ],
)
def test_what_is_not_one_finite_number_is_none(text):
  assert numbers.only_number(text) is None


@hypothesis.given(
  strategies.decimals(
    allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9)
  ).filter(lambda value: abs(value) < 10**9)
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_the_canonical_spelling_reads_back_as_the_same_number(value):
  assert numbers.only_number(numbers.canonical(value)) == value


@pytest.mark.parametrize(
  ("value", "spelling"),
  [("5.00", "5"), ("1E+3", "1000"), ("-0.0", "0"), ("2.50", "2.5")],
)
def test_equal_values_have_one_spelling(value, spelling):
  assert numbers.canonical(decimal.Decimal(value)) == spelling


def values(text):
  return [number.value for number in numbers.numerals(numbers.plain(text))]


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("From 10-12 it is -3.", [None, None, -3]),
    ("2 + 3 = 5", [None, None, 5]),
    ("a ratio of 3:2", [None, None]),
    ("in cm^2", []),
    ("model B2", []),
    ("\u957f\u5ea6\u4e3a5\u5398\u7c73", [5]),
    ("S13 and 4", [13, 4]),  # A misread dollar sign.
    ("S1 = 4", [4]),
  ],
)
def test_numbers_are_found_and_labels_are_not(text, found):
  assert values(text) == found


@hypothesis.given(strategies.text())
@hypothesis.settings(deadline=None, derandomize=True)
def test_no_text_raises(text):
  numbers.only_number(text)
  list(numbers.number_words(text))
  values(text)


@hypothesis.given(
  strategies.lists(
    strategies.sampled_from(
      [r"\frac{", "}", "{", r"\sqrt{", "2", r"\text{", "$", "**", "\u221a("]
    )
  ).map("".join)
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_plain_text_stays_as_it_is(text):
  """So it is safe to call `plain` twice."""
  hypothesis.assume(text.count("{") < 4)
  plain = numbers.plain(text)
  assert numbers.plain(plain) == plain
