"""Alarms about rewards that rise while the answers get no better.

The last window of steps is compared with earlier ones. A change counts if it is
large and if Welch's t-test finds that it is no noise, at a level that falls
with the square of the number of steps: over a run, however long, the levels of
all comparisons add up to `_LEVEL`. `reward_trends.toml` lists the signs.

References:
  Welch, "The generalization of 'Student's' problem", Biometrika 34, 1947
  Overoptimization: Gao et al., arXiv:2210.10760
"""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from data_pipelines.text import tables
from grpo_tpu.observability import json_lines

WINDOW = 10  # Steps.
_LEVEL = 0.01  # The chance of a false alarm about one sign of one reward.
_GAIN_LEVEL = 0.05  # At which a rise of the accuracy keeps alarms silent.
_LEAST_RISE = 0.2  # Of a reward, in its standard deviations.
_LEAST_CORRELATION = 0.5
_ACCURACY = "rollout/accuracy"
_MEAN, _STD = "reward/{name}_mean", "reward/{name}_std"


class RewardTrends:
  """Watches the rewards that pay for more than right answers."""

  def __init__(self, weights: Mapping[str, float]):
    """Watches the rewards of these names and weights, none of them 0."""
    self._weights = weights
    self._signs = tables.read(__package__, "reward_trends.toml")
    used = [_ACCURACY, _MEAN, _STD]
    for sign in self._signs.values():
      used += [sign["metric"], *sign["correlation"]]
    self._names = sorted(
      {x.format(name=name) for x in used for name in weights}
    )
    self._steps: list[int] = []
    self._rows: list[list[float]] = []  # By `_names`; NaN for no number.
    # The number of rows when a sign of a reward was last seen.
    self._seen: dict[tuple[str, str], int] = {}

  def resume(self, path: pathlib.Path | epath.Path, resume_step: int) -> None:
    """Reads the steps of earlier processes, whose alarms are not repeated."""
    rows = (row for _, row in json_lines.read_rows(path) if row is not None)
    kept = [row for row in rows if row["step"] <= resume_step]
    for index, row in enumerate(kept):
      # Signs that were seen before the last window do not matter any more.
      if self._append(row) and index >= len(kept) - WINDOW:
        list(self._new_signs())

  def check(self, step: int, scalars: Mapping[str, Any]) -> dict[str, int]:
    """Logs a warning for each sign that was not there in the last window.

    Returns the metric that counts the signs of the last window; none if the
    scalars have no watched reward.
    """
    if not self._append({"step": step, **scalars}):
      return {}
    for words in self._new_signs():
      logging.warning("Step %d: %s", step, words)
    return {"reward/gaming_signs": sum(map(self._is_current, self._seen))}

  def _append(self, row: Mapping[str, Any]) -> bool:
    """Adds the row of a step; False if it has no watched reward."""
    if not any(_MEAN.format(name=x) in row for x in self._weights):
      return False
    values = {name: _number(row, name) for name in self._names}
    for name in self._weights:
      # The mean on the rows whose accuracy is known, if there are any.
      right = _number(row, f"reward/{name}_mean_if_right") * values[_ACCURACY]
      wrong = _number(row, f"reward/{name}_mean_if_wrong")
      wrong *= 1 - values[_ACCURACY]
      if math.isfinite(right) or math.isfinite(wrong):
        values[_MEAN.format(name=name)] = np.nansum([right, wrong])
    self._steps.append(row["step"])
    self._rows.append(list(values.values()))
    return True

  def _is_current(self, key: tuple[str, str]) -> bool:
    return len(self._rows) - self._seen.get(key, -WINDOW) < WINDOW

  def _new_signs(self) -> Iterator[str]:
    """The words about each sign that the newest row has brought."""
    last = len(self._rows) - WINDOW
    # The first window, and those before the last at 1, 2, 4, ... windows.
    starts = {0, *(last - (WINDOW << i) for i in range(last.bit_length()))}
    starts = [x for x in sorted(starts) if 0 <= x <= last - WINDOW]
    if not starts:
      return
    windows = [self._rows[x : x + WINDOW] for x in (*starts, last)]
    level = _LEVEL * 2 * WINDOW / len(self._rows) ** 2 / len(starts)
    compared = _Comparison(self._names, np.array(windows), level)
    for name, weight in self._weights.items():
      for key, sign in self._signs.items():
        found = compared.find(name, math.copysign(1, weight), sign)
        is_new = found.any() and not self._is_current((name, key))
        if found.any():
          self._seen[name, key] = len(self._rows)
        if is_new:
          index = int(found.argmax())
          ends = (self._steps[x : x + WINDOW] for x in (last, starts[index]))
          new, old = (f"{x[0]} to {x[-1]}" for x in ends)
          yield (
            f"the policy may be gaming the reward {name}: "
            f"{compared.describe(name, sign, index)} (means of steps {new}, "
            f"and {old}). {sign['advice'].format(name=name)} See docs/"
            "reading-the-curves.md#when-the-policy-games-its-reward"
          )


