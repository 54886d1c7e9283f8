"""Statistics of graded answers: shares with intervals, pass@k, maj@k, tests.

This module knows no models, no files and no way of grading.

References:
  pass@k: Chen et al. 2021, https://arxiv.org/abs/2107.03374, section 2.1.
  maj@k: Wang et al. 2022, https://arxiv.org/abs/2203.11171.
  Intervals: Wilson 1927; Newcombe 1998, https://doi.org/10.1002/sim.2779.
  Pairs: McNemar 1947; Bonett and Price 2012,
    https://doi.org/10.3102/1076998611411915, which Fagerland et al. 2014
    recommend, https://doi.org/10.1002/sim.6148.
  Several runs: Clark 1973, https://doi.org/10.1016/S0022-5371(73)80014-3;
    Banerjee 1960, Sankhya 22, 357-358.
  Several tests: Holm 1979, https://www.jstor.org/stable/4615733.
"""

import collections
import decimal
from collections.abc import Sequence
from typing import Any

import numpy as np

# The p-value below which a difference is shown, and the chance to show a gain.
LEVEL, _POWER = 0.05, 0.8
_LEAST_P_VALUE = 1e-12


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
  """The chance that k samples, drawn without replacement, hold a right one."""
  num_wrong = num_samples - num_right
  if num_wrong < k:
    return 1.0
  # The binomial coefficients of the definition overflow a float.
  return 1.0 - float(
    np.prod(1.0 - k / np.arange(num_wrong + 1, num_samples + 1))
  )


def vote(answer: str | None, *, answer_type: str, precision: int) -> str | None:
  """The form of an answer that equal answers share; None casts no vote.

  The verifier accepts a float that rounds to the right one, so floats that
  round to the same number are equal. A half rounds up, although the verifier
  may accept either neighbour.
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
  """The share of right majority votes over disjoint runs of k samples.

  Samples are in the order of sampling, and a shorter rest is left out.
  """
  wins = []
  for start in range(0, len(votes) - k + 1, k):
    winner = majority(votes[start : start + k])
    wins.append(winner is not None and is_right[start + winner])
  return float(np.mean(wins))


def share(right: float, problems: int) -> dict[str, Any]:
  """The share of right answers with `low` and `high`, its 95 % Wilson interval.

  A sum of chances is rounded to a count for the interval, which is then the
  widest possible one.
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

  `difference` is the first share of right answers minus the second; `p_value`
  is of the exact two-sided sign test on `only_first` and `only_second`, the
  numbers of problems right in one alone.
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


def spread(shares: Sequence[float]) -> dict[str, float | None]:
  """The mean `share` of several runs, and how far they lie apart.

  `deviation` is their standard deviation, `low` and `high` are the ends of the
  95 % interval of the mean, from Student's t; None for a single run.
  """
  import scipy.special

  mean, count = float(np.mean(shares)), len(shares)
  if count == 1:
    return {"share": mean, "deviation": None, "low": None, "high": None}
  deviation = float(np.std(shares, ddof=1))
  quantile = scipy.special.stdtrit(count - 1, 1 - LEVEL / 2)
  half = float(quantile * deviation / np.sqrt(count))
  low, high = max(mean - half, 0.0), min(mean + half, 1.0)
  return {"share": mean, "deviation": deviation, "low": low, "high": high}


def paired_comparison(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
  """Compares the runs of two sides on the same problems.

  A single run on each side is tested by `comparison`, which speaks of these two
  runs alone. The interval is that of Bonett and Price, which counts one problem
  more in each direction of change. It holds 0 where the test shows nothing.

  With several runs, a lucky run changes many problems at once. So runs and
  problems both count as drawn, as Clark asks for: the variance of the
  difference has a part from the problems and a part from the runs of each side.
  Banerjee's interval adds the squared half-widths of the parts, which keeps the
  level whatever the parts are. A side with one run takes the spread of the
  other side. Runs of two sides are no pairs, even with equal seeds.

  Args:
    before: bool [runs, problems], True for a right answer.
    after: bool [runs, problems], with the same problems.

  Returns:
    `difference`, the mean share of right answers after minus before; `low` and
    `high`, its 95 % interval; the two-sided `p_value`; and `smallest_gain`, the
    gain that such a comparison shows four times in five.
  """
  import scipy.optimize
  import scipy.special

  changes = np.append(after.mean(0) - before.mean(0), [1.0, -1.0])
  parts = [(changes.var() / changes.size, changes.size - 1)]
  for side, other in ((before, after), (after, before)):
    shares = (side if len(side) > 1 else other).mean(1)
    if shares.size > 1:
      parts.append((shares.var(ddof=1) / len(side), shares.size - 1))
  center, (variances, freedom) = float(changes.mean()), np.array(parts).T

  def half_width(level: float, power: float = 0.5) -> float:
    # Upper quantiles of Student's t.
    quantiles = scipy.special.stdtrit(freedom, [[level / 2], [1 - power]])
    return float(np.sqrt(variances @ quantiles.sum(0) ** 2))

  low, high = (center + sign * half_width(LEVEL) for sign in (-1, 1))
  if len(before) == len(after) == 1:
    p_value = comparison(after[0], before[0])["p_value"]
    if p_value >= LEVEL:
      low, high = min(low, 0.0), max(high, 0.0)
  elif half_width(_LEAST_P_VALUE) < abs(center):
    p_value = _LEAST_P_VALUE
  else:
    p_value = scipy.optimize.brentq(
      lambda level: half_width(level) - abs(center), _LEAST_P_VALUE, 1
    )
  return {
    "difference": float(after.mean() - before.mean()),
    "low": max(low, -1.0),
    "high": min(high, 1.0),
    "p_value": p_value,
    "smallest_gain": half_width(LEVEL, _POWER),
  }


def holm(p_values: Sequence[float]) -> list[float]:
  """Corrects p-values for their number, after Holm."""
  order = np.argsort(p_values, kind="stable")
  scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
  corrected = np.empty(len(order))
  corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
  return corrected.tolist()
