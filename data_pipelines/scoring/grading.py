"""What each way of scoring says of answered problems, whole and by slice.

Strict is our verifier on the response; official is MathVista's own normaliser,
on the extraction that the file stores or else on the response; stored is the
label that the file has. Multiple choice is also given above chance. Knows
nothing of files or of how a table is shown.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.scoring import results, statistics
from data_pipelines.verifier import mathvista_official as official
from data_pipelines.verifier import verify


@dataclasses.dataclass(frozen=True)
class Graded:
  """A record and what each way of scoring says of it.

  Attributes:
    result: The problem and the response.
    answer: What the verifier read, or None.
    strict: Whether the verifier finds it right.
    official: Whether MathVista's own normaliser does.
    from_stored: Whether that is of an extraction stored in the file, rather
      than of the response.
    stored: The file's own `true_false`, or None.
  """

  result: results.Result
  answer: str | None
  strict: bool
  official: bool
  from_stored: bool
  stored: bool | None


@dataclasses.dataclass(frozen=True)
class AboveChance:
  """Multiple choice without what guessing would have earned.

  Attributes:
    problems: How many have options.
    guess: Share that a guess gets right: the mean of 1 / options.
    share: (right - guess) / (1 - guess): 0 for guessing, 1 for all right.
    low: Where the 95 % interval begins: that of the share right, moved alike.
    high: Where it ends.
  """

  problems: int
  guess: float
  share: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    dimension: "overall", or one of `statistics.DIMENSIONS`.
    name: Which problems of that dimension.
    strict: By the verifier.
    official: By MathVista's own normaliser.
    stored: By the file itself, of the records that say; None if none does.
    multi_choice: The strict share of its multiple-choice problems above
      chance; None without any, and where there is but one option to guess.
  """

  dimension: str
  name: str
  strict: statistics.Share
  official: statistics.Share
  stored: statistics.Share | None
  multi_choice: AboveChance | None


def grade(result: results.Result) -> Graded:
  """Scores one record in each way. An absent response is an empty one."""
  problem, response = result.problem, result.response or ""
  verdict = verify.verify(response, problem)
  extraction = result.record.get("extraction")
  from_stored = extraction is not None
  if not from_stored:
    extraction = official.extraction(response, problem)
  stored = result.record.get("true_false")
  return Graded(
    result=result,
    answer=verdict.answer,
    strict=verdict.correct,
    official=official.is_right(str(extraction), problem),
    from_stored=from_stored,
    stored=stored if isinstance(stored, bool) else None,
  )


def table(graded: Sequence[Graded]) -> list[Row]:
  """The whole, then every slice by dimension and name.

  Args:
    graded: Records that count, at least one. One counts in a single slice of
      each dimension, in none where it does not say, and in one for each skill;
      an unreadable one in the whole alone.
  """
  members: dict[tuple[int, str], list[Graded]] = {}
  for each in graded:
    if each.result.unreadable:
      continue
    for place in dict.fromkeys(statistics.places(each.result.record)):
      members.setdefault(place, []).append(each)
  return [_row("overall", "all", graded)] + [
    _row(statistics.DIMENSIONS[index], name, members[index, name])
    for index, name in sorted(members)
  ]


def _row(dimension: str, name: str, graded: Sequence[Graded]) -> Row:
  stored = [each.stored for each in graded if each.stored is not None]
  chosen = [
    each
    for each in graded
    if each.result.problem.question_type == "multi_choice"
  ]
  return Row(
    dimension=dimension,
    name=name,
    strict=_share([each.strict for each in graded]),
    official=_share([each.official for each in graded]),
    stored=_share(stored) if stored else None,
    multi_choice=_above_chance(chosen) if chosen else None,
  )


def _share(is_right: Sequence[bool]) -> statistics.Share:
  return statistics.share(sum(is_right), len(is_right))


def _above_chance(graded: Sequence[Graded]) -> AboveChance | None:
  counts = [len(each.result.problem.choices) for each in graded]
  guess = float(np.mean(1 / np.array(counts)))
  if guess == 1:
    return None
  share = _share([each.strict for each in graded])
  return AboveChance(
    problems=len(graded),
    guess=guess,
    share=(share.share - guess) / (1 - guess),
    low=(share.low - guess) / (1 - guess),
    high=(share.high - guess) / (1 - guess),
  )


def summary(graded: Sequence[Graded]) -> dict[str, Any]:
  """The counts that a table is read with, and the table.

  Args:
    graded: Every record of a file; at least one counts.

  Returns:
    As JSON: `records`; `scored`, those in the table; `no_answer`, those left
    out of it, whose answer is not public; `no_response`, scored as wrong;
    `stored_extractions`, those whose official figure is of an extraction from
    the file; `agreement` of strict with stored labels, None without any; and
    `rows`.
  """
  counted = [each for each in graded if each.result.counts]
  return {
    "records": len(graded),
    "scored": len(counted),
    "no_answer": len(graded) - len(counted),
    "no_response": sum(each.result.response is None for each in counted),
    "stored_extractions": sum(each.from_stored for each in counted),
    "agreement": _agreement(counted),
    "rows": [dataclasses.asdict(row) for row in table(counted)],
  }


def _agreement(graded: Sequence[Graded]) -> dict[str, int] | None:
  """The file's own labels, and how many the verifier contradicts."""
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


def strict_records(graded: Sequence[Graded]) -> dict[str, dict[str, Any]]:
  """The records by pid, with `strict_answer` and `strict_true_false`.

  `strict_true_false` is null where no answer is public.
  """
  return {
    each.result.problem.pid: {
      **each.result.record,
      "strict_answer": each.answer,
      "strict_true_false": each.strict if each.result.counts else None,
    }
    for each in graded
  }
