"""An alarm watches a declared metric and is logged once per crossing."""

import math
import re

import pytest

from configs import base
from grpo_tpu.observability import alarms, registry

CEILING = "rollout/truncated_fraction"
FLOOR = "train/effective_sample_share"
EVERY = pytest.mark.parametrize(
  "metric",
  [metric for metric in registry.metrics() if metric.alarm],
  ids=lambda metric: metric.name,
)


@EVERY
def test_the_advice_of_an_alarm_names_real_settings(metric):
  settings = re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", metric.advice)
  config = base.get_config()
  assert settings
  assert all(field in config[section] for section, field in settings)


def test_the_alarms_and_their_limits():
  limits = {
    metric.name: (metric.alarm.limit, metric.alarm.own_samples)
    for metric in registry.metrics()
    if metric.alarm
  }
  assert limits == {
    "train/effective_sample_share": (0.3, True),
    "train/clip_fraction": (0.5, True),
    "train/grad_norm": (1e30, False),
    "train/update_below_half_ulp_fraction": (0.8, False),
    "train/sampler_logp_difference_mean": (0.05, False),
    "rollout/all_right_fraction": (0.9, False),
    "rollout/all_wrong_fraction": (0.9, False),
    "rollout/truncated_fraction": (0.5, False),
    "rollout/heuristic_advantage_share": (0.5, False),
  }


@EVERY
def test_an_alarm_is_triggered_beyond_its_limit_and_by_nan(metric):
  alarm = metric.alarm
  beyond = math.inf if math.isfinite(alarm.above) else -math.inf
  assert not alarm.is_triggered(alarm.limit)
  assert alarm.is_triggered(math.nextafter(alarm.limit, beyond))
  assert not alarm.is_triggered(math.nextafter(alarm.limit, -beyond))
  assert alarm.is_triggered(math.nan)


@pytest.mark.parametrize(
  ("metric", "well", "bad"), [(CEILING, 0.5, 0.6), (FLOOR, 0.3, 0.2)]
)
def test_an_alarm_is_logged_once_and_again_only_after_recovery(
  metric, well, bad
):
  watch = alarms.Alarms(own_samples=True)
  values = [well, bad, bad, math.nan, well, well, math.nan, bad, well, bad]
  logged = [watch.check(i, {metric: value}) for i, value in enumerate(values)]
  assert [i for i, new in enumerate(logged) if new] == [1, 6, 9]
  assert logged[1] == [metric]


def test_a_step_without_the_metric_leaves_its_alarm_unchanged():
  watch = alarms.Alarms(own_samples=True)
  assert watch.check(1, {CEILING: 0.9, FLOOR: 0.9, "train/loss": 1e9})
  assert watch.check(2, {FLOOR: 0.9}) == []
  assert watch.check(3, {CEILING: 0.9}) == []
  assert watch.check(4, {FLOOR: 0.1}) == [FLOOR]


def test_limits_on_own_samples_are_off_for_completions_of_others():
  watch = alarms.Alarms(own_samples=False)
  scalars = {FLOOR: 0.0, "train/clip_fraction": 1.0, CEILING: 1.0}
  assert watch.check(1, scalars) == [CEILING]


def test_a_warning_says_step_metric_value_limit_and_advice(caplog):
  alarms.Alarms(own_samples=True).check(7, {CEILING: 0.75})
  (record,) = caplog.records
  assert record.levelname == "WARNING"
  assert record.getMessage() == (
    f"Step 7: {CEILING} is 0.75 (limit 0.5). Above 0.5 most completions are "
    "truncated before they answer: raise rollout.max_new_tokens, or set "
    "shaping.truncated=penalise."
  )
