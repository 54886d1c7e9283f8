"""Alarms about rewards that rise while the answers get no better.

The last window of steps is compared with earlier ones. A change counts if it is
large and if Welch's t-test finds that it is no noise, at a level that falls
with the square of the number of steps: over a run, however long, the levels of
all comparisons add up to `_LEVEL`. `reward_trends.toml` lists the signs.

References:
  von Neumann et al., "The mean square successive difference", 1941
  Welch, "The generalization of 'Student's' problem", Biometrika 34, 1947
  Overoptimization: Gao et al., arXiv:2210.10760
"""

import math
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from data_pipelines.text import tables
from grpo_tpu.observability import json_lines

WINDOW = 10  # Steps.
# Degrees of freedom of the mean square successive difference of a window.
_FREEDOM = 2 * (WINDOW - 1) ** 2 / (3 * WINDOW - 4)
_LEVEL = 0.01  # The chance of a false alarm about one sign of one reward.
_GAIN_LEVEL = 0.05  # At which a rise of the accuracy keeps alarms silent.
_LEAST_RISE = 0.2  # Of a reward, in its standard deviations.
_LEAST_CORRELATION = 0.5
_ACCURACY, _MEAN = "rollout/accuracy", "reward/{name}_mean"
_BY_VERDICT = ("reward/{name}_mean_if_right", "reward/{name}_mean_if_wrong")
_STD = "reward/{name}_std"


class RewardTrends:
  """Watches the rewards that depend on more than the answer."""

  def __init__(self, rewards: Collection[str]):
    """Watches the rewards of these names."""
    self._rewards = rewards
    self._signs = tables.read(__package__, "reward_trends.toml")
    used = [_ACCURACY, _MEAN, _STD, *_BY_VERDICT]
    for sign in self._signs.values():
      used += [sign["metric"], *sign["correlation"]]
    names = (x.format(name=name) for x in used for name in rewards)
    self._names = list(dict.fromkeys(names))
    self._steps: list[int] = []
    self._rows: list[np.ndarray] = []  # By `_names`; NaN for no number.
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
    if not any(_MEAN.format(name=x) in row for x in self._rewards):
      return False
    try:  # Others may have written into the file.
      values = np.array([row.get(x) for x in self._names], float)
    except (TypeError, ValueError):
      return False
    values[~np.isfinite(values)] = np.nan  # As a resumed run reads it.
    self._steps.append(row["step"])
    self._rows.append(values)
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
    level = _LEVEL * 2 * WINDOW / len(self._rows) ** 2 / len(starts)
    windows = [self._rows[x : x + WINDOW] for x in (*starts, last)]
    columns = np.moveaxis(np.array(windows), -1, 0)
    series = dict(zip(self._names, columns, strict=True))
    for name in self._rewards:
      gains = _gains(series, name, level)
      for key, sign in self._signs.items() if gains.any() else ():
        found = gains & _shows(series, name, sign, level)
        is_new = found.any() and not self._is_current((name, key))
        if found.any():
          self._seen[name, key] = len(self._rows)
        if is_new:
          index = int(found.argmax())
          ends = (self._steps[x : x + WINDOW] for x in (last, starts[index]))
          new, old = (f"{x[0]} to {x[-1]}" for x in ends)
          yield (
            f"the policy may be gaming the reward {name}: "
            f"{_describe(series, name, sign, index)} (means of steps {new}, "
            f"and {old}). {sign['advice']} See docs/reading-the-curves.md"
            "#when-the-policy-games-its-reward"
          )


# The values of a metric in K earlier windows and in the last one, [K + 1,
# WINDOW]. A window with a NaN tells nothing.
type _Series = Mapping[str, np.ndarray]


def _gains(series: _Series, name: str, level: float) -> np.ndarray:
  """bool [K], True where the reward has risen and the accuracy has not.

  The reward on the rows whose accuracy is known, or on all rows.
  """
  accuracy, reward, deviation, right, wrong = (
    series[x.format(name=name)] for x in (_ACCURACY, _MEAN, _STD, *_BY_VERDICT)
  )
  parts = np.array([right * accuracy, wrong * (1 - accuracy)])
  has_known = np.isfinite(parts).any(axis=0)
  reward = np.where(has_known, np.nansum(parts, axis=0), reward)
  least = _LEAST_RISE * deviation[:-1].mean(axis=-1)
  is_better = _changes(accuracy, 1, 0.0, _GAIN_LEVEL)
  return _changes(reward, 1, least, level) & ~is_better


def _shows(
  series: _Series, name: str, sign: Mapping[str, Any], level: float
) -> np.ndarray:
  """bool [K], True where the metric of the sign has changed."""
  values = series[sign["metric"].format(name=name)]
  least = sign["share"] * np.abs(values[:-1].mean(-1)) + sign["least"]
  found = _changes(values, sign["direction"], least, level)
  for correlation in sign["correlation"]:
    # It fades once all completions are as long as they can be: half a window.
    halves = series[correlation.format(name=name)].reshape(-1, 2, WINDOW // 2)
    highest = halves.mean(axis=-1).max(axis=-1)
    found &= np.fmax(highest[:-1], highest[-1]) >= _LEAST_CORRELATION
  return found


def _changes(
  values: np.ndarray, direction: float, least: Any, level: float
) -> np.ndarray:
  """bool [K], True where the last mean is further by `least`, not by chance."""
  import scipy.special  # Slow to import.

  means = values.mean(axis=-1)
  # A policy may be gamed within a window: only steps side by side show noise.
  noise = np.square(np.diff(values)).mean(axis=-1) / 2 / WINDOW
  noise += (1e-6 * means) ** 2  # Rounding makes no difference significant.
  difference = direction * (means[-1] - means[:-1])
  with np.errstate(invalid="ignore", divide="ignore"):
    total = noise[:-1] + noise[-1]
    freedom = total**2 * _FREEDOM / (noise[:-1] ** 2 + noise[-1] ** 2)
    p_values = scipy.special.stdtr(freedom, -difference / np.sqrt(total))
  return (difference >= least) & (p_values < level)


def _describe(
  series: _Series, name: str, sign: Mapping[str, Any], index: int
) -> str:
  """The values of the sign's metrics, now and in an earlier window."""
  shown = (_MEAN, sign["metric"], *sign["correlation"], _ACCURACY)
  shown = dict.fromkeys(x.format(name=name) for x in shown)
  means = {x: series[x].mean(axis=-1)[[-1, index]] for x in shown}
  return ", ".join(
    f"{x} is {now:.3g} instead of {before:.3g}"
    for x, (now, before) in means.items()
    if math.isfinite(now) and math.isfinite(before)
  )
