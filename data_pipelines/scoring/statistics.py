"""What a set of graded answers says of who gave them, and how surely.

Counts and shares of right answers with intervals, by sort of problem; and
what several answers to each problem are worth. Knows nothing of models, files
or of how an answer is graded.

References:
  pass@k: Chen et al. 2021, https://arxiv.org/abs/2107.03374, section 2.1.
  maj@k: Wang et al. 2022, https://arxiv.org/abs/2203.11171.
  Intervals: Wilson 1927; Newcombe 1998, https://doi.org/10.1002/sim.2779.
"""

import collections
import dataclasses
import decimal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

DIMENSIONS = (
  *("question_type", "answer_type", "task", "category", "context", "grade"),
  *("source", "skill"),
)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
  """The chance that k of the samples, drawn without return, hold a right one.

  The unbiased estimate of "at least one of k is right", as a product, since
  the binomial coefficients of its definition outgrow a float.

  Args:
    num_samples: Answers given to one problem.
    num_right: Those of them that are right.
    k: From 1 to `num_samples`.

  Raises:
    ValueError: k or the counts are out of range.
  """
  if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
    raise ValueError(
      f"pass@k needs 1 <= k ({k}) <= samples ({num_samples}) and "
      f"0 <= right ({num_right}) <= samples; draw more, or ask a smaller k."
    )
  num_wrong = num_samples - num_right
  if num_wrong < k:
    return 1.0
  return 1.0 - float(
    np.prod(1.0 - k / np.arange(num_wrong + 1, num_samples + 1))
  )


def vote(answer: str | None, *, answer_type: str, precision: int) -> str | None:
  """What two answers share that count as the same answer; None casts no vote.

  The verifier has spelt the answer in one way already. It also takes a float
  for right that rounds to the right one, so floats that round alike are one
  answer. Which of two neighbours a half goes to, the vote cannot know.

  Args:
    answer: As the verifier read it; None where it read none.
    answer_type: Of the problem.
    precision: Its decimal places, or -1.
  """
  if answer is None or answer_type != "float" or precision < 0:
    return None if answer is None else answer.strip()
  unit = decimal.Decimal(1).scaleb(-precision)
  try:
    rounded = decimal.Decimal(answer).quantize(
      unit, decimal.ROUND_HALF_UP, decimal.Context(prec=200)
    )
  except decimal.InvalidOperation:
    return answer.strip()
  # There is one zero.
  return str(abs(rounded) if not rounded else rounded)


def majority(votes: Sequence[str | None]) -> int | None:
  """The place of the first vote for what most voted for; None without votes.

  Of equals, that wins which was voted for first. Samples come in no order of
  merit, so that is a draw by lot whose lot is drawn already.
  """
  counts = collections.Counter(x for x in votes if x is not None)
  # max() takes the first of equals, and a Counter keeps the order of arrival.
  return votes.index(max(counts, key=lambda x: counts[x])) if counts else None


def maj_at_k(
  votes: Sequence[str | None], is_right: Sequence[bool], k: int
) -> float:
  """The share of majorities of k samples that are right.

  The mean over as many runs of k neighbours as there are, the first with the
  first; a rest shorter than k is left out.

  Args:
    votes: From `vote`, in the order of sampling.
    is_right: Whether each is right.
    k: From 1 to the number of votes.

  Raises:
    ValueError: k is out of range.
  """
  if not 1 <= k <= len(votes):
    raise ValueError(
      f"maj@k needs 1 <= k ({k}) <= samples ({len(votes)}); draw more, or ask "
      "a smaller k."
    )
  wins = []
  for start in range(0, len(votes) - k + 1, k):
    winner = majority(votes[start : start + k])
    wins.append(winner is not None and is_right[start + winner])
  return float(np.mean(wins))


@dataclasses.dataclass(frozen=True)
class Share:
  """Of how many problems how many are right, and where the truth may lie.

  Attributes:
    problems: How many there are, at least 1.
    right: How many are right; not a whole number for a sum of chances.
    share: Their quotient.
    low: Where the 95 % Wilson interval begins.
    high: Where it ends.
  """

  problems: int
  right: float
  share: float
  low: float
  high: float


def share(right: float, problems: int) -> Share:
  """The share with its interval.

  Args:
    right: From 0 to `problems`. A sum of numbers between 0 and 1, such as
      chances, is rounded to a count for the interval: that of yes and no is
      the widest that any numbers between them can have.
    problems: At least 1.
  """
  import scipy.stats  # A second to import, for what only a report needs.

  count = min(problems, max(0, round(right)))
  interval = scipy.stats.binomtest(count, problems).proportion_ci(
    method="wilson"
  )
  value = right / problems
  return Share(
    problems=problems,
    right=right,
    share=value,
    low=min(float(interval.low), value),
    high=max(float(interval.high), value),
  )


@dataclasses.dataclass(frozen=True)
class Slice:
  """The problems that are alike in one respect.

  Attributes:
    dimension: One of `DIMENSIONS`.
    name: Such as "multi_choice".
    result: How they were answered.
  """

  dimension: str
  name: str
  result: Share


def slices(graded: Iterable[tuple[Mapping[str, Any], bool]]) -> list[Slice]:
  """Every slice that has problems: by dimension, then by name.

  Args:
    graded: Records in MathVista's results format, each with whether it is
      right. A problem counts in one slice of each dimension, in none where its
      record does not say, and in one for each of its skills.
  """
  counts: dict[tuple[int, str], list[int]] = {}
  for record, is_right in graded:
    for key in dict.fromkeys(places(record)):
      count = counts.setdefault(key, [0, 0])
      count[0] += is_right
      count[1] += 1
  return [
    Slice(DIMENSIONS[dimension], name, share(*counts[dimension, name]))
    for dimension, name in sorted(counts)
  ]


def places(record: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
  """Where a problem belongs: the index of a dimension, and a name in it."""
  metadata = record.get("metadata") or {}
  for index, dimension in enumerate(DIMENSIONS):
    if dimension == "skill":
      names = metadata.get("skills") or ()
      names = (names,) if isinstance(names, str) else names
    elif dimension.endswith("_type"):
      names = (record.get(dimension),)
    else:
      names = (metadata.get(dimension),)
    yield from ((index, str(name)) for name in names if name)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The same problems answered twice.

  Attributes:
    difference: Share of right answers, the first time less the second.
    only_first: Problems right the first time alone.
    only_second: Problems right the second time alone.
    p_value: How often chance alone would part the two at least so far, were
      each of those problems as likely to fall to either side (exact sign
      test, two-sided).
  """

  difference: float
  only_first: int
  only_second: int
  p_value: float


def comparison(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
  """What changed between two sets of answers to the same problems."""
  import scipy.stats

  a, b = np.asarray(first, bool), np.asarray(second, bool)
  only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
  changed = only_first + only_second
  return Comparison(
    difference=float(a.mean() - b.mean()),
    only_first=only_first,
    only_second=only_second,
    p_value=float(scipy.stats.binomtest(only_first, changed).pvalue)
    if changed
    else 1.0,
  )
