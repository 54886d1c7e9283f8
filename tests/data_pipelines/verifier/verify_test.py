"""The verifier: right and wrong answers, and agreement with labels."""

import dataclasses
import re
import time

import hypothesis
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies

from data_pipelines import records
from data_pipelines.verifier import verify

COLOURS = ("red", "blue", "dark green", "18")
JUNK = [
  "",
  " ",
  "\n\n",
  "?",
  "...",
  "N/A",
  "n/a",
  "none",
  "unknown",
  "NaN",
  "nan",
  "inf",
  "-inf",
  "Infinity",
  "1e999",
  "9" * 1000,
  "hello",
  "the the the",
  "lorem ipsum dolor sit amet",
  "I cannot answer",
  "I'm sorry, but I cannot answer this question.",
  "It cannot be determined from the picture.",
  "Please provide more information.",
  "The answer is",
  "answer answer answer",
  "It is",
  "ABCD",
  "A B C D",
  "A, B, C, D",
  "A/B/C/D",
  "A or B",
  "(A) (B) (C) (D)",
  "The answer is (A) or (B).",
  "The answer is A, B, C or D",
  "red, blue, dark green, 18",
  "(A) red (B) blue (C) dark green (D) 18",
  "(A) red\n(B) blue\n(C) dark green\n(D) 18",
  "The answer is red or blue.",
  "0 1 2 3 4 5 6 7 8 9",
  "1, 2, 3, 4, 5",
  "4 or 5 or 6",
  "yes no",
  "Yes or No",
  "<answer>",
  "</answer>",
  "[]",
  r"\boxed{}",
  r"\boxed{A, B, C, D}",
  "**A** **B**",
  "\u200b",
  "\u200b\u2060\ufeff",
  "\U0001f600",
  "-",
  "--",
  "-1e999",
  "<answer/>",
  "<answer>5",
  "<answer>blue",
  "<answer>Yes",
  "<answer>No",
  "<answer>5 blue Yes",
  "<answer><answer>5</answer></answer>",
  "<answer><answer>blue</answer></answer>",
  "<answer>5</answer><answer>6</answer>",
  "<answer>6</answer> No, <answer>5</answer>",
  "<answer>red</answer><answer>blue</answer>",
  "<answer>Yes</answer><answer>No</answer>",
  "<answer>No</answer><answer>Yes</answer>",
  "<answer>5</answer> or <answer>",
  "<answer>5</answer>" * 100,
  "<think>5 blue Yes",
  "<think>The answer is 5.</think>",
  "<think>The answer is blue.</think>",
  "(A)(B)(C)(D)",
  "A to D",
  "The options are A, B, C and D. I can't tell.",
  "Choices: (A) Yes (B) No",
  "All of the above",
  "None of the options match blue.",
  "The answer is between 4 and 6.",
  "I'm unable to view images.",
  "No image was provided.",
  "The image is not visible to me, nor blue, nor 5.",
  "Unfortunately, the picture is missing.",
  "The question is unclear.",
  "Please upload the picture so that I can help.",
  "There is not enough information to answer.",
  "I have no idea.",
  "As an AI language model, I am not able to process images.",
  "I'm not sure if it is 5.",
  "Could the answer be B?",
  "Not yes.",
  "\u65e0\u6cd5\u786e\u5b9a",
  "\u62b1\u6b49\uff0c\u6211\u4e0d\u80fd\u56de\u7b54",
  '{"answer": null}',
  '{"answer": "A or B"}',
  '{"answer": [5, 6]}',
  "Hint: Please answer the question and provide the correct option letter, "
  "e.g., A, B, C, D, at the end.",
  "Hint: Please answer the question requiring an integer answer and provide "
  "the final value, e.g., 3, 4, 5, at the end.",
]


def make_problem(answer, choices=(), answer_type="integer", precision=-1):
  return records.Problem(
    pid="1",
    question="",
    choices=choices,
    unit="",
    precision=precision,
    answer=answer,
    question_type="multi_choice" if choices else "free_form",
    answer_type="text" if choices else answer_type,
    query="",
    solution="",
    metadata={},
  )


