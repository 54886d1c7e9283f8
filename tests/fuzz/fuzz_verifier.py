"""Fuzzes the verifier and the record parser with atheris.

Not a test: it runs for as long as it is told. CONTRIBUTING.md says how. What
it looks for: an exception other than `BadRecord`, a verdict that differs the
second time, a right verdict without an answer, and more than a second for one
input (`-timeout=1`).
"""

import json
import pathlib
import sys

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["data_pipelines"]):
  from data_pipelines import records
  from data_pipelines.verifier import verify

ROW = {
  "pid": "1",
  "question": "?",
  "image": "1.png",
  "decoded_image": {"bytes": b"png", "path": "1.png"},
  "choices": None,
  "unit": None,
  "precision": None,
  "answer": "5",
  "question_type": "free_form",
  "answer_type": "integer",
  "metadata": {},
  "query": "?",
}
CHOICE = {"question_type": "multi_choice", "answer_type": "text"}
PROBLEMS = [
  records.from_result(ROW | change)
  for change in (
    {},
    {"answer_type": "float", "precision": 2, "answer": "1.25"},
    {"answer_type": "list", "answer": "[1, 2.5]"},
    CHOICE | {"choices": ["red", "blue", "3", "\\frac{3}{4}"], "answer": "3"},
    CHOICE | {"choices": ["yes", "no"], "answer": "no"},
  )
]


def fuzz_verifier(data: atheris.FuzzedDataProvider) -> None:
  """One response to one problem, tagged or not."""
  problem = PROBLEMS[data.ConsumeIntInRange(0, len(PROBLEMS) - 1)]
  response = data.ConsumeUnicode(4_000)
  for text in (response, f"<answer>{response}</answer>"):
    verdict = verify.verify(text, problem)
    assert verdict == verify.verify(text, problem)
    assert verdict.answer is not None or not verdict.correct


def fuzz_records(data: atheris.FuzzedDataProvider) -> None:
  """One row: a known one with columns replaced, or whatever JSON gives."""
  row = dict(ROW)
  for name in sorted(ROW):
    kind = data.ConsumeIntInRange(0, 9)
    if kind == 0:
      row[name] = data.ConsumeUnicode(50)
    elif kind == 1:
      row[name] = data.ConsumeRegularFloat()
    elif kind == 2:
      row[name] = [data.ConsumeUnicode(9), data.ConsumeInt(4)][: kind - 1]
    elif kind == 3:
      row[name] = None
    elif kind == 4:
      try:
        row[name] = json.loads(data.ConsumeUnicode(60))
      except (ValueError, RecursionError):
        pass
  try:
    problem = records.from_result(row)
    records.validate(problem)
  except records.BadRecord:
    return
  assert records.from_example(records.to_example(problem)) == problem
  verify.verify(data.ConsumeUnicode(400), problem)


def one_input(raw: bytes) -> None:
  """What atheris calls."""
  data = atheris.FuzzedDataProvider(raw)
  (fuzz_verifier if data.ConsumeBool() else fuzz_records)(data)


if __name__ == "__main__":
  atheris.Setup(sys.argv, one_input)
  atheris.Fuzz()
