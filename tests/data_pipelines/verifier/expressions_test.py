"""Expressions: hand-labelled pairs, and what must not cost a worker."""

import pathlib
import tomllib

from data_pipelines import records
from data_pipelines.verifier import verify

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