FIVE = make_problem("5")
BLUE = make_problem("blue", COLOURS)
YES = make_problem("Yes", ("Yes", "No"))
FLOAT = make_problem("1.25", answer_type="float", precision=2)
LIST = make_problem("[1, 2.5]", answer_type="list")


def is_right(response, problem):
  return verify.verify(response, problem).correct


@pytest.mark.parametrize("response", JUNK)
def test_junk_is_not_right(response):
  options = [(COLOURS, text) for text in COLOURS]
  options += [(("Yes", "No"), text) for text in ("Yes", "No")]
  chosen = [make_problem(text, choices) for choices, text in options]
  for problem in (FIVE, FLOAT, LIST, *chosen):
    assert not is_right(response, problem)
    assert not is_right(f"<answer>{response}</answer>", problem)


@pytest.mark.parametrize(
  "response",
  [
    "5",
    "5.0",
    " 5 ",
    "five",
    "5 apples",
    "There are 5 apples.",
    "There are five bars that are lower than 40.",
    "I count 3 on the left and 2 on the right. So 3 + 2 = 5.",
    "The answer is 5.",
    "The answer is: 5",
    "**Answer:** 5",
    "It is **5**. The bars are 4 and 6 high.",
    r"So we get \boxed{5}, which is less than 6.",
    r"\boxed{\text{5}}",
    "The answer is 2 + 3 = 5.",
    "\u7b54\u6848\u662f5\u3002",
    "I see 6. <answer>5</answer>",
    "<answer>5</answer> Again: <answer>5.0</answer>",
    "<answer> $5$ </answer>",
    "<answer>x = 5</answer>",
    "<answer>\\boxed{5}</answer>",
    "<ANSWER>5</ANSWER>",
    "<think>The answer is 6.</think>5",
    "<think>6? <answer>6</answer></think><answer>5</answer>",
    '{"answer": 5}',
    '```json\n{"final_answer": "5 cm", "confidence": 0.9}\n```',
    "### Final Answer\n5",
    "**Answer**\n\n5",
    "The final answer is $\\boxed{5}$. I hope it is correct.",
    "Final Answer: 5 years",
    "5 (five)",
    "5 (2 + 3)",
    "5<|im_end|>",
    "5<end_of_turn>",
    "The answer is 5, not 6.",
    "It is not 6. It is 5.",
    "The answer is 6. Wait, I missed none. The answer is 5.",
    "The difference is 10 - 5, i.e., 5.",
    "There are 2 red balls and 3 blue ones, so there are 5 balls.",
    "In 2007, there are 5 schools.",
    "In the picture, 5 were born after the war (1945).",
    "The most is 5.\n\nBar | Height\n--- | ---\nA | 5\nB | 4",
    "The lamp costs S5.",
    "\u06f5",
    "\u067e\u0627\u0633\u062e: \u06f5",
    "\u7b54\u6848\uff1a\u4e94",
    "\u56e0\u6b64\uff0c\u7b54\u6848\u662f5\u4e2a\u3002",
  ],
)
def test_a_right_number_is_found(response):
  assert is_right(response, FIVE)


@pytest.mark.parametrize(
  "response",
  [
    "6",
    "-5",
    "5.4",
    "50",
    "1,5",
    "5/6",
    "15",
    "The answer is 6, not 5.",
    "There are between 5 and 7.",
    "Around 5-7.",
    "It is greater than 5.",
    "The ratio is 5:2.",
    "5 <answer>6</answer>",
    "5 <answer></answer>",
    "5 <answer>unclear</answer>",
    "<answer>4, 5</answer>",
    "<answer>5 or 6</answer>",
    "<answer>I think that it may be 5 or so but I do not know</answer>",
    "I cannot answer, but 5 is a number.",
    "It's not 5.",
    "The answer is not 5.",
    "\u7b54\u6848\u4e0d\u662f5",
    "\u7b54\u6848\u662f5\u62166",
    "minus five",
    "negative 5",
    "twenty-five",
    "one hundred and five",
    "5 thousand",
    "5 million",
    "5 dozen",
    "5x",
    "5\u00b2",
    "5 or more",
    "x > 5",
    "\u00b15",
    "5~7",
    "(0, 5)",
    "5 to 6",
    "4 or maybe 5",
    "half of 5",
    "1, 2, 3, 4 and 5",
    r"\boxed{6} or \boxed{5}",
    '{"answer": 6}',
    "<answer>5</answer> <answer>6",
  ],
)
def test_a_wrong_or_uncertain_number_is_not(response):
  assert not is_right(response, FIVE)


