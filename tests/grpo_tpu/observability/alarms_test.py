"""An alarm is about a number that is written, and is said once."""

import math
import re

import pytest

from configs import base
from grpo_tpu.observability import alarms, registry

CEILING = "rollout/truncated_fraction"
FLOOR = "train/effective_sample_share"
EVERY = pytest.mark.parametrize("alarm", alarms.ALARMS, ids=lambda a: a.metric)


@EVERY
def test_an_alarm_watches_a_declared_metric_and_names_real_settings(alarm):
  assert alarm.metric in {metric.name for metric in registry.METRICS}
  settings = re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", alarm.reason)
  config = base.get_config()
  assert settings
  assert all(field in config[section] for section, field in settings)


def test_every_metric_has_one_alarm_and_the_off_policy_ones_have_theirs():
  names = [alarm.metric for alarm in alarms.ALARMS]
  assert len(set(names)) == len(names)
  assert set(alarms.OFF_POLICY) <= set(names)


@EVERY
def test_an_alarm_rings_beyond_its_limit_and_for_no_number(alarm):
  beyond = -math.inf if alarm.is_floor else math.inf
  assert not alarm.rings(alarm.limit)
  assert alarm.rings(math.nextafter(alarm.limit, beyond))
  assert not alarm.rings(math.nextafter(alarm.limit, -beyond))
  assert alarm.rings(math.nan)


@pytest.mark.parametrize(
  ("metric", "well", "bad"), [(CEILING, 0.5, 0.6), (FLOOR, 0.3, 0.2)]
)
def test_an_alarm_rings_once_and_again_only_after_it_was_well(
  metric, well, bad
):
  watch = alarms.Alarms()
  values = [well, bad, bad, math.nan, well, well, math.nan, bad, well, bad]
  rung = [watch.check(i, {metric: value}) for i, value in enumerate(values)]
  assert [i for i, begun in enumerate(rung) if begun] == [1, 6, 9]
  assert rung[1] == [metric]


def test_a_step_without_the_metric_leaves_its_alarm_as_it_was():
  watch = alarms.Alarms()
  assert watch.check(1, {CEILING: 0.9, FLOOR: 0.9, "train/loss": 1e9})
  assert watch.check(2, {FLOOR: 0.9}) == []
  assert watch.check(3, {CEILING: 0.9}) == []
  assert watch.check(4, {FLOOR: 0.1}) == [FLOOR]


def test_ignored_metrics_do_not_ring():
  watch = alarms.Alarms(ignored=(FLOOR,))
  assert watch.check(1, {FLOOR: 0.0, CEILING: 1.0}) == [CEILING]


def test_a_warning_says_step_metric_value_limit_and_reason(caplog):
  alarms.Alarms().check(7, {CEILING: 0.75})
  (alarm,) = (a for a in alarms.ALARMS if a.metric == CEILING)
  (record,) = caplog.records
  assert record.levelname == "WARNING"
  assert record.getMessage() == (
    f"Step 7: {CEILING} is 0.75 (limit 0.5): {alarm.reason}."
  )
