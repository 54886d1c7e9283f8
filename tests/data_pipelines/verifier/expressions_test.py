"""Expressions and scored answers, and the workers that judge them."""

import functools
import pathlib
import subprocess
import sys
import time
import tomllib

import pytest

from data_pipelines import records
from data_pipelines.verifier import comparisons, latex, verify
from data_pipelines.workers import pool

ROOT = pathlib.Path(__file__).resolve().parents[3]
CASES = tomllib.loads(
  pathlib.Path(__file__).with_name("expression_cases.toml").read_text("utf-8")
)
LABELLED = [
  (kind, gold, response, label == "right")
  for kind, pairs in CASES.items()
  for label in ("right", "wrong")
  for gold, response in pairs[label]
]


def make_problem(answer, answer_type="expression", **fields):
  return records.Problem(
    pid="1",
    question="?",
    answer=answer,
    question_type="free_form",
    answer_type=answer_type,
    **fields,
  )


def make_scored(scorer, answer="7", entry=None):
  metadata = {"scorer": scorer, "entry": entry or {}}
  return make_problem(answer, "scored", metadata=metadata)


def is_right(answer, problem):
  verdict = verify.verify(f"<answer>{answer}</answer>", problem)
  assert not verdict.abstained
  return verdict.correct


@pytest.fixture
def no_workers():
  """No workers and no known comparisons, before and after."""
  comparisons.close()
  yield
  comparisons.close()


def test_verdicts_are_the_labels():
  golds = [make_problem(gold) for _, gold, _, _ in LABELLED]
  responses = [response for _, _, response, _ in LABELLED]
  verdicts = verify.verify_all(responses, golds)
  missed = [
    case
    for case, verdict in zip(LABELLED, verdicts, strict=True)
    if verdict.correct != case[3]
  ]
  assert len(LABELLED) >= 200
  assert not any(verdict.abstained for verdict in verdicts)
  assert not missed
  # The order and the company of the rows change nothing.
  again = verify.verify_all(responses[::-5], golds[::-5])
  assert again == verdicts[::-5]


@pytest.mark.parametrize("kind", CASES)
def test_each_right_answer_is_right_as_it_stands(kind):
  for pairs in CASES[kind].values():
    for gold, _ in pairs:
      assert is_right(gold, make_problem(gold)), gold


HOSTILE = (
  "9^{9^{9}}",
  "((9^9)^9)^9",
  "9" * 1000,
  r"\sqrt{" * 1000 + "2" + "}" * 1000,
  r"\sqrt" * 300 + "2",
  "(10^9)!",
  "5" + "!" * 50,
  r"\binom{10^9}{5}",
  r"\exp(\exp(\exp(9)))",
  r"\sin(9^{9^9})",
  "(x+y)^{99999}",
  "(" * 400 + "1" + ")" * 400,
  "x" * 900,
  "|x" * 100,
  "1/2/" * 100 + "3",
  r"\pm" * 100 + "1",
  "1," * 400,
  "x=" * 300 + "1",
  r"\frac" * 300,
  r"\begin{pmatrix}" * 50,
  r"\frac{1}{0}",
  r"\infty-\infty",
)


def test_hostile_expressions_are_wrong_and_end_soon(monkeypatch, no_workers):
  monkeypatch.setattr(comparisons, "_NUM_WORKERS", 1)
  is_right("x", make_problem("y"))  # The worker starts.
  for gold in (r"\frac{1}{2}", "x^2 + 1"):
    problem = make_problem(gold)
    for text in HOSTILE:
      start = time.monotonic()
      assert not is_right(text, problem), text
      assert time.monotonic() - start < 4, text


