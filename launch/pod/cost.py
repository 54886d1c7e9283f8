"""Estimates of what slices cost, from the list prices in `prices.toml`."""

import datetime
import math
import pathlib
import tomllib
from collections.abc import Collection
from typing import Any

from launch.pod import settings as pod_settings
from launch.pod import shapes

_PRICES: dict[str, Any] = tomllib.loads(
  pathlib.Path(__file__).with_name("prices.toml").read_text(encoding="utf-8")
)


def _price_per_hour(settings: pod_settings.Settings, zone: str) -> float:
  """The price of all slices of a run, in US dollars; NaN if it is unknown."""
  shape = shapes.SHAPES.get(settings.accelerator_type)
  if shape is None:
    return math.nan
  prices = _PRICES.get(shape.chip, {}).get(zone.rpartition("-")[0], ())
  by_capacity = dict(zip(("on-demand", "spot"), prices, strict=False))
  chips = shape.hosts * shape.chips_per_host * len(settings.nodes)
  return by_capacity.get(settings.capacity, math.nan) * chips


def _describe(price: float) -> str:
  amount = "price unknown" if math.isnan(price) else f"about ${price:.2f}"
  return f"{amount} (estimate; list prices of {_PRICES['date']})."


def describe_hour(settings: pod_settings.Settings, zone: str) -> str:
  """A sentence on the price of an hour."""
  slices = f"{settings.num_slices} x {settings.accelerator_type}"
  price = _describe(_price_per_hour(settings, zone))
  return f"An hour of {slices} ({settings.capacity}) in {zone}: {price}"


def describe_total(
  settings: pod_settings.Settings, slices: Collection[tuple[str, float]]
) -> str:
  """A sentence on the cost so far of slices, from zones and hours."""
  hours = sum(life for _, life in slices)
  price = sum(life * _price_per_hour(settings, zone) for zone, life in slices)
  return f"So far: {hours:.1f} hours of slices, {_describe(price)}"


def hours_since(create_time: str) -> float:
  """The age of a slice in hours, from a time of the API."""
  start = datetime.datetime.fromisoformat(create_time)
  age = datetime.datetime.now(datetime.UTC) - start
  return max(age.total_seconds(), 0.0) / 3600
