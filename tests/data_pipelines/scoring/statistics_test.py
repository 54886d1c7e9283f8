"""Statistics equal hand counts and published formulas."""

import fractions
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from data_pipelines.scoring import statistics
from data_pipelines.scoring.statistics import (
  maj_at_k,
  majority,
  pass_at_k,
  vote,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
  for n, right in itertools.product(range(1, 7), range(7)):
    for k in range(1, n + 1):
      if right <= n:
        subsets = list(itertools.combinations([i < right for i in range(n)], k))
        wanted = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(n, right, k) == pytest.approx(wanted, abs=1e-12)


def test_pass_at_k_holds_where_binomials_outgrow_a_float():
  n, right, k = 10_000, 3, 5_000
  exact = 1 - fractions.Fraction(math.comb(n - right, k), math.comb(n, k))
  assert pass_at_k(n, right, k) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(
  ("votes", "winner"),
  [
    (["a", "b", "b"], 1),
    (["a", "b", "b", "a"], 0),  # A tie: the first vote wins.
    (["b", "a", "a", "b"], 0),
    ([None, None, None, "a"], 3),  # None does not vote, however frequent.
    ([None, "b", None, "a", "a"], 3),
    ([None, None], None),
    ([], None),
  ],
)
def test_the_majority_is_the_first_vote_for_the_most_frequent(votes, winner):
  assert majority(votes) == winner


def test_maj_at_k_is_the_mean_over_runs_of_k():
  votes = ["a", "b", "b", "a", "a", None, "b"]
  right = [x == "a" for x in votes]
  assert maj_at_k(votes, right, 1) == pytest.approx(3 / 7)
  # a b | b a | a None, and a rest: the first vote wins a tie.
  assert maj_at_k(votes, right, 2) == pytest.approx(2 / 3)
  # a b b | a a None.
  assert maj_at_k(votes, right, 3) == 0.5
  assert maj_at_k(votes, right, 7) == 1.0
  assert maj_at_k([None, None], [False, False], 2) == 0.0


@pytest.mark.parametrize(
  ("answer", "answer_type", "precision", "wanted"),
  [
    ("1.234", "float", 2, "1.23"),
    ("1.2", "float", 2, "1.20"),
    ("1.235", "float", 2, "1.24"),
    ("-1.235", "float", 2, "-1.24"),
    ("-0.001", "float", 2, "0.00"),
    ("9" * 60, "float", 2, "9" * 60 + ".00"),
    ("1.234", "float", -1, "1.234"),
    ("1.234", "integer", -1, "1.234"),
    (" red ", "text", -1, "red"),
    ("[1,2.5]", "list", -1, "[1,2.5]"),
    (None, "float", 1, None),
    (None, "text", -1, None),
  ],
)
def test_floats_that_round_alike_are_equal_votes(
  answer, answer_type, precision, wanted
):
  got = vote(answer, answer_type=answer_type, precision=precision)
  assert got == wanted


def test_an_interval_is_wilsons():
  # 45 of 100: (k + z^2/2 +- z sqrt(k (n-k) / n + z^2/4)) / (n + z^2).
  z = 1.959964
  half = z * math.sqrt(45 * 55 / 100 + z**2 / 4)
  low, high = ((45 + z**2 / 2 + s * half) / (100 + z**2) for s in (-1, 1))
  got = statistics.share(45, 100)
  assert (got["low"], got["high"]) == pytest.approx((low, high), abs=1e-6)
  assert (got["problems"], got["right"], got["share"]) == (100, 45, 0.45)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (0.4, 9), (8.6, 9)])
def test_an_interval_is_never_a_point_and_holds_the_share(right, n):
  got = statistics.share(right, n)
  assert 0 <= got["low"] <= got["share"] == right / n <= got["high"] <= 1
  assert got["high"] - got["low"] > 0.2


def test_an_interval_of_a_sum_of_chances_is_that_of_the_nearest_count():
  for right, count in ((3.6, 4), (4.4, 4)):
    got, wanted = statistics.share(right, 10), statistics.share(count, 10)
    assert (got["low"], got["high"]) == (wanted["low"], wanted["high"])