@pytest.mark.parametrize(
  "response",
  [
    "B",
    "b",
    "<answer>b</answer>",
    "(B)",
    "B.",
    "B) blue",
    "(B) blue",
    "blue",
    "Blue.",
    "The answer is B.",
    "The answer is (B) blue.",
    "The correct option is (B), since (A) is too bright.",
    "(A) is incorrect. So (B).",
    "Option B is correct.",
    "The circle is blue.",
    "If the red one goes, the blue one stays.",
    "(A) red\n(B) blue\n(C) dark green\nThe answer is B",
    "\u7b54\u6848\u9009B",
    "\u56e0\u6b64,\u9009\u9879B\u662f\u6b63\u786e\u7b54\u6848",
    r"\boxed{B}",
    r"\boxed{\text{(B) blue}}",
    "**(B) blue** and not red",
    "red? <answer>blue</answer>",
    "<answer>B</answer>",
    "<answer>(b)</answer>",
    "<answer>B. blue</answer>",
    "<answer>Option B</answer>",
    "### Answer\nB",
    '{"reasoning": "(A) is red", "answer": "B"}',
    "<think>Maybe (A)?</think>\n\nB",
    "The picture shows it clearly.\n\nB",
    "The answer is (B) because (A) is too bright.",
    "The answer is B, not A.",
    "The answer is A. Wait, I looked at the wrong ball. The answer is B.",
    "(A) red is incorrect.\n(B) blue is correct.\n(C) dark green is incorrect.",
    "The ball is blue, not red.",
    "Looking at it, B is the best choice.",
    "Given the options, I would choose B.",
    "This corresponds to option B.",
    "So it is B.",
    "B is the answer.",
    "[B] blue",
    r"Final answer: $\boxed{\text{B}}$",
    r"\boxed{\textbf{(B)}\ blue}",
    "\u6545\u9009\uff1aB",
    "\u6240\u4ee5\u9009 B\u3002",
    "\u3010\u7b54\u6848\u3011B",
    "\u7b54\u6848\u662fB\uff0c\u4e0d\u662fC",
    # Persian: "The right answer is option B."
    "\u067e\u0627\u0633\u062e \u0635\u062d\u06cc\u062d"
    " \u06af\u0632\u06cc\u0646\u0647 B \u0627\u0633\u062a.",
    "B<|endoftext|>",
  ],
)
def test_a_right_option_is_found_by_letter_or_text(response):
  assert is_right(response, BLUE)


@pytest.mark.parametrize(
  "response",
  [
    "A",
    "red",
    "bluebell",
    "light-blueish",
    "E",
    "<answer>A. blue</answer>",
    "<answer>B. red</answer>",
    "<answer>(B) and (C)</answer>",
    "<answer>not blue</answer>",
    "Is it red or blue?",
    "blue <answer>red</answer>",
    "The answer is not B.",
    "It's not (B).",
    "(B) is not the answer.",
    "**B** is wrong",
    "The answer is not (B) but (C).",
    "The ball is not blue.",
    "neither red nor blue",
    "anything but blue",
    "every colour except blue",
    "It cannot be blue.",
    "The answer is A (blue).",
    "A. blue",
    "The correct option is (A) blue.",
    "I think it's either A or B.",
    "The answer is B and C.",
    "\u4e0d\u9009B",
    "\u9009\u9879B\u4e0d\u6b63\u786e",
    "As an AI, I cannot view images. Option B says blue.",
    '{"answer": "B", "answer2": "C"}',
  ],
)
def test_a_wrong_or_conflicting_option_is_not(response):
  assert not is_right(response, BLUE)


def test_any_letter_of_an_equal_text_is_right():
  problem = make_problem("18", ("12", "18", "18"))
  assert is_right("<answer>B</answer>", problem)
  assert is_right("<answer>C</answer>", problem)
  assert is_right("<answer>18</answer>", problem)
  assert not is_right("<answer>A</answer>", problem)


