"""Scores completions in a thread while the devices decode the others."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Self

import numpy as np

from data_pipelines import records
from data_pipelines.verifier import verify
from grpo_tpu.rewards import scoring
from grpo_tpu.rewards.settings import RewardConfig


class BackgroundScorer:
  """Scores the completions of a batch, prompt by prompt, as they finish.

  A completion's score does not depend on when it is computed, and failures
  count in the order of the batch. Use as a context manager.
  """

  def __init__(
    self,
    problems: Sequence[records.Problem],
    config: RewardConfig,
    *,
    valid: np.ndarray,
    gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
  ):
    """Takes the problem of each prompt; without `valid` it is a stand-in."""
    self._problems, self._config, self._gather = problems, config, gather
    self._valid = valid
    self._pending: dict[int, futures.Future[scoring.RawScores]] = {}
    self._spans: list[tuple[float, float]] = []

  def __enter__(self) -> Self:
    self._thread = futures.ThreadPoolExecutor(max_workers=1)
    verify.start_workers(self._problems)  # While the devices decode.
    self._set_up = scoring.start_workers(self._config)
    return self

  def __exit__(self, *_: object) -> None:
    self._thread.shutdown(cancel_futures=True)

  def submit(
    self,
    texts: Mapping[int, list[str]],
    truncated: Mapping[int, Sequence[bool]],
  ) -> None:
    """Starts to score the completions of some prompts, by prompt index."""
    for index, group in texts.items():
      # Users' rewards of all groups are in flight together.
      finish = scoring.start(
        group,
        [self._problems[index]] * len(group),
        self._config,
        is_present=np.full(len(group), self._valid[index]),
        truncated=truncated[index],
      )
      self._pending[index] = self._thread.submit(self._score, finish)

  def result(
    self, texts: Sequence[list[str]], truncated: Sequence[Sequence[bool]]
  ) -> scoring.Scores:
    """Scores of all completions, prompt by prompt, or a `RewardError`."""
    rest = {i: x for i, x in enumerate(texts) if i not in self._pending}
    self.submit(rest, dict(enumerate(truncated)))
    parts = [self._pending[index].result() for index in range(len(texts))]
    return scoring.reduce(parts, self._config, gather=self._gather)

  def seconds_before(self, time_point: float) -> float:
    """Seconds spent on scoring before a value of `time.perf_counter`."""
    spans = self._spans
    return sum(max(min(end, time_point) - start, 0) for start, end in spans)

  def _score(
    self, finish: Callable[[], scoring.RawScores]
  ) -> scoring.RawScores:
    for each in self._set_up:
      each.result()
    start = time.perf_counter()
    scores = finish()
    self._spans.append((start, time.perf_counter()))
    return scores