def test_a_comparison_is_a_sign_test_of_the_changes():
  first = np.array([1, 1, 1, 1, 1, 0, 0, 1], bool)
  second = np.array([0, 0, 0, 0, 1, 1, 0, 0], bool)
  got = statistics.comparison(list(first), list(second))
  assert (got["only_first"], got["only_second"]) == (5, 1)
  assert got["difference"] == pytest.approx(4 / 8)
  # 0, 1, 5 or 6 heads of 6 coins: (1 + 6 + 6 + 1) / 64.
  assert got["p_value"] == pytest.approx(14 / 64)
  same = statistics.comparison(list(first), list(first))
  assert (same["difference"], same["p_value"]) == (0.0, 1.0)


# Pairs.


def sides(only_before, only_after, problems):
  """One run on each side, with as many problems right on one side alone."""
  before, after = np.zeros((2, 1, problems), bool)
  before[0, :only_before] = True
  after[0, only_before : only_before + only_after] = True
  return before, after


def exact_p_value(a, b):
  """Twice the smaller tail of a + b fair coins, in whole numbers."""
  tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1))
  return float(
    min(fractions.Fraction(1), fractions.Fraction(2 * tail, 2 ** (a + b)))
  )


def test_a_p_value_is_that_of_the_exact_test():
  for a, b in [*itertools.product(range(9), range(9)), (15, 35), (490, 400)]:
    got = statistics.paired_comparison(*sides(a, b, 1000))
    assert got["p_value"] == pytest.approx(exact_p_value(a, b), rel=1e-9)
    assert got["difference"] == pytest.approx((b - a) / 1000)
  # Of 50 changes: 2 * P(at most 15 heads).
  assert exact_p_value(15, 35) == pytest.approx(0.0066004, abs=1e-7)


def test_a_difference_between_equals_is_shown_once_in_twenty_at_most():
  key = np.random.default_rng(0)
  shown = 0
  for _ in range(1000):
    before, after = key.random((2, 1, 1000)) < key.random(1000)
    shown += statistics.paired_comparison(before, after)["p_value"] < 0.05
  assert shown <= 50


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_an_interval_of_a_difference_covers_it(share):
  """Summed over all outcomes of 30 problems, not drawn."""
  n, shares, covered = 30, (0, 0.4, 0.8), np.zeros(3)
  for a in range(n + 1):
    for b in range(n + 1 - a):
      got = statistics.paired_comparison(*sides(a, b, n))
      for i, part in enumerate(shares):
        up, down = share * (1 + part) / 2, share * (1 - part) / 2
        chance = math.comb(n, a) * math.comb(n - a, b) * up**b * down**a
        chance *= (1 - share) ** (n - a - b)
        covered[i] += chance * (got["low"] <= share * part <= got["high"])
  assert covered.min() >= 0.94


def test_an_interval_holds_the_difference_and_agrees_with_the_test():
  for a, b, n in (
    (0, 1, 1),
    (0, 5, 1000),
    (1, 7, 8),
    (15, 35, 1000),
    (9, 9, 20),
  ):
    got = statistics.paired_comparison(*sides(a, b, n))
    assert -1 <= got["low"] <= got["difference"] <= got["high"] <= 1
    if got["p_value"] > 0.05:
      assert got["low"] <= 0 <= got["high"]
    back = statistics.paired_comparison(*sides(a, b, n)[::-1])
    assert back["p_value"] == got["p_value"]
    assert (back["low"], back["high"]) == (-got["high"], -got["low"])


def draws(key, runs, problems, *, luck, gain=0.0):
  """Runs on problems of any difficulty; luck moves all problems of a run."""
  skill = key.normal(gain, luck, (runs, 1)) + key.normal(0, 2, problems)
  return key.random((runs, problems)) < 1 / (1 + np.exp(-skill))


def rate(number, runs, *, luck, gain=0.0):
  """The share of comparisons that show a difference."""
  key, shown = np.random.default_rng(1), 0
  for _ in range(number):
    seed = int(key.integers(2**32))
    before, after = (
      draws(np.random.default_rng(seed), sum(runs), 400, luck=luck),
      draws(np.random.default_rng(seed), sum(runs), 400, luck=luck, gain=gain),
    )
    got = statistics.paired_comparison(before[: runs[0]], after[runs[0] :])
    shown += got["p_value"] < 0.05
  return shown / number


