"""Several data sets are asked by their weights, and are one for the rest."""

import fractions
import os

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.sources import mixtures
from tests.data_pipelines.sources import taken


def problem(pid, **changes):
  fields = dict(
    pid=pid,
    question=f"Which one is {pid}?",
    answer="1",
    question_type="free_form",
    answer_type="integer",
  )
  return records.Problem(**fields | changes)


def problems(name, count):
  return [problem(f"{name}{index}") for index in range(count)]


RNG = np.random.default_rng(0)
SHARES = [
  *[(7, 3), (1, 1), (1, 1, 1), (1, 2, 3, 4), (1, 99), (97, 1, 1, 1)],
  *[tuple(RNG.integers(1, 12, size).tolist()) for size in (3, 4, 5, 8, 12)],
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_no_prefix_is_off_by_one_prompt(shares):
  """Exactly: |asked - n * share / total| < 1 for every set and every n."""
  order, total = mixtures.Order(shares), sum(shares)
  asked = [0] * len(shares)
  for position in range(2 * total + 3):
    number, earlier = order[position]
    assert earlier == asked[number]
    asked[number] += 1
    for count, share in zip(asked, shares, strict=True):
      exact = fractions.Fraction(share * (position + 1), total)
      assert abs(count - exact) < 1


def test_a_position_far_ahead_is_known_without_those_before_it():
  """10**12 whole periods of 7 + 3 come first, then p, t, p, p, t, ..."""
  order = mixtures.Order((7, 3))
  start = [order[i] for i in range(10)]
  assert [order[10**13 + i] for i in range(10)] == [
    (number, earlier + 10**12 * (7, 3)[number]) for number, earlier in start
  ]


@pytest.mark.parametrize(
  ("weights", "shares"),
  [
    ((0.7, 0.3), (7, 3)),
    ((7473.0, 12000.0), (2491, 4000)),
    ((1 / 3, 2 / 3), (1, 2)),
    ((0.333, 0.333, 0.334), (333, 333, 334)),
    ((5.0,), (1,)),
    ((1e300, 1e300), (1, 1)),
    # No ratio of small numbers: rounded, and never to nothing.
    ((1e-30, 1.0), (1, 100_000)),
  ],
)
def test_shares_are_the_smallest_whole_numbers(weights, shares):
  assert mixtures.whole_shares(weights) == shares


def test_names_are_words_that_no_other_metric_has(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders = ["/data/geo", "/old/geo/", "/a/text", "../x y=z", "/", os.curdir]
  assert mixtures.names(folders) == [
    *("geo", "geo-2", "text-2", "x_y_z", "data", tmp_path.name)
  ]


def test_a_mixture_is_its_sets_one_after_another():
  """Equal pids stay apart, and each problem names its set."""
  both = mixtures.Mixture({"a": problems("p", 2), "b": problems("p", 3)})
  assert [x.pid for x in both] == ["a/p0", "a/p1", "b/p0", "b/p1", "b/p2"]
  assert [x.metadata["data_set"] for x in both] == [*"aabbb"]
  assert both.sets == {"a": range(2), "b": range(2, 5)}
  with pytest.raises(IndexError):
    both[-1]


@pytest.mark.parametrize(
  ("count", "taken"),
  [(3, (1, 1, 1)), (9, (3, 2, 4)), (7, (2, 2, 3)), (99, (3, 2, 9))],
)
def test_a_part_of_a_mixture_takes_equally_from_its_sets(count, taken):
  """What a small set does not have goes to the others."""
  sizes = dict(zip("abc", (3, 2, 9), strict=True))
  whole = mixtures.Mixture({x: problems(x, n) for x, n in sizes.items()})
  part = mixtures.first(whole, count)
  assert [x.pid for x in part] == [
    f"{name}/{name}{index}"
    for name, size in zip("abc", taken, strict=True)
    for index in range(size)
  ]


def test_problems_of_a_run_are_found_by_its_pids(tmp_path):
  for name in ("a", "b"):
    taken.write({"train": problems("p", 3)}, tmp_path / name)
  named = f"{tmp_path}/a,{tmp_path}/b"
  found = mixtures.problems_by_pid(named, {"b/p1", "a/p9", "p2"})
  assert [(x.pid, x.metadata) for x in found.values()] == [
    ("b/p1", {"data_set": "b"})
  ]
  assert mixtures.problems_by_pid(tmp_path / "a", {"p2"})["p2"].pid == "p2"
