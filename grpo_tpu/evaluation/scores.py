"""From graded answers to the figures of `eval/scores.json`.

Pure: lists of answers in, plain values out. Knows nothing of policies, devices
or files, nor of how the figures are shown.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.scoring import statistics

NO_ANSWERS = (
  "The answers of this split are not public: predictions are written, and "
  "nothing is graded."
)
OUTCOMES = ("right", "wrong", "no answer", "cut off", "not asked")


@dataclasses.dataclass(frozen=True)
class Answer:
  """One completion of one problem.

  Attributes:
    index: The problem's place in the split.
    record: In MathVista's results format; its `true_false` is None where the
      answer is not public.
    asked: False for a problem that cannot be read or is too long.
    stopped: Whether the completion ended by itself.
  """

  index: int
  record: dict[str, Any]
  asked: bool
  stopped: bool

  @property
  def is_right(self) -> bool:
    """Whether it is the problem's answer; False where that is not public."""
    return bool(self.record["true_false"])

  @property
  def vote(self) -> str | None:
    """What it has in common with the answers that say the same."""
    precision = self.record["precision"]
    return statistics.vote(
      self.record["extraction"],
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
    if self.record["extraction"] is not None:
      return "wrong"
    return "no answer" if self.stopped else "cut off"


def graded(answers: Sequence[Answer]) -> list[Answer]:
  """Those that a figure is taken over; none of a split without answers."""
  if not any(answer.record["answer"] for answer in answers):
    return []
  return [x for x in answers if x.record["true_false"] is not None]


def scores(
  greedy: Sequence[Answer],
  *,
  samples: Sequence[Sequence[Answer]],
  ks: Iterable[int],
  ablated: Mapping[str, Sequence[Answer]],
) -> dict[str, Any]:
  """Every figure, as JSON has it.

  Args:
    greedy: The likeliest answer to each problem, in the order of the split.
    samples: Sampled answers to the same problems, draw by draw.
    ks: For pass@k and maj@k, at most the number of draws.
    ablated: The likeliest answers once more, by what was done to the pictures.

  Returns:
    Counts; `accuracy`, `chance`, `outcomes`, `slices`, `sampled` and
    `ablations`. A figure is an object with `problems`, `right`, `share` and
    the 95 % interval, `low` to `high`. Without public answers `accuracy` is
    None and `note` says why.
  """
  kept = graded(greedy)
  found: dict[str, Any] = {
    "problems": len(greedy),
    "asked": sum(answer.asked for answer in greedy),
    "graded": len(kept),
  }
  if not kept:
    return found | {"accuracy": None, "note": NO_ANSWERS}
  is_right = [answer.is_right for answer in kept]
  found |= {
    "accuracy": _share(sum(is_right), len(kept)),
    "chance": sum(map(_chance, kept)) / len(kept),
    "outcomes": {
      name: sum(answer.outcome == name for answer in kept) for name in OUTCOMES
    },
    "slices": [
      {"dimension": x.dimension, "name": x.name} | dataclasses.asdict(x.result)
      for x in statistics.slices(
        (answer.record, answer.is_right)
        for answer in kept
        # What stands in for a damaged record is of no sort.
        if answer.record["question"]
      )
    ],
    "ablations": {
      name: _ablation(is_right, graded(answers))
      for name, answers in ablated.items()
    },
  }
  if samples:
    found["sampled"] = _sampled([graded(draw) for draw in samples], ks)
  return found


def worst_slices(
  found: Mapping[str, Any], *, count: int, min_problems: int
) -> list[dict[str, Any]]:
  """Slices that are surely worse than the whole, the surest first.

  Those whose interval ends below the overall accuracy, by where it ends; so a
  slice of three problems, all wrong, does not come before one of fifty.
  """
  if not found["accuracy"]:
    return []
  overall = found["accuracy"]["share"]
  worse = [
    x
    for x in found["slices"]
    if x["high"] < overall and x["problems"] >= min_problems
  ]
  return sorted(worse, key=lambda x: (x["high"], x["share"]))[:count]


def examples(answers: Sequence[Answer], count: int) -> list[Answer]:
  """Failures to look at, evenly spread over the split.

  Of a split without public answers, any answers.
  """
  chosen = [x for x in graded(answers) if x.asked and not x.is_right]
  if not graded(answers):
    chosen = [x for x in answers if x.asked]
  places = np.linspace(0, len(chosen), min(count, len(chosen)), endpoint=False)
  return [chosen[int(place)] for place in places]


def _share(right: float, problems: int) -> dict[str, Any]:
  return dataclasses.asdict(statistics.share(right, problems))


def _chance(answer: Answer) -> float:
  """How often a blind guess among the options is right; without any, never."""
  choices = answer.record["choices"] or ()
  if not choices or not answer.asked:
    return 0.0
  return choices.count(answer.record["answer"]) / len(choices)


def _ablation(
  is_right: Sequence[bool], answers: Sequence[Answer]
) -> dict[str, Any]:
  blind = [answer.is_right for answer in answers]
  return {"accuracy": _share(sum(blind), len(blind))} | dataclasses.asdict(
    statistics.comparison(is_right, blind)
  )


def _sampled(
  draws: Sequence[Sequence[Answer]], ks: Iterable[int]
) -> dict[str, Any]:
  """What the draws are worth together; each problem weighs the same."""
  by_problem = list(zip(*draws, strict=True))
  n = len(draws)
  is_right = [[answer.is_right for answer in row] for row in by_problem]
  votes = [[answer.vote for answer in row] for row in by_problem]

  def over_problems(values: Iterable[float]) -> dict[str, Any]:
    return _share(float(sum(values)), len(by_problem))

  return {
    "num_samples": n,
    "accuracy": over_problems(sum(row) / n for row in is_right),
    "pass_at_k": {
      str(k): over_problems(
        statistics.pass_at_k(n, sum(row), k) for row in is_right
      )
      for k in ks
    },
    "maj_at_k": {
      str(k): over_problems(
        statistics.maj_at_k(vote, right, k)
        for vote, right in zip(votes, is_right, strict=True)
      )
      for k in ks
    },
  }
