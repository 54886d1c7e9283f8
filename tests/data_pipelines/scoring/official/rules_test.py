"""Each official rule on records worked by hand from its published program.

The published programs said the same of all of these when they were run.
"""

import pytest

from data_pipelines import records
from data_pipelines.scoring.official import mathvision, rules, wemath


def problem(rule, gold, choices=(), answer=None, **metadata):
  return records.Problem(
    pid="1",
    question="?",
    choices=choices,
    answer=answer or gold,
    question_type="multi_choice" if choices else "free_form",
    answer_type="text",
    metadata={"official_rule": rule, "official_answer": gold} | metadata,
  )


CHARTQA = [
  ("14", "14", True),
  ("14", " 14 ", True),
  ("14", "14.7", True),  # 5 % of 14 is 0.7.
  ("14", "14.71", False),
  ("14", "13.3", True),
  ("14", "-14", False),
  ("14", "14%", False),  # 0.14
  ("14%", "0.14", True),
  ("14%", "14", False),
  ("14%", "14.5%", True),
  ("0", "0", True),
  ("0", "0.0", False),  # No relative error: compared as texts.
  ("-2", "-2.09", True),
  ("-2", "-2.1", False),  # In floats a little more than 5 %.
  ("1,000", "1000", False),  # No number to Python.
  ("2019", "1950", True),  # A year is a number too.
  ("Yes", "yes", True),
  ("Yes", "Yes.", False),
  ("[Red, Blue]", "[red, blue]", True),
  ("Red", "The answer is Red", False),
  ("inf", "INF", False),  # The error of infinity is no number.
  ("nan", "NaN", False),
]
MATHVERSE = [
  ("C", "C", True),
  ("C", " C\n", True),
  ("C", "c", False),
  ("C", "C. 60", False),
  ("C", "(C)", False),
  ("C", "The answer is C", False),
  ("C", "Extracted Answer: C", True),
  ("C", "", False),
  ("14", "14", True),
  ("14", "14.0", False),
  ("14", "14 cm", False),
  ("14 cm", "14 cm", True),
  ("14 cm", "14cm", False),
  ("2\\sqrt{3}", "2\\sqrt{3}", True),
  ("2\\sqrt{3}", "2√3", False),
  ("(-2,1]", "(-2,1]", True),
  ("(-2,1]", "(-2, 1]", False),
  ("x=3", "x=3", True),
  ("x=3", "3", False),
  ("null", "null", True),
]
# For options, the second one is right, and its text is 12.
MATHVISION = [
  ("B", "B", True),
  ("B", "b", True),
  ("B", "The answer is (B).", True),
  ("B", "I choose B.", True),
  ("B", "B\nbecause it is 12", True),
  ("B", "(B) B\nso", True),
  ("B", "\\boxed{B}", True),
  ("B", "\\boxed{\\text{(B)}}", True),
  ("B", "\\boxed{A} or \\boxed{B}", True),
  ("B", "\\boxed{12.004}", True),  # The text of the option, to two places.
  ("B", "\\boxed{A}", False),
  ("B", "A or B", False),
  ("B", "", False),
  ("6", "There is 6.", True),
  ("6", "The answer is 6. I am sure", True),
  ("6", "x = 6", True),
  ("6", "6 cats", False),
  ("0.5", "\\boxed{\\frac{1}{2}}", True),
  ("1/2", "\\boxed{\\dfrac{1}{2}}", True),
  ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", True),
  ("2\\sqrt{3}", "\\boxed{\\sqrt12}", False),  # Read as LaTeX does.
  ("2\\sqrt{3}", "\\boxed{3.46}", True),
  ("2\\sqrt{3}", "\\boxed{3.45}", False),
  ("(1,2)", "\\boxed{(2/2, 2)}", False),  # 1.0 is not spelt as 1.
  ("(1,2)", "\\boxed{(1, \\sqrt{4})}", False),
  ("(1,2)", "\\boxed{(1, 1 + 1)}", True),
  ("10", "\\boxed{10^\\circ}", True),
  ("x", "\\boxed{y}", False),
]
WEMATH = [
  ("C", "<Thought process>: <<it is>> <Answer>: <<C>>", True),
  ("C", "Answer: C", True),
  ("C", "Answer: C. 12 cm", True),
  ("C", "Final Answer\n\nC", True),
  ("C", "Answer: A. No, Answer: C", True),
  ("C", "Answer: C. No, Answer: A", False),
  ("C", "C", True),  # All of the text stands behind the last "Answer".
  ("C", "Cats", True),
  ("C", "Answer: Cats", True),
  ("C", "<C>", True),
  ("C", "c", False),
  ("C", "Answer: (C)", False),
  ("C", "**Answer:** C", False),
  ("C", "The answer is C.", False),
  ("C", "<answer>C</answer>", False),
  ("C", "Answer: \\boxed{C}", False),
  ("C", "Answer: ", False),
  ("C", "", False),
  ("H", "Answer:H", True),
  ("I", "Answer: I", False),
]
CASES = [
  (rule, *case)
  for rule, cases in (
    ("chartqa", CHARTQA),
    ("mathverse", MATHVERSE),
    ("mathvision", MATHVISION),
    ("wemath", WEMATH),
  )
  for case in cases
]


