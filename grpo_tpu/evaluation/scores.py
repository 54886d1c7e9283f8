"""The figures of `eval/scores.json`, from graded completions.

Pure: takes lists of completions, returns plain values. This module knows no
policies, devices or files.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.scoring import figures, statistics
from data_pipelines.scoring.official import rules

NO_ANSWERS = (
  "The answers of this split are not public: predictions are written, and "
  "nothing is graded."
)
OUTCOMES = ("right", "wrong", "no answer", "cut off", "not asked")


@dataclasses.dataclass(frozen=True)
class GradedCompletion:
  """One completion of one problem."""

  index: int  # The problem's index in the split.
  # In MathVista's results format with `results.strict_fields`;
  # `strict_true_false` is None if the answer is not public.
  record: dict[str, Any]
  asked: bool  # False for a problem that cannot be read or is too long.
  stopped: bool  # True if the completion ended by itself.

  @property
  def is_right(self) -> bool:
    """True for the right answer; False also if the answer is not public."""
    return bool(self.record["strict_true_false"])

  @property
  def vote(self) -> str | None:
    """The answer as a vote in maj@k; see `statistics.vote`."""
    precision = self.record["precision"]
    return statistics.vote(
      self.record["strict_answer"],
      answer_type=self.record["answer_type"],
      precision=-1 if precision is None else precision,
    )

  @property
  def outcome(self) -> str:
    """One of `OUTCOMES`."""
    if not self.asked:
      return "not asked"
    if self.is_right:
      return "right"
    if self.record["strict_answer"] is not None:
      return "wrong"
    return "no answer" if self.stopped else "cut off"


def compute(
  greedy: Sequence[GradedCompletion],
  *,
  samples: Sequence[Sequence[GradedCompletion]],
  ks: Sequence[int],
  ablated: Mapping[str, Sequence[GradedCompletion]],
) -> dict[str, Any]:
  """Computes every figure of an `outputs.Evaluation` as a JSON object.

  Returns counts, `accuracy`, `official` (by rule, with its `title`), `chance`,
  `outcomes`, `slices`, `sampled` and `ablations`. Each figure is a
  `statistics.share`. Without public answers `accuracy` is None and `note` gives
  the reason.
  """
  kept = _select_graded(greedy)
  result: dict[str, Any] = {
    "problems": len(greedy),
    "asked": sum(each.asked for each in greedy),
    "graded": len(kept),
  }
  if not kept:
    return result | {"accuracy": None, "note": NO_ANSWERS}
  is_right = [each.is_right for each in kept]
  is_right_ablated = {
    name: [each.is_right for each in _select_graded(completions)]
    for name, completions in ablated.items()
  }
  official = rules.columns(map(_official_grade, kept))
  overall, *rows = figures.table(
    [each.record for each in kept], {"right": is_right, **official}
  )
  result |= {
    "accuracy": overall["right"],
    "official": {
      name: {"title": rules.TITLES[name], **overall[name]} for name in official
    },
    "chance": sum(map(_chance, kept)) / len(kept),
    "outcomes": {
      name: sum(each.outcome == name for each in kept) for name in OUTCOMES
    },
    "slices": [
      {"dimension": row["dimension"], "name": row["name"]} | row["right"]
      for row in rows
    ],
    "ablations": {
      name: {
        "accuracy": statistics.share(sum(other), len(other)),
        **statistics.comparison(is_right, other),
      }
      for name, other in is_right_ablated.items()
    },
  }
  if samples:
    result["sampled"] = _sample_figures(
      [_select_graded(x) for x in samples], ks
    )
  return result


def sample_metrics(
  draws: Sequence[Sequence[GradedCompletion]], ks: Iterable[int]
) -> dict[str, float]:
  """The metrics mean@n and pass@k, means over the graded problems if any."""
  rows = list(zip(*map(_select_graded, draws), strict=True))
  if not rows:
    return {}
  n, num_right = len(draws), [sum(x.is_right for x in row) for row in rows]
  metrics = {f"eval/mean_at_{n}": sum(num_right) / n / len(rows)}
  for k in ks:
    chances = [statistics.pass_at_k(n, x, k) for x in num_right]
    metrics[f"eval/pass_at_{k}"] = sum(chances) / len(chances)
  return metrics


def worst_slices(
  scores: Mapping[str, Any], *, count: int, min_problems: int
) -> list[dict[str, Any]]:
  """The slices that are significantly worse than the overall accuracy.

  A slice counts if its interval ends below the overall accuracy. The lowest end
  comes first, so a slice of three wrong answers follows one of fifty.
  """
  if not scores["accuracy"]:
    return []
  overall = scores["accuracy"]["share"]
  worse = [
    x
    for x in scores["slices"]
    if x["high"] < overall and x["problems"] >= min_problems
  ]
  return sorted(worse, key=lambda x: (x["high"], x["share"]))[:count]


def examples(
  completions: Sequence[GradedCompletion], count: int
) -> list[GradedCompletion]:
  """Wrong completions, evenly spread over the split.

  Without public answers, any completions.
  """
  graded = _select_graded(completions)
  chosen = [x for x in graded or completions if x.asked and not x.is_right]
  indices = np.linspace(0, len(chosen), min(count, len(chosen)), endpoint=False)
  return [chosen[int(index)] for index in indices]


def _select_graded(
  completions: Sequence[GradedCompletion],
) -> list[GradedCompletion]:
  """The completions that figures count; none if no answer is public."""
  if not any(each.record["answer"] for each in completions):
    return []
  return [x for x in completions if x.record["strict_true_false"] is not None]


def _official_grade(
  completion: GradedCompletion,
) -> tuple[str, str, bool | None]:
  """The pid, the name of the official rule, and what the rule says."""
  record, problem = completion.record, records.from_result(completion.record)
  rule = record.get("official_rule", "")
  right = rules.is_right(rule, record["response"], None, problem)
  return record["pid"], rule, right


def _chance(completion: GradedCompletion) -> float:
  """The chance that a guess among the options is right; 0 without options."""
  choices = completion.record["choices"] or ()
  if not choices or not completion.asked:
    return 0.0
  return choices.count(completion.record["answer"]) / len(choices)


def _sample_figures(
  draws: Sequence[Sequence[GradedCompletion]], ks: Sequence[int]
) -> dict[str, Any]:
  """The figures of sampled completions; each problem has the same weight."""
  n, rows = len(draws), list(zip(*draws, strict=True))
  is_right = [[each.is_right for each in row] for row in rows]
  votes = [[each.vote for each in row] for row in rows]
  voted = list(zip(votes, is_right, strict=True))

  def share(chances: Iterable[float]) -> dict[str, Any]:
    return statistics.share(float(sum(chances)), len(rows))

  return {
    "num_samples": n,
    "accuracy": share(sum(row) / n for row in is_right),
    "pass_at_k": {
      str(k): share(statistics.pass_at_k(n, sum(row), k) for row in is_right)
      for k in ks
    },
    "maj_at_k": {
      str(k): share(statistics.maj_at_k(*row, k) for row in voted) for k in ks
    },
  }
