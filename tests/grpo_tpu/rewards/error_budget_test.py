"""When failures are too many: on all rows, or on too many of the last ones."""

import itertools
import random
import time

import pytest

from grpo_tpu.rewards.error_budget import ErrorBudget


@pytest.mark.parametrize("window", [1, 10, 1000])
@pytest.mark.parametrize("rows", [1, 2, 32])
def test_failing_on_every_row_of_the_first_batch_is_always_too_much(
  window, rows
):
  reason = ErrorBudget(1.0, window).count([True] * rows)
  assert reason == f"every one of the last {rows} completions"


def test_a_later_short_batch_may_fail():
  """As the last batch of an evaluation; but not time and again."""
  budget = ErrorBudget(1.0, 1000)
  assert not budget.count([False] * 64)
  assert [bool(budget.count([True] * 2)) for _ in range(4)] == [0, 0, 0, 1]
  budget = ErrorBudget(1.0, 1000)
  assert not budget.count([False] * 64)
  assert budget.count([True] * 8)


def test_a_success_ends_a_streak():
  budget = ErrorBudget(1.0, 1000)
  for _ in range(9):
    assert not budget.count([True] * 7 + [False])
    assert not budget.count([True] * 7)
  assert not budget.count([])


def test_a_small_trial_is_judged_by_its_own_rows():
  """0.1 of 32 rows is 3.2, however large the window."""
  assert not ErrorBudget(0.1, 1000).count([True] * 3 + [False] * 29)
  reason = ErrorBudget(0.1, 1000).count([True] * 4 + [False] * 28)
  assert reason.startswith("4 of the last 4 completions, and rewards.max_err")
  assert reason.endswith("(0.1) allows 3.2 of 32")


def test_a_few_first_rows_are_not_judged_by_themselves():
  assert not ErrorBudget(0.1, 1000).count([True, False, False, False])
  assert ErrorBudget(0.0, 1000).count([True, False])


@pytest.mark.parametrize("window", [1, 5, 40])
def test_the_count_is_that_of_the_window(window):
  """A plain twin sums the window for every row."""
  rng = random.Random(window)
  for _ in range(50):
    budget, seen = ErrorBudget(0.3, window), list[bool]()
    for _ in range(20):
      batch = [rng.random() < 0.2 for _ in range(8)] + [False]
      seen += batch
      size = min(window, max(32, len(seen)))
      expected = any(
        seen[end - 1] and sum(seen[max(0, end - window) : end]) > 0.3 * size
        for end in range(len(seen) - len(batch) + 1, len(seen) + 1)
      )
      assert bool(budget.count(batch)) == expected
      if expected:
        break


def test_a_failure_costs_the_same_in_any_window():
  """CPU time; a second where the window was summed for each failure."""
  budget = ErrorBudget(1.0, 100_000)
  rows = list(itertools.islice(itertools.cycle([True, False]), 100_000))
  budget.count(rows)
  start = time.process_time()
  budget.count(rows[:2_000])
  assert time.process_time() - start < 0.1
