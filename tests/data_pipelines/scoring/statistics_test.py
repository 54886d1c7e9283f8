"""Statistics equal hand counts and published formulas."""

import fractions
import itertools
import math

import numpy as np
import pytest

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
  ("n", "right", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)]
)
def test_pass_at_k_of_impossible_counts_is_refused(n, right, k):
  with pytest.raises(ValueError, match="pass@k needs"):
    pass_at_k(n, right, k)


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


@pytest.mark.parametrize("k", [0, 3])
def test_maj_at_k_of_an_impossible_k_is_refused(k):
  with pytest.raises(ValueError, match="maj@k needs"):
    maj_at_k(["a", "b"], [True, False], k)


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