def test_the_text_of_an_option_beats_its_reading_as_a_letter():
  problem = make_problem("(b)", ("(c)", "(a)", "(b)"))
  assert is_right("<answer>(b)</answer>", problem)
  assert is_right("<answer>C</answer>", problem)
  swapped = make_problem("A", ("B", "A"))
  assert is_right("<answer>A</answer>", swapped)


def test_an_option_is_known_by_its_value():
  problem = make_problem("145\u00b0", ("135\u00b0", "145\u00b0"))
  for text in ("145", "145 degrees", r"$145^\circ$", "The angle is 145\u00b0."):
    assert is_right(text, problem)
  assert not is_right("1450", problem)


def test_short_options_do_not_hide_in_longer_ones():
  problem = make_problem("5m", ("5m", "5\u221a{3}m", "15m"))
  assert not is_right(r"The height is $5\sqrt{3}$m.", problem)
  assert not is_right("The height is 15m.", problem)
  assert not is_right("The height is -5m.", problem)
  assert not is_right("The height is more than 5m.", problem)
  assert is_right("The height is 5m.", problem)


@pytest.mark.parametrize(
  ("response", "answer"),
  [
    ("Yes, it is.", "Yes"),
    ("No.", "No"),
    ("The red bar is not the highest.", "No"),
    ("The red bar is the highest of them.", "Yes"),
    ("<answer>yes</answer>", "Yes"),
    ("A: No, the bar is low.", "No"),
    ("Yes, no other bar is higher.", "Yes"),
    ("Yes. No further words are needed.", "Yes"),
    ("Yes? No.", "No"),
    ("At first yes, but the answer is no.", "No"),
    ("\u662f\u7684", "Yes"),
    ("\u5426", "No"),
  ],
)
def test_yes_and_no_are_read_from_the_statement(response, answer):
  assert verify.verify(response, YES).answer == answer


@pytest.mark.parametrize(
  ("response", "right"),
  [
    ("1.25", True),
    ("1.2451", True),
    ("1.2549", True),
    ("1.255", True),  # A half rounds either way.
    ("1.2551", False),
    ("1.24", False),
    ("1.3", False),
    ("5/4", True),
    ("<answer>1.25 m</answer>", True),
    ("1 1/4", True),
    ("1\u00bc", True),
    (r"1\frac14", True),
    ("\u2248 1.25 m/s\u00b2", True),
    ("1.25 \u00d7 10\u00b3", False),
    ("1.25 million", False),
    ("11/4", False),
  ],
)
def test_a_float_is_right_when_it_rounds_to_the_answer(response, right):
  assert is_right(response, FLOAT) == right


@pytest.mark.parametrize(
  ("response", "right"),
  [
    ("[1, 2.5]", True),
    ("[1.0,2.50]", True),
    ("The answer is [1, 2.5].", True),
    ("<answer>1, 2.5</answer>", True),
    ("<answer>(1, 2.5)</answer>", True),
    ("[2.5, 1]", False),
    ("[1, 2.5, 3]", False),
    ("[1]", False),
    ("[[1, 2.5]]", False),
    ("[1, 2.5", False),
    ("[\n  1,\n  2.5\n]", True),
    ("The answer is (1, 2.5).", True),
    ('{"answer": [1, 2.5]}', True),
  ],
)
def test_a_list_is_right_element_by_element(response, right):
  assert is_right(response, LIST) == right


def test_integers_past_the_range_of_floats_are_distinguished():
  problem = make_problem("9007199254740993")
  assert is_right("<answer>9007199254740993</answer>", problem)
  assert not is_right("<answer>9007199254740992.0</answer>", problem)


@pytest.mark.parametrize("problem", [FIVE, BLUE, FLOAT, LIST])
def test_without_a_public_answer_nothing_is_right(problem):
  hidden = dataclasses.replace(problem, answer="")
  verdict = verify.verify(f"<answer>{problem.answer}</answer>", hidden)
  assert verdict.answer is not None
  assert not verdict.correct
  assert not is_right("", hidden)