class _Comparison:
  """The last window of steps against K earlier ones, for each metric."""

  def __init__(self, names: list[str], windows: np.ndarray, level: float):
    """Takes [K + 1, WINDOW, metrics]; a window with a NaN tells nothing."""
    import scipy.special  # Slow to import.

    means = windows.mean(axis=1)
    # Rounding is noise as well: it makes no difference significant.
    noise = windows.var(axis=1, ddof=1) / WINDOW + (1e-6 * means) ** 2
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
      total = noise[:-1] + noise[-1]
      squares = noise[:-1] ** 2 + noise[-1] ** 2
      freedom = (WINDOW - 1) * total**2 / squares
      scores = -np.abs(means[-1] - means[:-1]) / np.sqrt(total)
      p_values = scipy.special.stdtr(freedom, scores)
    self._means = dict(zip(names, means.T, strict=True))
    self._p_values = dict(zip(names, p_values.T, strict=True))
    self._level = level

  def find(self, name: str, up: float, sign: Mapping[str, Any]) -> np.ndarray:
    """bool [K], True where a window and the last one show the sign.

    A reward with a negative weight gains by falling: `up` is -1.
    """
    metric, mean, deviation = (
      x.format(name=name) for x in (sign["metric"], _MEAN, _STD)
    )
    gain = _LEAST_RISE * self._means[deviation][:-1]
    direction = sign["direction"] * (up if metric != sign["metric"] else 1)
    least = sign["share"] * np.abs(self._means[metric][:-1])
    found = self._changes(mean, up, gain, self._level)
    found &= ~self._changes(_ACCURACY, 1, 0.0, _GAIN_LEVEL)
    least = np.maximum(least, sign["least"])
    found &= self._changes(metric, direction, least, self._level)
    for correlation in sign["correlation"]:
      values = up * self._means[correlation.format(name=name)]
      found &= np.fmax(values[:-1], values[-1]) >= _LEAST_CORRELATION
    return found

  def _changes(self, metric, direction, least, level) -> np.ndarray:
    means = self._means[metric]
    is_large = direction * (means[-1] - means[:-1]) >= least
    return is_large & (self._p_values[metric] < level)

  def describe(self, name: str, sign: Mapping[str, Any], index: int) -> str:
    """The values of the sign's metrics, now and in an earlier window."""
    shown = (_MEAN, sign["metric"], *sign["correlation"], _ACCURACY)
    shown = dict.fromkeys(x.format(name=name) for x in shown)
    values = ((x, self._means[x][[-1, index]]) for x in shown)
    return ", ".join(
      f"{metric} is {now:.3g} instead of {before:.3g}"
      for metric, (now, before) in values
      if math.isfinite(now) and math.isfinite(before)
    )


def _number(row: Mapping[str, Any], name: str) -> float:
  """A finite number of the row, or NaN."""
  value = row.get(name)
  is_number = value is not None and not isinstance(value, str | list | dict)
  number = float(value) if is_number else math.nan
  return number if math.isfinite(number) else math.nan
