r"""Golds as data sets write them, and what they are by hand."""

import decimal
import itertools

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.sources.rows import gold
from data_pipelines.verifier import verify

# For each value the answer, its type, and the unit or the precision.
GOLDS = (
  ("42", "42", "integer"),
  ("1,234,567", "1234567", "integer"),
  ("1{,}234", "1234", "integer"),
  ("12 000", "12000", "integer"),
  ("\u22123", "-3", "integer"),
  ("x = 5", "5", "integer"),
  ("3.14", "3.14", "float", 2),
  (".5", "0.5", "float", 1),
  ("3.0", "3.0", "float", 1),
  ("0.12345678", "0.12345678", "float", 6),
  ("0.00001", "0.00001", "expression"),
  ("12 cm", "12", "integer", "cm"),
  (r"12\text{ cm}^{2}", "12", "integer", "cm^2"),
  ("45\u00b0", "45", "integer", "\u00b0"),
  (r"45^{\circ}", "45", "integer", "\u00b0"),
  (r"\angle A = 45^\circ", "45", "integer", "\u00b0"),
  ("$5", "5", "integer", "$"),
  ("20%", "20", "integer", "%"),
  (r"20\%", "20", "integer", "%"),
  ("7.25 km/h", "7.25", "float", "km/h", 2),
  ("3 apples", "3", "integer", "apples"),
  ("5 m", "5", "integer", "m"),
  ("5x", "5x", "expression"),
  ("5xy", "5xy", "expression"),
  ("5mm", "5", "integer", "mm"),
  ("5\u5398\u7c73", "5", "integer", "\u5398\u7c73"),
  ("[1, 2]", "[1, 2]", "list"),
  ("['a', 'b']", "['a', 'b']", "list"),
  (r"2\sqrt{3}", r"2\sqrt{3}", "expression"),
  (r"\frac{1}{2}", r"\frac{1}{2}", "expression"),
  ("3/4", "3/4", "expression"),
  ("x^2+1", "x^2+1", "expression"),
  (r"5\pi", r"5\pi", "expression"),
  ("(-1, 3]", "(-1, 3]", "expression"),
  (r"\{1,2\}", r"\{1,2\}", "expression"),
  ("-x", "-x", "expression"),
  (r"\begin{pmatrix}1\\2\end{pmatrix}",) * 2 + ("expression",),
  ("10^5", "10^5", "expression"),
  ("yes", "yes", "text"),
  ("Paris.", "Paris", "text"),
  ("U.S.", "U.S.", "text"),
  ("AB", "AB", "text"),
  ("B", "B", "text"),
  ("9:30", "9:30", "text"),
  ("2 and 3", "2 and 3", "text"),
  ("10 a.m.", "10 a.m.", "text"),
  ("3 hours 20 minutes", "3 hours 20 minutes", "text"),
  (42, "42", "integer"),
  (3.0, "3", "integer"),
  (3.14, "3.14", "float", 2),
  (decimal.Decimal("1.50"), "1.50", "float", 2),
  (np.int64(4), "4", "integer"),
  (np.float32(2.5), "2.5", "float", 1),
  (np.array([1, 2]), "[1, 2]", "list"),
  ([1, 2.5], "[1, 2.5]", "list"),
  (["7"], "7", "integer"),
  ({"ground_truth": "7"}, "7", "integer"),
)


@pytest.mark.parametrize("case", GOLDS, ids=str)
def test_a_gold_is_what_it_is_by_hand(case):
  value, answer, kind, *more = case
  found = gold.read(value, "answer")
  assert (found.answer, found.answer_type) == (answer, kind)
  assert found.unit == "".join(x for x in more if isinstance(x, str))
  places = [x for x in more if isinstance(x, int)]
  assert found.precision == (places[0] if places else -1)


