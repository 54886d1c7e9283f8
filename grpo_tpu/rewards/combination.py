"""Joins the rewards of networks with those of the host, row by row.

A network without a score for a completion has failed: the row is excluded, and
the failure is counted.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from data_pipelines import pipeline
from data_pipelines.text import untrusted
from grpo_tpu.rewards import error_budget, scoring
from grpo_tpu.rewards.networks import Completed, NetworkReward
from grpo_tpu.rewards.settings import SPREAD, RewardConfig

# Scores that differ less are equal, but for rounding.
_LEAST_STD = 1e-6


@dataclasses.dataclass(frozen=True)
class Moments:
  """Number, mean and summed squared deviations of some scores."""

  count: int = 0
  mean: float = 0.0
  squares: float = 0.0

  def plus(self, values: np.ndarray) -> Self:
    """The moments with further scores (Chan, Golub and LeVeque, 1983)."""
    if not values.size:
      return self
    values = values.astype(np.float64)
    mean, squares = float(values.mean()), float(values.var() * values.size)
    count, gap = self.count + values.size, mean - self.mean
    share = values.size / count
    squares += self.squares + gap * gap * self.count * share
    changes = {"mean": self.mean + gap * share, "squares": squares}
    return dataclasses.replace(self, count=count, **changes)

  def normalize(self, values: np.ndarray) -> np.ndarray:
    """The scores as standard deviations above the mean; centered if alike."""
    std = math.sqrt(self.squares / max(self.count, 1))
    scale = std if std > _LEAST_STD else 1.0
    return ((values - self.mean) / scale).astype(np.float32)


class Combination:
  """The rewards of the host and of networks together.

  Attributes:
    moments: Moments of each reward model's scores by name, from which they are
      normalised; those of evaluations begin with "eval/".
  """

  def __init__(
    self,
    config: RewardConfig,
    networks: Sequence[NetworkReward],
    gather: Callable[[Any], Any],
  ):
    """`gather` maps the rows of this process to those of all, in one order."""
    self._config, self._networks, self._gather = config, networks, gather
    self.moments: dict[str, Moments] = {}
    self._budgets = {
      name: error_budget.ErrorBudget(
        config.max_error_fraction, config.error_window
      )
      for name in config.network_weights
    }

  def start(
    self,
    prompts: pipeline.Batch,
    completed: Completed,
    is_present: np.ndarray,
    *,
    split: str = "",
  ) -> Callable[..., scoring.Scores]:
    """Starts the networks; the result adds their values to those of the host.

    All processes call both. Rows that are not `is_present` [rows, C] are
    stand-ins. The result takes the host's scores, row by row, of all columns or
    of one. Moments of another `split` are kept apart, and stay the first ones,
    so that evaluations can be compared.

    Raises (the result):
      RewardError: A network failed too often.
    """
    waits = [x.start(prompts, completed) for x in self._networks]
    known = np.array([x.is_checkable for x in prompts.problems])[:, None]
    rows = {"present": is_present, "known": known & is_present}

    @functools.cache
    def values() -> dict[str, np.ndarray]:
      return rows | {k: x for wait in waits for k, x in wait().items()}

    def join(scores: scoring.Scores, columns: Any = ...) -> scoring.Scores:
      picked = {k: x[:, columns].ravel() for k, x in values().items()}
      return self._join(scores, picked, split)

    return join

  @contextlib.contextmanager
  def transaction(self) -> Iterator[None]:
    """Takes the moments back if its body is interrupted."""
    before = dict(self.moments)
    try:
      yield
    except BaseException:
      self.moments = before
      raise

  def state(self) -> dict[str, dict[str, float]]:
    """The moments, for the record of a checkpoint."""
    return {k: dataclasses.asdict(x) for k, x in self.moments.items()}

  def restore(self, saved: Any) -> None:
    """Takes over what `state` gave; a ValueError if it is something else."""
    source = "the statistics of rewards in the checkpoint"
    untrusted.check_kind(saved, dict, source)
    untrusted.check_items(saved.values(), dict, source)
    for each in saved.values():
      for name in ("count", "mean", "squares"):
        untrusted.get_field(each, name, float, source)
    self.moments = {
      name: Moments(int(x["count"]), float(x["mean"]), float(x["squares"]))
      for name, x in saved.items()
    }

  def _join(
    self,
    scores: scoring.Scores,
    values: Mapping[str, np.ndarray],
    split: str,
  ) -> scoring.Scores:
    config, names = self._config, list(self._config.network_weights)
    if not names and not config.only_if_accurate:
      return scores
    is_present = values["present"]
    asked = {name: is_present for name in names}
    if config.judge_when == "abstained":
      own = is_present & scores.abstained
      asked |= {name: own for name in names if name.startswith("judge")}
    failed = {k: asked[k] & ~np.isfinite(values[k]) for k in names}
    # NaN where nobody was asked, which no mean counts.
    components = {
      k: np.where(asked[k], np.where(failed[k], 0, values[k]), np.nan)
      for k in names
    }
    paid = {k: np.where(asked[k], x, 0) for k, x in components.items()}
    models = names[: len(config.models)]
    if config.model_normalization != "none":
      for name in models:
        paid[name] = self._normalize(
          *(f"{split}{name}", paid[name]), is_present & ~failed[name]
        )
    if len(models) > 1:
      spread = np.std([paid[name] for name in models], axis=0)
      components[SPREAD] = paid[SPREAD] = np.where(is_present, spread, 0)
    if config.judge_vote == "majority":
      paid |= self._majority(paid)
    paid = scores.components | paid
    wrong = values["known"] & (scores.components["accuracy"] <= 0.5)
    for name in config.only_if_accurate:
      paid[name] = np.where(wrong, 0, paid[name])
    paid = {k: x.astype(np.float32) for k, x in paid.items()}
    found = dataclasses.replace(
      scores,
      components=scores.components
      | {k: x.astype(np.float32) for k, x in components.items()},
      failed=scores.failed | failed,
      paid=paid,
    )
    return self._count(found, failed, is_present)

  def _normalize(
    self, name: str, values: np.ndarray, counts: np.ndarray
  ) -> np.ndarray:
    """Scores of a model, normalised by the moments of this name."""
    moments = self.moments.get(name, Moments())
    is_running = self._config.model_normalization == "running"
    if not moments.count or (is_running and "/" not in name):
      rows = self._gather(np.column_stack([values, counts]).astype(np.float32))
      moments = moments.plus(rows[rows[:, 1] > 0, 0])
      self.moments[name] = moments
    return moments.normalize(values)

  def _majority(self, paid: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """1 for each judge where the majority says yes, else 0."""
    weights = {
      k: w for k, w in self._config.network_weights.items() if k[0] == "j"
    }
    says_yes = [w * (paid[k] > 0.5) for k, w in weights.items()]
    share = np.sum(says_yes, axis=0) / (sum(weights.values()) or 1.0)
    return dict.fromkeys(weights, (share > 0.5).astype(np.float32))

  def _count(
    self,
    scores: scoring.Scores,
    failed: Mapping[str, np.ndarray],
    is_present: np.ndarray,
  ) -> scoring.Scores:
    """The scores with their total and the failures of all processes."""
    config, total = self._config, np.zeros(len(is_present), np.float32)
    for name, weight in config.paid.items():
      if name in scores.paid:  # One reward model alone has no spread.
        total += np.float32(weight) * scores.paid[name]
    rows = self._gather(np.column_stack([is_present, *failed.values()]))
    counted = dict(zip(failed, rows[rows[:, 0]].T[1:], strict=True))
    errors = {name: int(x.sum()) for name, x in counted.items()}
    scores = dataclasses.replace(
      scores,
      total=np.where(scores.valid, total, np.float32(0)),
      errors=scores.errors | errors,
    )
    for name, each in counted.items():
      if reason := self._budgets[name].count(each.tolist()):
        raise scoring.RewardError(
          f"reward {name} gave no finite score on {reason}. Name other weights "
          "in rewards.models or rewards.judges.",
          scores,
        )
    return scores