def test_a_hidden_answer_is_not_the_empty_option():
  assert not is_right("<answer></answer>", make_problem("", ("", "red")))


@pytest.mark.parametrize(
  ("response", "how"),
  [
    ("<answer>5</answer>", "tag"),
    (r"\boxed{5}", "boxed"),
    ("5", "bare"),
    ("I get **5** here", "bold"),
    ("I get 6, so the answer is 5 here", "cue"),
    ("I think that we get 5", "statement"),
    ("I do not know", "none"),
    ('{"answer": 5}', "json"),
  ],
)
def test_a_verdict_says_which_rule_read_it(response, how):
  verdict = verify.verify(response, FIVE)
  assert verdict.how == how
  assert verdict.answer == (None if how == "none" else "5")


PIECES = [
  "<answer>",
  "</answer>",
  "5",
  "-5",
  "1,",
  "1/",
  "blue",
  "(A) ",
  "A ",
  "the answer is ",
  "answer ",
  r"\boxed{",
  r"\frac{1}{",
  "{",
  "}",
  "[1,",
  "**",
  "\n",
  " ",
  ". ",
  "if ",
  "not ",
  "yes ",
  "1 to ",
  "\u7b54\u6848",
  "\u221a(",
  "one ",
  "there are ",
]
PROBLEMS = [FIVE, BLUE, YES, FLOAT, LIST]