@pytest.mark.parametrize(("rule", "gold", "response", "wanted"), CASES)
def test_a_rule_judges_as_its_published_program(rule, gold, response, wanted):
  asked = problem(rule, gold)
  if rule == "mathvision" and gold == "B":
    asked = problem(rule, gold, ("10", "12", "14"), "12")
  assert rules.name_of(asked) == rule
  assert rules.is_right(rule, response, None, asked) is wanted


def test_an_extraction_stands_for_the_response():
  asked = problem("chartqa", "14")
  assert rules.is_right("chartqa", "It may be 14 or 15.", "14", asked)
  assert not rules.is_right("chartqa", "14", "15", asked)


def test_a_gold_that_was_not_stored_is_the_answer_or_its_letter():
  asked = problem("wemath", None, ("10 cm", "12 cm"), "12 cm")
  assert rules.is_right("wemath", "Answer: B", None, asked)
  hidden = problem("wemath", "", answer="")
  assert not rules.is_right("wemath", "", None, hidden)


@pytest.mark.parametrize(
  ("metadata", "name"),
  [
    ({"official_rule": "chartqa"}, "chartqa"),
    ({"official_rule": "unknown"}, ""),
    ({"official_rule": ["chartqa"]}, ""),
    ({"source": "GEOS", "split": "testmini"}, "mathvista"),
    ({"source": "GEOS", "split": "train"}, ""),
    ({}, ""),
  ],
)
def test_the_rule_is_stored_with_the_problem(metadata, name):
  asked = records.Problem(
    pid="1",
    question="?",
    answer="1",
    question_type="free_form",
    answer_type="integer",
    metadata=metadata,
  )
  assert rules.name_of(asked) == name


def test_mathvision_takes_no_hostile_expression_for_a_value():
  asked = problem("mathvision", "7")
  for text in ("9^{9^{9^{9}}}", "(" * 5000, "x" * 100_000, "\0", "1e999"):
    assert not mathvision.is_right(text, asked)


# Two problems of two steps and one of three: which parts are right.
STEPS = {
  ("2steps", "a"): {"1": True, "2": True, "multi": True},  # Mastered.
  ("2steps", "b"): {"1": True, "2": True, "multi": False},  # IG
  ("2steps", "c"): {"1": True, "2": False, "multi": True},  # Rote if strict.
  ("2steps", "d"): {"1": False, "2": False, "multi": True},  # Rote.
  ("3steps", "a"): {"1": True, "2": True, "3": False, "multi": False},  # IK
  ("2steps", "e"): {"1": True, "multi": True},  # Not asked in all parts.
}


def test_we_maths_metric_by_hand():
  graded = [
    ({"key": f"{steps}_{part}", "ID": name}, is_right)
    for (steps, name), parts in STEPS.items()
    for part, is_right in parts.items()
  ]
  found = wemath.steps_metric(reversed(graded))
  assert found == {
    "problems": 5,
    "S1": 7 / 11,
    "S2": 3 / 4,
    "S3": 0,
    "IK": 1,
    "IG": 1,
    "CM_strict": 1,
    "RM_strict": 2,
    "RM_rate_strict": 2 / 3,
    "score_strict": 1 - 3.5 / 5,
    "CM_loose": 2,
    "RM_loose": 1,
    "RM_rate_loose": 1 / 3,
    "score_loose": 1 - 2.5 / 5,
  }
  assert wemath.steps_metric([({"key": ["x"]}, True), ({}, False)]) == {}
