"""Three ways of grading a record: strict, official and stored.

Strict applies our verifier to the response. Official applies the rule of the
problem's own set to the extraction that an external program has stored, or to
the response if there is none. Stored is the label in the file.
"""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_pipelines.scoring import figures, results
from data_pipelines.scoring.official import rules, wemath
from data_pipelines.verifier import verify


class GradedRecord(NamedTuple):
  """A record with its grades."""

  result: results.Result
  verdict: verify.Verdict
  rule: str  # The name of the official rule; "" if the problem has none.
  official: bool | None  # None without a rule.


def verdicts(found: Sequence[results.Result]) -> list[verify.Verdict]:
  """Judges all responses together; a missing one counts as empty.

  `truncated` marks a response that was cut off at a limit of tokens.
  """
  return verify.verify_all(
    [result.response or "" for result in found],
    [result.problem for result in found],
    [result.record.get("truncated") is True for result in found],
  )


def grade(result: results.Result, verdict: verify.Verdict) -> GradedRecord:
  """Grades one record in each way; a missing response counts as empty."""
  problem, record = result.problem, result.record
  rule = rules.name_of(problem)
  if "official_rule" not in record and "official_rule" not in problem.metadata:
    rule = "mathvista"  # By another program, in MathVista's format.
  response, extraction = result.response or "", record.get("extraction")
  official = rules.is_right(rule, response, extraction, problem)
  return GradedRecord(result, verdict, rule, official)


def summary(graded: Sequence[GradedRecord]) -> dict[str, Any]:
  """The counts and the table of a results file, as a JSON object.

  Records without a public answer (`no_answer`) are not `scored`. One without a
  response is wrong. `official_rules` has the column and the records of each
  rule, `stored_extractions` the records with an extraction by an external
  program, `agreement` strict and stored labels, if there are any, `rows` the
  rows of `figures.table`, and `wemath` the figures of `wemath.steps_metric` for
  each way of grading.
  """
  scored = [each for each in graded if each.result.counts]
  marks = rules.columns(
    (x.result.problem.pid, x.rule, x.official) for x in scored
  )
  steps = [each for each in scored if each.rule == "wemath"]
  strict = [each.verdict.correct for each in scored]
  labels = [each.result.record.get("true_false") for each in scored]
  stored = [x if isinstance(x, bool) else None for x in labels]
  names = {x: f"official_{x}" if len(marks) > 1 else "official" for x in marks}
  ways: dict[str, Sequence[bool | None]] = {
    "strict": strict,
    **(
      {names[x]: marks[x] for x in marks} or {"official": [None] * len(scored)}
    ),
    "stored": stored,
  }
  return {
    "records": len(graded),
    "scored": len(scored),
    "no_answer": len(graded) - len(scored),
    "no_response": sum(each.result.response is None for each in scored),
    "official_rules": {
      rule: (name, sum(x.rule == rule for x in scored))
      for rule, name in names.items()
    },
    "stored_extractions": sum(
      each.result.record.get("extraction") is not None for each in scored
    ),
    "agreement": _agreement(strict, stored),
    "rows": figures.table(
      # A record that is keyed by its pid may lack the field.
      [{**x.result.record, "pid": x.result.problem.pid} for x in scored],
      ways,
    ),
    "wemath": {
      "strict": wemath.steps_metric(
        (x.result.problem.metadata, x.verdict.correct) for x in steps
      ),
      "official": wemath.steps_metric(
        (x.result.problem.metadata, x.official is True) for x in steps
      ),
    }
    if steps
    else {},
  }


def _agreement(
  strict: Sequence[bool], stored: Sequence[bool | None]
) -> dict[str, int] | None:
  """Counts the stored labels and those that the verifier contradicts."""
  pairs = collections.Counter(
    (x, y) for x, y in zip(strict, stored, strict=True) if y is not None
  )
  if not pairs:
    return None
  return {
    "labelled": pairs.total(),
    "right": pairs[True, True] + pairs[False, True],
    "wrong": pairs[True, False] + pairs[False, False],
    "missed_right": pairs[False, True],
    "missed_wrong": pairs[True, False],
  }


def strict_records(graded: Sequence[GradedRecord]) -> dict[str, dict[str, Any]]:
  """Adds `strict_answer` and `strict_true_false` to the records, by pid.

  `strict_true_false` is None where no answer is public.
  """
  return {
    each.result.problem.pid: {
      **each.result.record,
      **results.strict_fields(
        each.result.problem,
        each.verdict.answer,
        each.verdict.correct if each.result.counts else None,
      ),
    }
    for each in graded
  }
