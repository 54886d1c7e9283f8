"""Alarms ring when a reward is gamed, once, and not when a policy learns."""

import json
import math
import pathlib
import re

import numpy as np
import pytest

from configs import base
from data_pipelines.text import tables
from grpo_tpu.observability import registry, reward_trends

SIGNS = tables.read("grpo_tpu.observability", "reward_trends.toml")


def history(num_steps=40, *, seed=0, noise=1.0, **ends):
  """Rows whose metrics go evenly from a start to an end, with noise."""
  rng = np.random.default_rng(seed)
  share = np.linspace(0, 1, num_steps)
  lines = {
    "rollout/accuracy": (0.4, 0.4, 0.03),
    "reward/own_mean": (0.0, 0.0, 0.03),
    "reward/own_std": (1.0, 1.0, 0.0),
    "reward/own_pair_accuracy": (0.8, 0.8, 0.03),
    "reward/own_length_correlation": (0.8, 0.8, 0.03),
    "reward/own_repetition_correlation": (0.8, 0.8, 0.03),
    "reward/model_spread_mean": (1.0, 1.0, 0.05),
    "rollout/completion_length": (50.0, 50.0, 2.0),
    "rollout/repetition": (0.1, 0.1, 0.01),
    "rollout/novel_token_share": (0.1, 0.1, 0.01),
  }
  rows = [{"step": step} for step in range(1, num_steps + 1)]
  for name, (start, end, deviation) in lines.items():
    key = name.split("/")[-1].removeprefix("own_")
    start, end = ends.get(key, (start, end))
    values = start + (end - start) * share
    values += noise * deviation * rng.normal(size=num_steps)
    for row, value in zip(rows, values.tolist(), strict=True):
      if math.isfinite(value):
        row[name] = value
  return rows


def ring(rows, trends=None):
  """The steps at which each sign is new, and the last count of signs."""
  trends = trends or reward_trends.RewardTrends(["own"])
  found, count = {}, 0
  for row in rows:
    before = {key for key in trends._seen if trends._is_current(key)}
    count = trends.check(row["step"], row).get("reward/gaming_signs", 0)
    for key in trends._seen:
      if trends._is_current(key) and key not in before:
        found.setdefault(key[1], []).append(row["step"])
  return found, count


GAMED = {
  "accuracy": {"accuracy": (0.5, 0.2)},
  "length": {"completion_length": (50, 150)},
  "repetition": {"repetition": (0.1, 0.5)},
  "novelty": {"novel_token_share": (0.1, 0.5)},
  "spread": {"model_spread_mean": (1, 3)},
  "pairs": {"pair_accuracy": (0.9, 0.4)},
}
UP = {"mean": (0, 2)}


@pytest.mark.parametrize("sign", GAMED)
def test_a_sign_rings_once_if_the_reward_rises_without_the_accuracy(sign):
  assert set(GAMED) == set(SIGNS)
  found, count = ring(history(**UP, **GAMED[sign]))
  assert found.keys() == {sign}
  assert len(found[sign]) == 1 and found[sign][0] <= 30
  assert count == 1


@pytest.mark.parametrize("sign", GAMED)
@pytest.mark.parametrize(
  "healthy",
  [{}, UP | {"accuracy": (0.3, 0.8)}, {"mean": (2, 0)}],
  ids=["no reward rises", "accuracy rises", "reward falls"],
)
def test_no_sign_rings_otherwise(sign, healthy):
  assert ring(history(**GAMED[sign] | healthy)) == ({}, 0)


def test_without_known_accuracy_the_other_signs_ring():
  unknown = {"accuracy": (math.nan, math.nan), "pair_accuracy": (math.nan,) * 2}
  for sign in GAMED.keys() - {"accuracy", "pairs"}:
    found, _ = ring(history(**UP | GAMED[sign] | unknown))
    assert found.keys() == {sign}
  assert ring(history(**UP, **unknown)) == ({}, 0)


def test_length_counts_only_if_the_reward_goes_with_it():
  low = {"length_correlation": (0.2, 0.2)}
  assert ring(history(**UP, **GAMED["length"], **low)) == ({}, 0)


def test_the_reward_is_compared_on_rows_whose_accuracy_is_known():
  """It rises on unchecked rows alone, while another cause lowers accuracy."""
  rows = history(**UP, **GAMED["accuracy"])
  for row in rows:
    row["reward/own_mean_if_right"] = row["reward/own_mean_if_wrong"] = 0.3
  assert ring(rows) == ({}, 0)
  for row in rows:
    del row["reward/own_mean_if_wrong"]
    row["reward/own_mean_if_right"] = (
      row["reward/own_mean"] / row["rollout/accuracy"]
    )
  assert ring(rows)[0].keys() == {"accuracy"}


