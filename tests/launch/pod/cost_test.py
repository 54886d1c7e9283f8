"""Costs are estimates from a dated table, and unknown ones are not invented."""

import datetime

import pytest

from launch.pod import cost, shapes
from tests.launch.pod import fake_cloud


@pytest.mark.parametrize(
  "changes, zone, words",
  [
    # 16 chips at $0.445; 16 chips at $1.56; 2 slices of 16 chips of v5p.
    ({}, "europe-west4-b", "about $7.12 (estimate; list prices of 20"),
    ({"CAPACITY": "on-demand"}, "europe-west4-b", "about $24.96"),
    (
      {"ACCELERATOR_TYPE": "v5p-32", "NUM_SLICES": "2"},
      "us-east5-a",
      "about $53.76",
    ),
    ({}, "mars-north1-a", "price unknown"),
    ({"ACCELERATOR_TYPE": "v4-16"}, "us-central2-b", "price unknown"),
    ({"CAPACITY": "reserved"}, "europe-west4-b", "price unknown"),
  ],
)
def test_the_price_of_an_hour(changes, zone, words):
  settings = fake_cloud.settings(**changes)
  assert words in cost.describe_hour(settings, zone)


def test_the_cost_so_far_is_the_sum_over_slices():
  lives = [("europe-west4-b", 2.0), ("us-central1-a", 1.0)]
  # 2 h of 16 chips at $0.445 and 1 h at $0.2449.
  said = cost.describe_total(fake_cloud.settings(), lives)
  assert "3.0 hours of slices, about $18.16 (estimate;" in said
  lives.append(("mars-north1-a", 1.0))
  said = cost.describe_total(fake_cloud.settings(), lives)
  assert "4.0 hours of slices, price unknown" in said


def test_the_table_has_a_date_a_source_and_chips_that_exist():
  assert datetime.date.fromisoformat(cost._PRICES["date"])
  chips = {shape.chip for shape in shapes.SHAPES.values()}
  assert set(cost._PRICES) <= chips | {"date", "source"}
  for chip in chips & set(cost._PRICES):
    for on_demand, spot in cost._PRICES[chip].values():
      assert 0 < spot < on_demand < 10


def test_the_age_of_a_slice_is_never_negative():
  now = datetime.datetime.now(datetime.UTC)
  hour_ago = (now - datetime.timedelta(hours=1)).isoformat()
  assert cost.hours_since(hour_ago) == pytest.approx(1, abs=0.01)
  nanoseconds = hour_ago.replace("+00:00", "123Z")
  assert cost.hours_since(nanoseconds) == pytest.approx(1, abs=0.01)
  assert cost.hours_since("9999-01-01T00:00:00Z") == 0.0
