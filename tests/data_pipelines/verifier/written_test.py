"""Answers that are texts, and right answers of every type."""

import hypothesis
import pytest
from hypothesis import strategies

from data_pipelines import records
from data_pipelines.verifier import verify, written


def make_problem(answer, answer_type="text", **fields):
  return records.Problem(
    pid="1",
    question="?",
    answer=answer,
    question_type="free_form",
    answer_type=answer_type,
    **fields,
  )


PARIS = make_problem("Paris", aliases=("City of Light",))


def is_right(response, problem):
  return verify.verify(response, problem).correct


@pytest.mark.parametrize(
  "response",
  [
    "<answer>Paris</answer>",
    "<answer> paris. </answer>",
    '<answer>"Paris"</answer>',
    "<answer>the city of light</answer>",
    "Paris",
    "The answer is Paris.",
    "The answer is **Paris**.",
    "It lies on the Seine.\n\nFinal Answer: Paris",
    "**Answer**\n\nParis",
    "### Answer\nParis",
    r"\boxed{\text{Paris}}",
    r"<answer>\boxed{Paris}</answer>",
    "The capital is **Paris**, on the Seine.\nIt is big.",
    '{"answer": "Paris"}',
    "<think>London?</think>Paris",
  ],
)
def test_a_right_text_is_found(response):
  assert is_right(response, PARIS)


@pytest.mark.parametrize(
  "response",
  [
    "",
    "London",
    "Paris or London",
    "<answer>Paris, London</answer>",
    "<answer>Paris</answer><answer>London</answer>",
    "<answer>Paris",
    "<answer>not Paris</answer>",
    "The answer is not Paris.",
    "Is it Paris?",
    "I cannot say whether it is Paris.",
    "<think>Paris</think>",
    "<answer>Pari</answer>",
    r"\boxed{Paris} or \boxed{London}",
    '{"answer": "Paris", "answer2": "London"}',
  ],
)
def test_a_wrong_or_uncertain_text_is_not(response):
  assert not is_right(response, PARIS)


def test_fields_that_differ_are_no_answer():
  response = '{"answer": "Paris", "answer2": "London"}'
  assert verify.verify(response, PARIS).answer is None


@pytest.mark.parametrize(
  ("gold", "answer", "right"),
  [
    ("the Eiffel Tower", "Eiffel  tower!", True),
    ("don\u2019t", "don't", True),
    ("cafe\u0301", "caf\u00e9", True),
    ("three", "3", True),
    ("3", "Three", True),
    ("3 apples", "3 pears", False),
    ("007", "7", False),
    ("5 July 1998", "5 july 1998", True),
    ("5 July 1998", "July 5, 1998", False),
    ("1998-07-05", "1998-07-06", False),
    ("10:30", "1030", False),
    ("the", "a", False),
    ("?", "?", True),
    ("yes", "YES.", True),
    ("No", "no", True),
    ("no", "yes", False),
    ("True", "true.", True),
    ("True", "False", False),
    ("5%", "5", False),
  ],
)
def test_texts_are_equal_up_to_their_spelling(gold, answer, right):
  assert is_right(f"<answer>{answer}</answer>", make_problem(gold)) == right


TEXTS = strategies.text(
  strategies.characters(exclude_characters="<>", exclude_categories=["C"]),
  min_size=1,
  max_size=40,
).filter(str.strip)
NUMBERS = strategies.decimals(-(10**6), 10**6, places=2, allow_nan=False).map(
  str
)


@hypothesis.given(strategies.data())
@hypothesis.settings(deadline=None, derandomize=True, max_examples=80)
def test_a_right_answer_of_any_type_passes_as_it_stands(data):
  """What `prepare` demands of each record."""
  for kind, texts in (
    ("text", TEXTS),
    ("expression", TEXTS),
    ("float", NUMBERS),
    ("integer", strategies.integers(-(10**9), 10**9).map(str)),
    ("list", strategies.lists(NUMBERS, min_size=1).map(str)),
  ):
    gold, alias = data.draw(texts), data.draw(texts)
    precision = 2 if kind == "float" else -1
    problem = make_problem(gold, kind, aliases=(alias,), precision=precision)
    for answer in (gold, alias):
      assert is_right(f"<answer>{answer}</answer>", problem), (kind, answer)


@pytest.mark.parametrize(
  ("gold", "answer", "right"),
  [
    ("100", "105", True),
    ("100", "95", True),
    ("100", "105.01", False),
    ("-100", "-96", True),
    ("-100", "96", False),
    ("0", "0.0", True),
    ("0", "0.1", False),
  ],
)
def test_a_tolerance_is_relative_to_the_right_answer(gold, answer, right):
  """As ChartQA's relaxed accuracy; nothing but 0 is close to 0."""
  response = f"<answer>{answer}</answer>"
  for kind in ("integer", "float", "list", "expression"):
    asked = f"[7,{gold}]" if kind == "list" else gold
    given = f"<answer>[7, {answer}]</answer>" if kind == "list" else response
    problem = make_problem(asked, kind, tolerance=0.05, precision=2)
    assert is_right(given, problem) == right
    exact = is_right(given, make_problem(asked, kind, precision=2))
    assert exact == (answer == "0.0")


def test_a_list_has_an_order_and_a_length():
  problem = make_problem("[red, 2]", "list", aliases=("[2, red]",))
  for text in ("[red, 2]", "[Red, 2.0]", "[2, red]"):
    assert is_right(f"<answer>{text}</answer>", problem)
  for text in ("[red]", "[red, 2, 2]", "[blue, 2]"):
    assert not is_right(f"<answer>{text}</answer>", problem)


def test_scorers_read_the_whole_answer_of_a_completion():
  grid = "1 2\n2 1"
  for response in (
    grid,
    f"<answer>\n{grid}\n</answer>",
    f"<think>x</think>{grid}",
    rf"\boxed{{{grid}}}",
  ):
    problem = make_problem(grid, "scored", metadata={"scorer": "none:x"})
    assert verify.verify(response, problem).answer == grid
  assert written.find("The answer is 5", "scored") == ("5", "cue")