def test_gaming_that_begins_late_is_compared_with_the_time_before():
  learns = history(100, mean=(0, 1), accuracy=(0.2, 0.8))
  games = history(100, mean=(1, 3), accuracy=(0.8, 0.3), seed=1)
  games = [row | {"step": row["step"] + 100} for row in games]
  ((_, steps),) = ring(learns + games)[0].items()
  assert 100 < steps[0] <= 150


def test_gaming_that_is_over_within_the_first_window_rings():
  """The level of a window is no noise: only steps side by side are."""
  rows = history(25, noise=1)
  for row in rows:
    left = math.exp(-row["step"] / 3)
    row["reward/own_mean"] += 1 - left
    row["rollout/accuracy"] = 0.4 * left + 0.1 * row["rollout/accuracy"]
    row["rollout/completion_length"] += 150 * (1 - left)
    row["reward/own_length_correlation"] *= left**0.5
  assert ring(rows)[0].keys() == {"accuracy", "length"}


def test_noise_of_every_size_raises_no_alarm():
  for seed, noise in enumerate([0, 1e-9, 1, 1, 1, 4, 4]):
    assert ring(history(300, seed=seed, noise=noise)) == ({}, 0)


def test_a_rise_that_is_small_or_due_to_rounding_is_none():
  assert ring(history(noise=0, mean=(0, 0.15), **GAMED["accuracy"])) == ({}, 0)
  rows = history(noise=0, std=(0, 0), **GAMED["accuracy"])
  for row in rows:
    row["reward/own_mean"] = 0.3 + 1e-8 * (row["step"] > 20)
  assert ring(rows) == ({}, 0)


def test_the_levels_of_all_comparisons_add_up_to_one_percent(monkeypatch):
  levels = []

  def gains(series, name, level):
    count = len(series["rollout/accuracy"]) - 1
    levels.append(level * count)
    return np.zeros(count, bool)

  monkeypatch.setattr(reward_trends, "_gains", gains)
  ring(history(400))
  assert 0.009 < sum(levels) < 0.0105


@pytest.mark.parametrize("stop", [15, 22, 25, 33, 60])
def test_a_resumed_run_neither_forgets_nor_repeats_an_alarm(tmp_path, stop):
  rows = history(80, **UP, **GAMED["length"], **GAMED["accuracy"])
  path = tmp_path / "metrics.jsonl"
  steps = [{"step": 0, "eval/accuracy": 0.5}, *rows]
  path.write_text("".join(json.dumps(row) + "\n" for row in steps) + '{"st')
  wanted, count = ring(rows)
  resumed = reward_trends.RewardTrends(["own"])
  resumed.resume(path, stop)
  found, resumed_count = ring(rows[stop:], trends=resumed)
  assert resumed_count == count == 2
  later = {k: [x for x in v if x > stop] for k, v in wanted.items()}
  assert found == {k: v for k, v in later.items() if v}


def test_rows_of_others_are_no_history(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = ['{"step": 1, "reward/own_mean": "x"}', "[]", "\xff", "{"]
  lines += ['{"step": 2, "reward/own_mean": null, "rollout/accuracy": [1]}']
  path.write_text("\n".join(lines) + "\n", "latin1")
  trends = reward_trends.RewardTrends(["own"])
  trends.resume(path, 9)
  assert ring(history(**UP, **GAMED["length"]), trends=trends)[0]


def test_the_words_of_an_alarm_say_figures_and_what_to_do(caplog):
  ring(history(**UP, **GAMED["length"], noise=0))
  (record,) = caplog.records
  words = record.getMessage()
  metrics = ("reward/own_mean", "rollout/completion_length")
  metrics += ("reward/own_length_correlation", "rollout/accuracy")
  figures = ", ".join(rf"{x} is [\d.]+ instead of [\d.]+" for x in metrics)
  steps = r"\(means of steps \d+ to 2\d, and 1 to 10\)"
  assert re.match(
    rf"Step 2\d: the policy may be gaming the reward own: {figures} {steps}\. "
    r"Length is rewarded: .* See docs/reading-the-curves\.md#when",
    words,
  )
  heading = words.rsplit("#", 1)[1].replace("-", " ").capitalize()
  page = pathlib.Path("docs/reading-the-curves.md").read_text()
  assert f"\n## {heading}\n" in page


@pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS)
def test_each_sign_names_metrics_and_settings_that_exist(sign):
  for name in (sign["metric"], *sign["correlation"]):
    assert registry.row_index(name.format(name="model_1")) is not None
  config = base.get_config()
  settings = re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", sign["advice"])
  assert all(field in config[section] for section, field in settings)


def test_a_run_without_watched_rewards_has_no_metric():
  assert reward_trends.RewardTrends([]).check(1, history(1)[0]) == {}
  other = reward_trends.RewardTrends(["other"])
  assert other.check(1, history(1)[0]) == {}
