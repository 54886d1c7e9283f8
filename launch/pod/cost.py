"""Estimates of what slices cost, from the list prices in `prices.toml`."""

import datetime
import math
import pathlib
import tomllib
from collections.abc import Iterable
from typing import Any

from launch.pod import settings as pod_settings
from launch.pod import shapes

_PRICES: dict[str, Any] = tomllib.loads(
  pathlib.Path(__file__).with_name("prices.toml").read_text(encoding="utf-8")
)
_NOTE = f"(estimate; list prices of {_PRICES['date']})"
_COLUMNS = {"on-demand": 0, "spot": 1}


def price_per_hour(settings: pod_settings.Settings, zone: str) -> float | None:
  """The price of all slices of a run, in US dollars; None if it is unknown."""
  shape = shapes.SHAPES.get(settings.accelerator_type)
  prices = _PRICES.get(shape.chip, {}) if shape else {}
  price = prices.get(zone.rpartition("-")[0])
  if shape is None or price is None or settings.capacity not in _COLUMNS:
    return None
  chips = shape.hosts * shape.chips_per_host * len(settings.nodes)
  return price[_COLUMNS[settings.capacity]] * chips


def describe_hour(settings: pod_settings.Settings, zone: str) -> str:
  """A sentence on the price of an hour."""
  price = price_per_hour(settings, zone)
  what = f"{settings.num_slices} x {settings.accelerator_type}"
  what = f"An hour of {what} ({settings.capacity}) in {zone}"
  if price is None:
    return f"{what}: price unknown {_NOTE}."
  return f"{what} costs about ${price:.2f} {_NOTE}."


def describe_total(
  settings: pod_settings.Settings, slices: Iterable[tuple[str, float]]
) -> str:
  """A sentence on the cost so far of slices, from zones and hours."""
  hours = total = 0.0
  for zone, life in slices:
    price = price_per_hour(settings, zone)
    hours += life
    total += life * (math.nan if price is None else price)
  amount = "price unknown" if math.isnan(total) else f"about ${total:.2f}"
  return f"So far: {hours:.1f} hours of slices, {amount} {_NOTE}."


def hours_since(create_time: str) -> float:
  """The age of a slice in hours, from a time of the API."""
  try:
    start = datetime.datetime.fromisoformat(create_time)
    age = datetime.datetime.now(datetime.UTC) - start
  except (TypeError, ValueError):
    return 0.0
  return max(age.total_seconds(), 0.0) / 3600