WRAPS = (
  *("{}", "  {}\n", "${}$", "\\({}\\)", "**{}**", "\\boxed{{{}}}", "#### {}"),
  *("<answer>{}</answer>", "<answer>\n{}\n</answer>", "The answer is {}."),
  *("Answer: {}", "Final answer: {}", "$\\boxed{{{}}}$"),
  *("<think>maybe 7 or 8</think><answer>\\boxed{{{}}}</answer>",),
  *(
    "Ann has 3, so Bob has more.\n#### {}",
    "We add 3 and 4. So the answer is {}.",
  ),
  *("We add 3 to get $\\boxed{{{}}}$ in the end.",),
)
GOLD_TEXTS = [x[0] for x in GOLDS if isinstance(x[0], str) and "$" not in x[0]]


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_mark_around_a_gold_changes_nothing(wrap):
  for text in GOLD_TEXTS:
    wrapped = wrap.format(text)
    assert gold.read(wrapped, "a") == gold.read(text, "a"), wrapped


def test_only_text_around_a_gold_is_a_worked_answer():
  for wrap, text in itertools.product(WRAPS, GOLD_TEXTS):
    worked = gold.unwrap(wrap.format(text))[1]
    is_worked = any(word in wrap for word in ("maybe", "Ann", "We add"))
    assert bool(worked) == is_worked, wrap
    assert "<" not in worked


def test_numbers_of_any_spelling_keep_their_value():
  """Decorations change neither the value nor the places of a number."""
  rng = np.random.default_rng(0)
  for _ in range(300):
    places = int(rng.integers(0, 5))
    number = decimal.Decimal(int(rng.integers(-(10**9), 10**9))).scaleb(-places)
    for text in (
      f"{number:f}",
      f"{number:,f}",
      f"${number:f}$",
      f"{number:f} kg",
    ):
      found = gold.read(text, "a")
      assert decimal.Decimal(found.answer) == number
      assert found.answer_type == ("float" if places else "integer")
      assert max(found.precision, 0) == places


def test_every_gold_is_right_by_its_own_rule():
  problems = [
    records.Problem(
      pid="1",
      question="q",
      question_type="free_form",
      **gold.read(value, "a")._asdict(),
    )
    for value, *_ in GOLDS
  ]
  replies = [f"<answer>{problem.answer}</answer>" for problem in problems]
  verdicts = verify.verify_all(replies, problems)
  assert all(verdict.correct for verdict in verdicts)


@pytest.mark.parametrize(
  "value, answer, aliases",
  [
    (["a", "b", "a"], "a", ("b",)),
    ({"value": "X Y", "aliases": ["X Y", "xy"]}, "X Y", ("xy",)),
    ([{"answer": "2"}, {"answer": "two"}], "2", ("two",)),
    ({"text": ["A B", "B"], "answer_start": [1, 2]}, "A B", ("B",)),
    (True, "yes", ("true",)),
    ("two", "two", ("2",)),
    ("5 million", "5 million", ("5000000",)),
  ],
)
def test_accepted_answers_are_an_answer_and_its_aliases(value, answer, aliases):
  found = gold.read(value, "a")
  assert (found.answer, found.aliases) == (answer, aliases)


@pytest.mark.parametrize(
  "value, reason",
  [
    *((x, "missing_answer") for x in (None, "", " ", float("nan"), [], "$ $")),
    ("a word " * 30, "unreadable_answer"),
    (float("inf"), "unreadable_answer"),
    ({"bytes": b"PNG" * 99, "path": None}, "unreadable_answer"),
    (b"PNG" * 99, "unreadable_answer"),
    ([{"bytes": b"PNG" * 99, "path": None}], "unreadable_answer"),
    (1j, "unreadable_answer"),
  ],
)
def test_what_no_rule_reads_is_rejected_with_its_column(value, reason):
  with pytest.raises(records.BadRecord, match="final") as error:
    gold.read(value, "final")
  assert error.value.reason == reason and "PNG" not in str(error.value)
