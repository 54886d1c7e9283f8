"""Measures the verifier on hostile megabytes and on real completions.

Prints CPU time, which other work on the machine hardly disturbs:

  python benchmarks/verifier.py [responses.jsonl.gz]

The file has one completion per line, with the problem's fields, in the format
of `tests/data_pipelines/verifier/verify_test.py`. The aim is below 50 ms for a
hostile megabyte, and below 1 ms for a real completion.
"""

import gzip
import json
import pathlib
import sys
import time

# A script finds the packages of its own checkout only by this.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_pipelines import records
from data_pipelines.verifier import verify  # noqa: E402

PIECES = (
  "(", ")", "[", "]", "{", "}", "<", "<answer>", "</answer>",
  "<answer>5</answer>", "<answer>A</answer>\n", "<answer><answer>",
  "<ANSWER>", "<think>", "</think>", "<think></think>", r"\boxed{",
  r"\boxed{5}", r"\fbox{", r"\frac{", r"\frac{1}{2}", r"\sqrt{", r"\text{",
  "\\", "\\text{\\frac{", "9", "1,", "1,000,", "1 ", "1. ", "1/", "1/1/1/",
  "1/2 ", "1 1/2 ", "1-", "1 to ", "1 or ", "-", "- ", "1e9", "5 x 10^",
  "10^-", "minus ", "negative ", "S1 ", "\u00b1", ",", ", ", " ", "\n", "\t",
  "\r\n", "\u200b", "\u3000", "answer is ", "The answer is ", "answer: ",
  "answer ", "the answer is not ", '"answer": ', '{"answer": "', "'answer':",
  "A ", "A, ", "(A) ", "(A) or ", "A\n", "A. red\n", "(A) red\n(B) blue\n",
  "red ", "red or ", "not red ", "not ", "no ", "yes ", "Yes, no ", "if ",
  "\u7b54\u6848", "\u7b54\u6848\u662f", "\u9009", "\u4e00", "\u5341",
  "\u4e07", "\u067e\u0627\u0633\u062e", "\u06f1", "\u221a(", "\u00b2",
  "\u207b", "\U0001f600", "\x00", "one ", "one hundred ", "twenty-", "dozen ",
  "there are ", "so ", "therefore ", "is the right ", "cannot ",
  "it cannot be determined ", "[1,", "[[1], ", "[1, 2] ", "(1, 2) ", "**",
  "**5** ", "**A** **", "# ", "# answer\n", "|", "Hint: Please answer ",
  "$", "$$", "`", "~", "=", "x = ", "= 5 ", "\u2248", "%", "5% ", "5 cm ",
  "! ", "? ", ". ", "'", '"', "<|im_end|>", "</s>", "<|", "|>", "a", "AB",
  "I'd choose ", "option ", "option B ", "Final Answer: ", "1, 2, 3, and ",
)  # fmt: skip


EXPRESSIONS = (
  (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}"),
  (r"2\sqrt{3}", r"The answer is $\sqrt{12}$."),
  (r"5\pi", "<answer>10\u03c0/2</answer>"),
  ("[0, \u221e)", r"<answer>$x \ge 0$</answer>"),
  ("(x+y)^2", "<answer>x^2 + 2xy + y^2</answer>"),
  ("y = 2x + 1", "<answer>2x - y + 1 = 0</answer>"),
  (r"1 \pm 2i", "<answer>1 + 2i, 1 - 2i</answer>"),
  (r"5\text{ cm}", "<answer>50 mm</answer>"),
)


def problem(answer: str, kind: str, *choices: str) -> records.Problem:
  """A problem with the fields that the verifier needs."""
  return records.Problem(
    pid="1",
    question="?",
    choices=choices,
    unit="",
    precision=2 if kind == "float" else -1,
    answer=answer,
    question_type="multi_choice" if choices else "free_form",
    answer_type=kind,
    query="",
    solution="",
    metadata={},
  )


PROBLEMS = (
  problem("5", "integer"),
  problem("1.25", "float"),
  problem("[1, 2.5]", "list"),
  problem("blue", "text", "red", "blue", "dark green", "18"),
  problem("Yes", "text", "Yes", "No"),
  problem("dark green", "text"),
  problem(r"2\sqrt{3}", "expression"),
)


def cost(response: str, problem: records.Problem) -> float:
  """Milliseconds of CPU time, the minimum of two runs."""
  times = []
  for _ in range(2):
    start = time.process_time()
    verify.verify(response, problem)
    times.append(time.process_time() - start)
  return 1e3 * min(times)


def hostile() -> None:
  """Prints the slowest of many megabytes of one repeated piece."""
  costs = []
  for piece in PIECES:
    text = piece * (1_000_000 // len(piece))
    for form in (text, f"<answer>{text}</answer>", f"The answer is {text}"):
      for asked in PROBLEMS:
        costs.append((cost(form, asked), form[:40], asked.answer))
  costs.sort(reverse=True)
  print(f"{len(costs)} hostile megabytes, ms of CPU, the slowest:")
  for milliseconds, text, answer in costs[:12]:
    print(f"  {milliseconds:8.2f}  {text!r} asked for {answer!r}")


def expressions() -> None:
  """Prints the time of expressions: the first, another one, the same again."""
  start = time.perf_counter()
  verify.verify("<answer>x</answer>", problem("y", "expression"))
  print(f"the first expression: {1e3 * (time.perf_counter() - start):.0f} ms")
  for name, prefix in (("cold", "{}"), ("warm", "3+{}"), ("cached", "3+{}")):
    times = []
    for gold, response in EXPRESSIONS:
      asked = problem(prefix.format(gold), "expression")
      start = time.perf_counter()
      verify.verify(response, asked)
      times.append(1e3 * (time.perf_counter() - start))
    mean = sum(times) / len(times)
    print(f"expressions, {name}: mean {mean:.2f} ms, most {max(times):.2f} ms")


def real(path: str) -> None:
  """Prints the costs of the completions in a file."""
  costs = []
  with gzip.open(path, "rt") as file:
    for line in file:
      row = json.loads(line)
      asked = problem(row["answer"], row["answer_type"], *row["choices"] or ())
      costs.append((cost(row["response"], asked), len(row["response"])))
  costs.sort(reverse=True)
  mean = sum(milliseconds for milliseconds, _ in costs) / len(costs)
  print(f"{len(costs)} real completions: mean {mean:.3f} ms of CPU")
  for milliseconds, length in costs[:5]:
    print(f"  {milliseconds:8.2f}  of {length} characters")


if __name__ == "__main__":
  expressions()
  hostile()
  for name in sys.argv[1:]:
    real(name)
