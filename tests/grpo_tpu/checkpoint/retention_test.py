"""Which checkpoints are kept, and how they are scored."""

import dataclasses
import itertools
import random

import pytest

from grpo_tpu.checkpoint import retention
from grpo_tpu.checkpoint.retention import CheckpointInfo
from tests.grpo_tpu.checkpoint import checkpointing


def kept(entries, **settings):
  config = checkpointing.config(**settings)
  to_delete = retention.to_delete(entries, config)
  assert to_delete == sorted(to_delete)
  return [entry.name for entry in entries if entry not in to_delete]


def scored(*scores):
  return [
    CheckpointInfo(step, score=score) for step, score in enumerate(scores, 1)
  ]


@pytest.mark.parametrize(
  ("entry", "name"),
  [
    (CheckpointInfo(0), "00000000"),
    (CheckpointInfo(12), "00000012"),
    (CheckpointInfo(12, 3), "00000012.3"),
    (CheckpointInfo(1_234_567_890), "1234567890"),
  ],
)
def test_a_name_says_where_in_the_run_a_checkpoint_is(entry, name):
  assert entry.name == name
  assert CheckpointInfo.from_name(name) == entry


@pytest.mark.parametrize(
  "name",
  [
    *("12", "00000012.", "00000012.0", "000000012", "lock", "quarantine"),
    *("00000012.orbax-checkpoint-tmp", "00000012.manifest.json", "-0000012"),
    *("00000012-wrong-size", "00000012.01"),
  ],
)
def test_nothing_else_is_taken_for_a_checkpoint(name):
  assert CheckpointInfo.from_name(name) is None


def test_updates_count_after_steps():
  order = [
    CheckpointInfo(1),
    CheckpointInfo(1, 1),
    CheckpointInfo(1, 10),
    CheckpointInfo(2),
    CheckpointInfo(10),
  ]
  assert sorted(reversed(order)) == order


def test_the_newest_stay():
  entries = scored(None, None, None, None)
  assert kept(entries, keep=1) == ["00000004"]
  assert kept(entries, keep=3) == ["00000002", "00000003", "00000004"]
  assert kept(entries, keep=9) == [entry.name for entry in entries]


@pytest.mark.parametrize(
  ("mode", "keep_best", "best"),
  [
    ("max", 1, ["00000002"]),
    ("min", 1, ["00000003"]),
    ("max", 2, ["00000002", "00000004"]),
    ("min", 2, ["00000001", "00000003"]),
  ],
)
def test_the_best_stay_beside_the_newest(mode, keep_best, best):
  settings = {
    "keep": 1,
    "best_metric": "eval/accuracy",
    "best_mode": mode,
    "keep_best": keep_best,
  }
  config = checkpointing.config(**settings)
  values = (0.2, 0.9, 0.1, 0.5, float("nan"))
  entries = [
    CheckpointInfo(
      step, score=retention.score({"eval/accuracy": value}, config)
    )
    for step, value in enumerate(values, 1)
  ]
  assert kept(entries, **settings) == [*best, "00000005"]


def test_of_two_that_are_as_good_the_later_stays():
  entries = scored(0.5, 0.5, 0.1, 0.1)
  got = kept(entries, keep=1, best_metric="eval/accuracy")
  assert got == ["00000002", "00000004"]


def test_scores_that_no_setting_asks_for_keep_nothing():
  assert kept(scored(0.9, 0.1, 0.1), keep=1) == ["00000003"]


def test_what_is_not_whole_counts_for_nothing():
  """A checkpoint without a manifest does not displace a good one."""
  entries = [
    CheckpointInfo(1),
    CheckpointInfo(2),
    CheckpointInfo(3, is_whole=False),
  ]
  assert kept(entries, keep=2) == ["00000001", "00000002", "00000003"]
  entries = [
    CheckpointInfo(1),
    CheckpointInfo(2, is_whole=False),
    CheckpointInfo(3),
  ]
  assert kept(entries, keep=2) == ["00000001", "00000003"]
  assert kept([CheckpointInfo(1, is_whole=False)], keep=1) == ["00000001"]


def test_a_partial_step_goes_once_there_is_a_newer_checkpoint():
  assert kept([CheckpointInfo(1), CheckpointInfo(1, 1)], keep=1) == [
    "00000001",
    "00000001.1",
  ]
  assert kept(
    [CheckpointInfo(1), CheckpointInfo(1, 1), CheckpointInfo(1, 2)], keep=1
  ) == [
    *("00000001", "00000001.2"),
  ]
  assert kept(
    [CheckpointInfo(1), CheckpointInfo(1, 1), CheckpointInfo(2)], keep=5
  ) == [
    *("00000001", "00000002"),
  ]


def test_whatever_there_is_the_newest_whole_one_stays():
  draw = random.Random(0)
  for length, keep, _ in itertools.product(range(1, 8), (1, 2, 9), range(20)):
    entries = sorted(
      {
        CheckpointInfo(
          draw.randrange(6),
          draw.choice((0, 0, 1, 2)),
          is_whole=draw.random() < 0.7,
          score=draw.choice((None, 0.1, 0.2)),
        )
        for _ in range(length)
      }
    )
    names = kept(entries, keep=keep, best_metric="eval/accuracy")
    whole = [entry.name for entry in entries if entry.is_whole]
    assert not whole or whole[-1] in names
    newer = [e.name for e in entries if not whole or e.name > whole[-1]]
    assert set(newer) <= set(names)


def test_a_metric_scores_a_step_only_where_it_is_asked_for():
  config = checkpointing.config(best_metric="eval/accuracy")
  assert retention.score({"eval/accuracy": 0.5}, config) == 0.5
  assert retention.score({"eval/reward": 0.5}, config) is None
  assert retention.score({"eval/accuracy": 0.5}, checkpointing.config()) is None
  config = dataclasses.replace(config, best_mode="min")
  assert retention.score({"eval/accuracy": 0.5}, config) == -0.5