@hypothesis.given(
  strategies.lists(strategies.sampled_from(PIECES)).map("".join)
  | strategies.text()
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_no_completion_raises(response):
  for problem in PROBLEMS:
    verdict = verify.verify(response, problem)
    assert not (verdict.correct and verdict.answer is None)
    assert verdict == verify.verify(response, problem)


def cpu(response):
  start = time.process_time()
  for problem in PROBLEMS:
    verify.verify(response, problem)
  return time.process_time() - start


@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>"])
def test_twice_a_hostile_text_costs_about_twice(form):
  """A quadratic rule would cost four times as much.

  benchmarks/verifier.py prints the costs.
  """
  for piece in PIECES:
    half = form.format(piece * (250_000 // len(piece)))
    whole = form.format(piece * (500_000 // len(piece)))
    half_cost, whole_cost = cpu(half), cpu(whole)
    # Timers are coarse, and other processes disturb the caches.
    assert whole_cost <= 3 * 2 * half_cost + 0.2, piece


RESPONSES = strategies.lists(strategies.sampled_from(PIECES)).map("".join)
SPACE = strategies.text(" \n\t", max_size=4)


@hypothesis.given(RESPONSES, SPACE, SPACE)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=15)
def test_space_around_a_completion_changes_nothing(response, before, after):
  for problem in PROBLEMS:
    verdict = verify.verify(response.strip(), problem)
    padded = f"{before}{response.strip()}{after}"
    assert verify.verify(padded, problem) == verdict


WRITTEN = (
  "{}",
  "The answer is {}.",
  "**Answer: {}**",
  "So x = {}",
  "It is {} cm long.",
  r"Thus $\boxed{{{}}}$",
  "<answer>{}</answer>",
  '{{"answer": "{}"}}',
  "\u7b54\u6848\u662f{}\u3002",
)


@hypothesis.given(
  strategies.integers(-(10**9), 10**9), strategies.integers(-(10**9), 10**9)
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=15)
def test_the_right_number_alone_is_right_however_it_is_written(right, other):
  hypothesis.assume(right != other)
  problem = make_problem(str(right))
  for form in WRITTEN:
    for spelt in ("{}", "{:,}", "{}.0"):
      assert is_right(form.format(spelt.format(right)), problem)
      assert not is_right(form.format(spelt.format(other)), problem)


@hypothesis.given(
  strategies.lists(
    strategies.from_regex(r"[a-z]{3,8}( [a-z]{3,8})?", fullmatch=True),
    min_size=2,
    max_size=6,
    unique=True,
  ),
  strategies.data(),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=15)
def test_the_right_option_alone_is_right_however_it_is_named(choices, data):
  right = data.draw(strategies.sampled_from(choices))
  problem = make_problem(right, tuple(choices))
  for letter, text in zip("ABCDEF", choices, strict=False):
    for response in (
      letter,
      f"({letter}) {text}",
      f"The answer is {letter}.",
      f"Therefore, the correct option is ({letter}) {text}.",
      f"<answer>{letter}</answer>",
      f"<answer>{text}</answer>",
    ):
      assert is_right(response, problem) == (text == right), response


# Agreement with the official labels of other models' completions.


def problem_of(row):
  return dataclasses.replace(
    make_problem(
      row["answer"],
      tuple(row["choices"] or ()),
      row["answer_type"],
      int(row["precision"] or -1),
    ),
    pid=row["pid"],
  )


def test_verdicts_agree_with_the_official_labels(responses):
  """About half of the disagreements are errors of the labels."""
  agreed, free_form, wrong_paid = [], [], []
  for row in responses:
    if row["flags"]:
      continue
    correct = is_right(row["response"], problem_of(row))
    agreed.append(correct == row["official_true_false"])
    if row["question_type"] == "free_form":
      free_form.append(agreed[-1])
    if not row["official_true_false"]:
      wrong_paid.append(correct)
  assert len(agreed) == 7483
  assert sum(agreed) / len(agreed) >= 0.980
  assert sum(free_form) / len(free_form) >= 0.992
  assert sum(wrong_paid) / len(wrong_paid) <= 0.0085


RENDERINGS = {
  "bare": "{answer}",
  "cue": "The answer is {answer}.",
  "boxed": r"So we get \boxed{{{answer}}}",
  "tag": "Counting gives <answer>{answer}</answer>",
  "bold": "It is **{answer}**.",
  "letter": "{letter}",
  "letter cue": "The correct option is ({letter}).",
  "letter tag": "<answer>{letter}</answer>",
  "letter and text": "({letter}) {answer}",
  "thousands": "{thousands}",
}


@pytest.mark.parametrize("rendering", RENDERINGS.values(), ids=RENDERINGS)
def test_the_right_answer_is_right_however_it_is_rendered(
  fixtures, responses, rendering
):
  problems = {row["pid"]: problem_of(row) for row in responses}
  assert len(problems) == 1000
  for path in sorted(
    (fixtures / "mathvista_schema" / "data").glob("*.parquet")
  ):
    for row in pq.read_table(path).to_pylist():
      problem = records.from_result(row)
      if problem.is_checkable:
        problems[f"schema {problem.pid}"] = problem
  assert len(problems) == 1323
  missed = []
  for pid, problem in problems.items():
    letter, thousands = problem.answer, problem.answer
    if problem.choices:
      letter = chr(65 + problem.choices.index(problem.answer))
    elif problem.answer_type == "integer":
      thousands = f"{int(problem.answer):,}"
    response = rendering.format(
      answer=problem.answer, letter=letter, thousands=thousands
    )
    if problem.choices or "{letter}" not in rendering:
      if not is_right(response, problem):
        missed.append(pid)
  assert not missed


def test_no_listing_of_all_options_is_right(responses):
  problems = {
    row["pid"]: problem_of(row) for row in responses if row["choices"]
  }
  for pid, problem in problems.items():
    texts = problem.choices
    letters = [chr(65 + i) for i in range(len(texts))]
    both = [f"({a}) {b}" for a, b in zip(letters, texts, strict=True)]
    for named in (texts, letters, both):
      if len(set(texts)) == 1:
        continue
      for joiner in (" ", ", ", "\n"):
        for wrap in ("{}", "<answer>{}</answer>"):
          response = wrap.format(joiner.join(named))
          assert not is_right(response, problem), (pid, response)


COLOURLESS = [text for text in JUNK if not re.search("red|blue|[<{]", text)]


@pytest.mark.parametrize("response", COLOURLESS)
def test_junk_is_not_right_on_real_problems(responses, response):
  problems = {row["pid"]: problem_of(row) for row in responses[:1000:4]}
  assert len(problems) == 250
  for wrap in ("{}", "<answer>{}</answer>"):
    paid = [
      pid
      for pid, problem in problems.items()
      if is_right(wrap.format(response), problem)
    ]
    assert not paid
