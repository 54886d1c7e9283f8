"""From completions to rewards: every component of every row, and their sum.

A reward that raises, or that is no finite number, says nothing of its row:
the row is excluded and counted, never paid 0. Knows nothing of groups,
advantages or tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from data_pipelines import records, verifier
from grpo_tpu.rewards import accuracy, heuristics


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """What each component weighs in the total; 0 computes and logs it only.

  Attributes:
    accuracy: Weight of the right answer (0 or 1).
    format: Weight of exactly one <answer> tag (0 or 1).
    length: Weight of the length heuristic (0 to 0.5).
    reasoning_words: Weight of the connectives heuristic (0 to 0.3).
    coherence: Weight of the sentences heuristic (0 to 0.2).
    gate_heuristics: Whether the three heuristics are 0 for a completion that
      gives no answer. Without it spam can earn as much as a right answer.
  """

  accuracy: float
  format: float
  length: float
  reasoning_words: float
  coherence: float
  gate_heuristics: bool

  def __post_init__(self):
    for name in COMPONENTS:
      weight = getattr(self, name)
      if not math.isfinite(weight):
        raise ValueError(
          f"rewards.{name} ({weight}) must be a finite number; 0 logs the "
          "component without paying for it."
        )


@dataclasses.dataclass(frozen=True)
class Scores:
  """What N completions are paid.

  Attributes:
    total: float32 [N], the weighted sum; 0 where not valid.
    components: Name to float32 [N], before weights, in the order of
      `COMPONENTS`; a heuristic that is gated away is 0.
    valid: bool [N]. False where a component failed: the row must be left out.
    errors: Name to the number of rows on which the component failed.
    answers: The answer read from each completion, or None.
  """

  total: np.ndarray
  components: dict[str, np.ndarray]
  valid: np.ndarray
  errors: dict[str, int]
  answers: list[str | None]


@dataclasses.dataclass(frozen=True)
class _Completion:
  text: str
  reasoning: heuristics.Reasoning
  verdict: verifier.Verdict


_REWARDS: Mapping[str, Callable[[_Completion], float]] = {
  "accuracy": lambda row: accuracy.accuracy(row.verdict),
  "format": lambda row: accuracy.well_formed(row.text),
  "length": lambda row: heuristics.length(row.reasoning),
  "reasoning_words": lambda row: heuristics.reasoning_words(row.reasoning),
  "coherence": lambda row: heuristics.coherence(row.reasoning),
}
COMPONENTS = tuple(_REWARDS)
HEURISTICS = ("length", "reasoning_words", "coherence")


def score(
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  config: RewardConfig,
) -> Scores:
  """Every reward of every completion of the problem beside it.

  Args:
    completions: Decoded text, without the end of turn.
    problems: What each of them answers.
    config: The weights.

  Returns:
    The scores, row by row; no completion raises.
  """
  values = np.zeros((len(COMPONENTS), len(completions)), np.float32)
  failed = np.zeros(values.shape, bool)
  answers: list[str | None] = []
  for row, (text, problem) in enumerate(
    zip(completions, problems, strict=True)
  ):
    answer, values[:, row], failed[:, row] = _score_one(text, problem, config)
    answers.append(answer)
  total = np.zeros(len(completions), np.float32)
  # Row by row, so that a total does not depend on the rows beside it.
  for name, component in zip(COMPONENTS, values, strict=True):
    total += np.float32(getattr(config, name)) * component
  valid = ~failed.any(axis=0)
  return Scores(
    total=np.where(valid, total, np.float32(0)),
    components=dict(zip(COMPONENTS, values, strict=True)),
    valid=valid,
    errors=dict(zip(COMPONENTS, failed.sum(axis=1).tolist(), strict=True)),
    answers=answers,
  )


def _score_one(
  text: str, problem: records.Problem, config: RewardConfig
) -> tuple[str | None, list[float], list[bool]]:
  """The answer of one completion, its components, and which of them failed."""
  values = [0.0] * len(COMPONENTS)
  failed = [False] * len(COMPONENTS)
  try:
    verdict = verifier.verify(text, problem)
  except Exception as error:
    _warn("accuracy", problem, error)
    failed[COMPONENTS.index("accuracy")] = True
    return None, values, failed
  reasoning = heuristics.read(accuracy.reasoning(text))
  row = _Completion(text, reasoning, verdict)
  gated = config.gate_heuristics and verdict.answer is None
  for i, name in enumerate(COMPONENTS):
    if gated and name in HEURISTICS:
      continue
    try:
      value = float(_REWARDS[name](row))
      if not math.isfinite(value):
        raise ValueError(f"a reward must be a finite number, not {value}")
      values[i] = value
    except Exception as error:
      _warn(name, problem, error)
      failed[i] = True
  return verdict.answer, values, failed


def _warn(name: str, problem: records.Problem, error: Exception) -> None:
  """Says so a few times; `Scores.errors` counts the rest."""
  message = "Reward %s failed on a completion of %s: %r"
  logging.log_first_n(logging.WARNING, message, 20, name, problem.pid, error)