@pytest.mark.parametrize("runs", [(1, 3), (3, 3), (5, 5)])
def test_lucky_runs_of_one_kind_are_seldom_called_better(runs):
  """With luck, problems of a run are right or wrong together."""
  assert rate(500, runs, luck=0.4) <= 0.05


@pytest.mark.nightly
@pytest.mark.parametrize("luck", [0.0, 0.05, 0.2, 0.4, 1.0])
@pytest.mark.parametrize(
  "runs", [(1, 2), (1, 3), (2, 2), (3, 3), (2, 5), (5, 5)]
)
def test_lucky_runs_of_any_number_are_seldom_called_better(runs, luck):
  # Four standard deviations of a share of 4,000.
  assert rate(4000, runs, luck=luck) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_runs_with_a_clear_gain_are_called_better():
  assert rate(100, (3, 3), luck=0.05, gain=1.0) > 0.9
  # A test over problems alone would call most of these better too.
  assert rate(100, (3, 3), luck=0.8, gain=1.0) < 0.3


def test_the_interval_of_several_runs_is_banerjees():
  key = np.random.default_rng(2)
  before, after = draws(key, 2, 50, luck=0.1), draws(key, 4, 50, luck=0.1)
  got = statistics.paired_comparison(before, after)
  changes = [*(after.mean(0) - before.mean(0)), 1, -1]
  parts = [(np.var(changes) / 52, 51)]
  parts += [
    (np.var(x.mean(1), ddof=1) / len(x), len(x) - 1) for x in (before, after)
  ]
  for level, wanted in (
    (0.05, got["high"] - got["low"]),
    (got["p_value"], None),
  ):
    squares = [v * scipy.stats.t.isf(level / 2, df) ** 2 for v, df in parts]
    half = math.sqrt(sum(squares))
    # The p-value is the level at which the interval ends at 0.
    wanted = abs(np.mean(changes)) if wanted is None else wanted / 2
    assert half == pytest.approx(wanted, rel=1e-6)


def test_one_run_has_the_spread_of_the_other_side():
  one, other = np.zeros((1, 10), bool), np.eye(4, 10, dtype=bool)
  other[0, 5:] = True
  got = statistics.paired_comparison(one, other)
  changes, spread = [*other.mean(0), 1, -1], np.var(other.mean(1), ddof=1)
  squares = np.var(changes) / 12 * scipy.stats.t.isf(0.025, 11) ** 2
  squares += spread * (1 + 1 / 4) * scipy.stats.t.isf(0.025, 3) ** 2
  assert got["low"] == pytest.approx(np.mean(changes) - math.sqrt(squares))


def test_a_gain_of_the_smallest_size_is_shown_four_times_in_five():
  # 10 % of 1,000 problems change.
  gain = statistics.paired_comparison(*sides(50, 50, 1000))["smallest_gain"]
  key, shown = np.random.default_rng(3), 0
  for _ in range(500):
    up, down, _ = key.multinomial(1000, (0.05 + gain / 2, 0.05 - gain / 2, 0.9))
    shown += exact_p_value(int(up), int(down)) < 0.05
  assert shown / 500 == pytest.approx(0.8, abs=0.05)


def test_spread_by_hand():
  got = statistics.spread([0.4, 0.5, 0.6])
  assert got["share"] == pytest.approx(0.5)
  assert got["deviation"] == pytest.approx(0.1)
  # 4.302653 is the 97.5 % quantile of t with 2 degrees of freedom.
  assert got["high"] == pytest.approx(0.5 + 4.302653 * 0.1 / math.sqrt(3))
  assert statistics.spread([0.4])["deviation"] is None


def test_holm_by_hand():
  # 4 * 0.005, 3 * 0.01, 2 * 0.03, and never less than one before.
  assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
    [0.03, 0.06, 0.06, 0.02]
  )
  assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
  assert statistics.holm([]) == []
