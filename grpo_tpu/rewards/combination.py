"""Joins the rewards of networks with those of the host, row by row.

A network without a score for a completion has failed: the row is excluded, and
the failure is counted.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import pipeline
from data_pipelines.text import untrusted
from grpo_tpu.rewards import scoring
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

  def plus(self, values: np.ndarray) -> "Moments":
    """The moments with further scores (Chan, Golub and LeVeque, 1983)."""
    if not values.size:
      return self
    values = values.astype(np.float64)
    mean, squares = float(values.mean()), float(values.var() * values.size)
    count, gap = self.count + values.size, mean - self.mean
    share = values.size / count
    squares += self.squares + gap * gap * self.count * share
    return Moments(count, self.mean + gap * share, squares)

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
    self._budgets = scoring.budgets(config)

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
    names = [field.name for field in dataclasses.fields(Moments)]
    self.moments = {
      key: Moments(*(untrusted.get_field(x, k, float, source) for k in names))
      for key, x in saved.items()
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
    models, judges = names[: len(config.models)], names[len(config.models) :]
    asked = dict.fromkeys(names, is_present)
    if config.judge_when == "abstained":
      asked |= dict.fromkeys(judges, is_present & scores.abstained)
    failed = {k: asked[k] & ~np.isfinite(values[k]) for k in names}
    terms = {k: np.where(asked[k] & ~failed[k], values[k], 0) for k in names}
    # NaN where nobody was asked, which no mean counts.
    components = {k: np.where(asked[k], x, np.nan) for k, x in terms.items()}
    if config.model_normalization != "none":
      for name in models:
        counts = is_present & ~failed[name]
        terms[name] = self._normalize(split + name, terms[name], counts)
    if len(models) > 1:
      spread = np.std([terms[name] for name in models], axis=0)
      components[SPREAD] = terms[SPREAD] = np.where(is_present, spread, 0)
    if config.judge_vote == "majority":
      weights = [config.network_weights[name] for name in judges]
      says_yes = [
        w * (terms[k] > 0.5) for w, k in zip(weights, judges, strict=True)
      ]
      is_yes = np.sum(says_yes, axis=0) / (sum(weights) or 1.0) > 0.5
      terms |= dict.fromkeys(judges, is_yes.astype(np.float32))
    terms = scores.components | terms
    wrong = values["known"] & (scores.components["accuracy"] <= 0.5)
    for name in config.only_if_accurate:
      terms[name] = np.where(wrong, 0, terms[name])
    found = dataclasses.replace(
      scores,
      components=scores.components | components,
      failed=scores.failed | failed,
      terms=terms,
    )
    remedy = "Name other weights in rewards.models or rewards.judges."
    return scoring.add_up(
      found,
      config.term_weights,
      *(failed, is_present, self._gather, self._budgets),
      lambda name, rows: f"{name} gave no finite score on {rows}. {remedy}",
    )

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