@pytest.mark.parametrize("kind", ["expression", "text", "scored", "unchecked"])
def test_a_hostile_megabyte_costs_little(kind):
  problem = make_problem(r"\frac{1}{2}", kind, metadata={"scorer": "none:x"})
  for piece in (
    "$",
    r"\boxed{",
    r"\frac{1}{2}",
    "{",
    "answer is $x$ ",
    "**a**",
  ):
    text = piece * (1_000_000 // len(piece))
    for response in (text, f"<answer>{text}</answer>", f"The answer is {text}"):
      start = time.process_time()
      assert not verify.verify(response, problem).correct
      assert time.process_time() - start < 0.5


def test_what_needs_no_worker_starts_none(no_workers):
  for gold, answer, right in (
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", "2/4", True),
    (r"\frac{1}{3}", "0.333", False),
    ("x + 1", "x+1", True),
    (r"\int_0^1 x", r"\int_0^1 x", True),
    ("x", r"\int_0^1 x", False),
    ("x", "9" * 2000, False),
  ):
    assert is_right(answer, make_problem(gold)) == right
  assert not comparisons._pools


def test_equal_pairs_are_compared_once(monkeypatch, no_workers):
  calls = []
  submit = pool.Pool.submit

  def counted(self, *arguments, **options):
    calls.append(arguments)
    return submit(self, *arguments, **options)

  monkeypatch.setattr(pool.Pool, "submit", counted)
  problems = [make_problem(r"2\sqrt{3}")] * 6
  responses = [r"\boxed{\sqrt{12}}", r"<answer>$\sqrt{12}$</answer>"] * 3
  assert all(v.correct for v in verify.verify_all(responses, problems))
  assert len(calls) == 1
  cache = functools.lru_cache(1)(comparisons._submit.__wrapped__)
  monkeypatch.setattr(comparisons, "_submit", cache)
  assert not is_right("x", make_problem(r"2\sqrt{3}"))
  assert is_right(r"\sqrt{12}", problems[0])
  assert len(calls) == 3
  pool.close_all()  # As another program's end in this process.
  assert is_right(r"\frac{6}{\sqrt{3}}", problems[0])


def test_aliases_units_and_tolerance_of_an_expression():
  problem = make_problem(r"3\pi", aliases=(r"\tau", "x"), tolerance=0.01)
  for answer in ("9.42", "9.34", r"\tau", "x", r"3\pi"):
    assert is_right(answer, problem)
  for answer in ("9.32", "9.53", "y"):
    assert not is_right(answer, problem)
  length = make_problem("5", unit="cm")
  assert is_right("5", length) and is_right("50 mm", length)
  assert not is_right("5 m", length)


@pytest.fixture
def sleeper(monkeypatch, no_workers):
  path = "tests.data_pipelines.workers.hostile:score_after"
  monkeypatch.setattr(comparisons, "SCORERS", {"sleeper": path})
  monkeypatch.setattr(comparisons, "_TIMEOUT_SECONDS", 2.0)


def test_a_scorer_must_give_one_to_be_right(sleeper):
  for score, right in (("1.0", True), ("0.99", False), ("1.5", False)):
    assert is_right("0", make_scored(f"sleeper:{score}")) == right
  # Never a path that the data name.
  assert not is_right("0", make_scored("builtins:float"))
  assert not is_right("0", make_scored(""))


def test_a_comparison_that_is_killed_abstains(sleeper):
  problem = make_scored("sleeper:1.0")
  responses = [
    "<answer>0</answer>",
    "<answer>60</answer>",
    "<answer>0.1</answer>",
  ]
  verdicts = verify.verify_all(responses, [problem] * 3)
  assert [v.abstained for v in verdicts] == [False, True, False]
  assert [v.correct for v in verdicts] == [True, False, True]


def test_ctrl_c_ends_the_workers(monkeypatch, sleeper):
  def interrupted(comparison):
    raise KeyboardInterrupt

  monkeypatch.setattr(comparisons, "is_right", interrupted)
  start = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    verify.verify_all(["<answer>60</answer>"], [make_scored("sleeper:1.0")])
  assert not comparisons._pools and time.monotonic() - start < 15


def test_unchecked_problems_abstain():
  for answer in ("", "a reference"):
    verdict = verify.verify(
      "The answer is 5.", make_problem(answer, "unchecked")
    )
    assert verdict.abstained and not verdict.correct
    assert verdict.answer == "5."


def test_threads_and_forked_processes_compare_too():
  code = """
import os, threading
from data_pipelines import records
from data_pipelines.verifier import comparisons, verify
def right(answer):
  problem = records.Problem(pid="1", question="?", answer=r"2\\sqrt{3}",
    question_type="free_form", answer_type="expression")
  return verify.verify(f"<answer>{answer}</answer>", problem).correct
found = []
threads = [threading.Thread(target=lambda: found.append(right("6/√3")))
  for _ in range(4)]
[each.start() for each in threads]
[each.join() for each in threads]
assert found == [True] * 4
child = os.fork()
if not child:
  os._exit(0 if right("12/√12") and not right("12") else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert right("18/√27")
"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_shapes_are_read_from_text_alone():
  kinds = {
    r"\frac{1}{2}": "value",
    "5 cm": "value",
    "1, 2": "set",
    r"\{1\}": "set",
    "(1, 2)": "tuple",
    "[1, 2)": "tuple",
    "[1, 2, 3]": "tuple",
    "x = 1": "equation",
    "x = 1, y = 2": "system",
    "x = 1 or x = 2": "equation",
    "x < 1": "tuple",
    "2x < 1": "relation",
    "x < 1 or x > 2": "union",
    r"[1,2] \cup [3,4]": "union",
    r"\text{even}": "word",
    r"\pm 1": "set",
    "(x + 1)(x - 1)": "value",
  }
  found = {text: latex.parse(latex.normalize(text)).kind for text in kinds}
  assert found == kinds
