"""Statistics of graded answers: shares with intervals, pass@k, maj@k, tests.

This module knows no models, no files and no way of grading.

References:
  pass@k: Chen et al. 2021, https://arxiv.org/abs/2107.03374, section 2.1.
  maj@k: Wang et al. 2022, https://arxiv.org/abs/2203.11171.
  Intervals: Wilson 1927; Newcombe 1998, https://doi.org/10.1002/sim.2779.
"""

import collections
import decimal
from collections.abc import Sequence
from typing import Any

import numpy as np


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
  """The unbiased estimate of "at least one of k samples is right".

  That is the chance that k samples, drawn without replacement, hold a right
  one. It is a product here, because the binomial coefficients of its
  definition overflow a float.

  Args:
    num_samples: Number of answers to one problem.
    num_right: Number of right answers.
    k: From 1 to `num_samples`.

  Raises:
    ValueError: k or the counts are out of range.
  """
  if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
    raise ValueError(
      f"pass@k needs 1 <= k ({k}) <= samples ({num_samples}) and "
      f"0 <= right ({num_right}) <= samples; draw more samples or use a "
      "smaller k."
    )
  num_wrong = num_samples - num_right
  if num_wrong < k:
    return 1.0
  return 1.0 - float(
    np.prod(1.0 - k / np.arange(num_wrong + 1, num_samples + 1))
  )


def vote(answer: str | None, *, answer_type: str, precision: int) -> str | None:
  """The form of an answer that equal answers share; None casts no vote.

  The verifier has already normalised the notation. It accepts a float that
  rounds to the right one, so floats that round to the same number are equal. A
  half rounds up, although the verifier may accept either neighbour.

  Args:
    answer: The answer that the verifier extracted, or None.
    answer_type: The problem's answer type.
    precision: The problem's decimal places, or -1.
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
  # -0.0 and 0.0 are equal.
  return str(abs(rounded) if not rounded else rounded)


def majority(votes: Sequence[str | None]) -> int | None:
  """The index of the first vote for the winner; None without votes.

  In a tie the earliest vote wins, which is a fair lot because the order of the
  samples is random.
  """
  counts = collections.Counter(x for x in votes if x is not None)
  # max() takes the first maximum, and a Counter keeps the insertion order.
  return votes.index(max(counts, key=lambda x: counts[x])) if counts else None


def maj_at_k(
  votes: Sequence[str | None], is_right: Sequence[bool], k: int
) -> float:
  """The share of right majority votes of k samples.

  The mean over consecutive, disjoint runs of k samples; a shorter rest is left
  out.

  Args:
    votes: From `vote`, in the order of sampling.
    is_right: True for each right sample.
    k: From 1 to the number of votes.

  Raises:
    ValueError: k is out of range.
  """
  if not 1 <= k <= len(votes):
    raise ValueError(
      f"maj@k needs 1 <= k ({k}) <= samples ({len(votes)}); draw more samples "
      "or use a smaller k."
    )
  wins = []
  for start in range(0, len(votes) - k + 1, k):
    winner = majority(votes[start : start + k])
    wins.append(winner is not None and is_right[start + winner])
  return float(np.mean(wins))


def share(right: float, problems: int) -> dict[str, Any]:
  """The share of right answers with its interval.

  Args:
    right: From 0 to `problems`. A sum of chances is rounded to a count for the
      interval, which is then the widest possible one.
    problems: At least 1.

  Returns:
    `problems`, `right`, `share`, and the ends `low` and `high` of the 95 %
    Wilson interval.
  """
  import scipy.stats  # Slow to import, and only reports need it.

  count = min(problems, max(0, round(right)))
  test = scipy.stats.binomtest(count, problems)
  interval = test.proportion_ci(method="wilson")
  value = right / problems
  return {
    "problems": problems,
    "right": right,
    "share": value,
    "low": min(float(interval.low), value),
    "high": max(float(interval.high), value),
  }


def comparison(
  first: Sequence[bool], second: Sequence[bool]
) -> dict[str, int | float]:
  """Compares two sets of answers to the same problems.

  Returns:
    `difference`, the first share of right answers minus the second; the numbers
    of problems right in `only_first` or `only_second`; and the `p_value` of the
    exact two-sided sign test on these.
  """
  import scipy.stats

  a, b = np.asarray(first, bool), np.asarray(second, bool)
  only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
  changed = only_first + only_second
  p_value = 1.0
  if changed:
    p_value = float(scipy.stats.binomtest(only_first, changed).pvalue)
  return {
    "difference": float(a.mean() - b.mean()),
    "only_first": only_first,
    "only_second": only_second,
    "p_value": p_value,
  }
