"""Three ways of grading a record: strict, official and stored.

Strict applies our verifier to the response. Official applies MathVista's own
normaliser to the stored extraction, or to the response if there is none. Stored
is the label in the file.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from data_pipelines.scoring import figures, results
from data_pipelines.verifier import mathvista_official as official
from data_pipelines.verifier import verify


@dataclasses.dataclass(frozen=True)
class GradedRecord:
  """A record with its grades."""

  result: results.Result
  answer: str | None  # The answer that the verifier extracted.
  strict: bool
  official: bool
  has_extraction: bool  # True if `official` grades the file's own extraction.
  stored: bool | None


def verdicts(found: Sequence[results.Result]) -> list[verify.Verdict]:
  """Judges all responses together; a missing one counts as empty."""
  responses = [result.response or "" for result in found]
  return verify.verify_all(responses, [result.problem for result in found])


def grade(result: results.Result, verdict: verify.Verdict) -> GradedRecord:
  """Grades one record in each way; a missing response counts as empty."""
  problem, response = result.problem, result.response or ""
  extraction = result.record.get("extraction")
  has_extraction = extraction is not None
  if not has_extraction:
    extraction = official.extraction(response, problem)
  stored = result.record.get("true_false")
  return GradedRecord(
    result=result,
    answer=verdict.answer,
    strict=verdict.correct,
    official=official.is_right(str(extraction), problem),
    has_extraction=has_extraction,
    stored=stored if isinstance(stored, bool) else None,
  )


def summary(graded: Sequence[GradedRecord]) -> dict[str, Any]:
  """The counts and the table of a results file.

  Args:
    graded: Every record of the file; at least one has a public answer.

  Returns:
    A JSON object: `records`; `scored`, the records in the table; `no_answer`,
    the records without a public answer, which are left out of the table;
    `no_response`, scored as wrong; `stored_extractions`, the records whose
    official grade uses an extraction from the file; `agreement` of strict and
    stored labels, None without stored labels; and the `rows` of
    `figures.table`.
  """
  scored = [each for each in graded if each.result.counts]
  return {
    "records": len(graded),
    "scored": len(scored),
    "no_answer": len(graded) - len(scored),
    "no_response": sum(each.result.response is None for each in scored),
    "stored_extractions": sum(each.has_extraction for each in scored),
    "agreement": _agreement(scored),
    "rows": figures.table(
      # A record that is keyed by its pid may lack the field.
      [{**x.result.record, "pid": x.result.problem.pid} for x in scored],
      {
        way: [getattr(each, way) for each in scored]
        for way in ("strict", "official", "stored")
      },
    ),
  }


def _agreement(graded: Sequence[GradedRecord]) -> dict[str, int] | None:
  """Counts the stored labels and those that the verifier contradicts."""
  pairs = collections.Counter(
    (each.strict, each.stored) for each in graded if each.stored is not None
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
        each.answer,
        each.strict if each.result.counts else None,
      ),
    }
    for each in graded
  }
