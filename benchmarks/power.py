"""Prints the tables of docs/is-it-better.md: which gains a comparison shows.

python benchmarks/power.py [PROBLEMS]
"""

import sys

import numpy as np
import scipy.special
import scipy.stats

LEVEL, POWER = 0.05, 0.8


def power(problems: int, changed: float, gain: float) -> float:
  """The chance that the exact test shows a gain of one run over another.

  Args:
    problems: Number of problems.
    changed: The share of problems that are right in one of the runs alone.
    gain: The true difference of the shares of right answers.
  """
  numbers = np.arange(problems + 1)
  # The test shows a gain if more than `limits` of the changes are for the good.
  limits = scipy.stats.binom.isf(LEVEL / 2, numbers, 0.5)
  good = (1 + gain / changed) / 2
  chances = scipy.stats.binom.sf(limits, numbers, good)
  return float(scipy.stats.binom.pmf(numbers, problems, changed) @ chances)


def smallest_gain(
  problems: int, changed: float, runs: int, deviation: float
) -> float:
  """The gain that `runs` runs on each side show four times in five.

  Args:
    problems: Number of problems.
    changed: The variance of a problem's change of its mean over the runs.
    runs: Number of runs on each side.
    deviation: Standard deviation of the shares of the runs of one side.
  """
  variances = np.array([changed / problems, *[deviation**2 / runs] * 2])
  freedom = np.array([problems, runs - 1, runs - 1])
  quantiles = scipy.special.stdtrit(freedom, [[1 - LEVEL / 2], [POWER]])
  return float(np.sqrt(variances @ quantiles.sum(0) ** 2))


def main(problems: int) -> None:
  """Prints both tables in Markdown."""
  gains, shares = (0.01, 0.02, 0.03, 0.05), (0.05, 0.1, 0.2)
  print("| problems that change |", *(f"{x:.0%} |" for x in gains))
  print("|---|" + "--:|" * len(gains))
  for share in shares:
    cells = (f"{power(problems, share, x):.0%} |" for x in gains)
    print(f"| {share:.0%} |", *cells)
  counts, deviations = (2, 3, 5, 10), (0.005, 0.01, 0.02)
  print("\n| standard deviation of the runs |", *(f"{x} |" for x in counts))
  print("|---|" + "--:|" * len(counts))
  for deviation in deviations:
    found = [100 * smallest_gain(problems, 0.05, x, deviation) for x in counts]
    print(f"| {100 * deviation:g} |", *(f"{x:.1f} |" for x in found))


if __name__ == "__main__":
  main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
