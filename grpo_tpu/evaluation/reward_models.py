"""How well a reward model's scores agree with labels, on held-out completions.

References:
  Calibration: Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 2.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from data_pipelines import pipeline
from data_pipelines.scoring import pages, statistics
from data_pipelines.storage import paths
from grpo_tpu.distributed import activity, sharding
from grpo_tpu.rl import pictures, score
from grpo_tpu.rl.experience import Collector

# Of the chance that the pair's higher score is the better completion's.
_BIN_EDGES = np.linspace(0.5, 1.0, 11)


def evaluate(
  collector: Collector, params: dict, batches: Iterable[pipeline.Batch]
) -> dict[str, Any]:
  """Scores labelled completions; returns `figures` of them, on every host."""
  sampler, rows = collector.sampler, list[dict[str, np.ndarray]]()
  for batch in activity.count_parts("evaluation", batches, unit="batches"):
    bundles = collector.labelled_completions(params, batch)
    bundles = pictures.with_num_encoded(bundles, sampler.mesh)
    scores = score.score_batch(
      sampler.forward, params, bundles, num_microbatches=1
    )
    own = {
      "scores": scores,
      "labels": bundles.labels,
      "lengths": bundles.completion_mask.sum(axis=-1),
    }
    own = sharding.local_rows(sampler.mesh, own)
    is_problem = np.array([bool(x.pid) for x in batch.problems])
    own |= {"skipped": is_problem & ~batch.valid}
    rows.append(sharding.all_rows(sampler.mesh, own))
  return figures(**{k: np.concatenate([x[k] for x in rows]) for k in rows[0]})


def figures(
  scores: np.ndarray,
  labels: np.ndarray,
  lengths: np.ndarray,
  skipped: np.ndarray,
) -> dict[str, Any]:
  """The figures of an evaluation, and its `eval/` metrics as `scalars`.

  A pair is two completions of a problem with different labels.

  Args:
    scores: float [problems, C].
    labels: float [problems, C], NaN for a missing completion.
    lengths: int [problems, C], in tokens.
    skipped: bool [problems], True for a problem that could not be read.
  """
  scores = scores.astype(np.float64)
  problem, better, worse = np.nonzero(labels[:, :, None] > labels[:, None, :])
  is_present, num_pairs = ~np.isnan(labels), len(problem)
  in_pair = np.zeros_like(is_present)
  in_pair[problem, better] = in_pair[problem, worse] = True
  scalars = {"eval/pairwise_count": num_pairs}
  found: dict[str, Any] = {
    "skipped": int(skipped.sum()),
    "unpaired_completions": int((is_present & ~in_pair).sum()),
  }
  if num_pairs:
    margin = scores[problem, better] - scores[problem, worse]
    longer = lengths[problem, better] - lengths[problem, worse]
    accuracy, longer = (_clustered(_wins(x), problem) for x in (margin, longer))
    curve = reliability(margin)
    scalars |= {
      "eval/pairwise_accuracy": accuracy["share"],
      "eval/pairwise_accuracy_low": accuracy["low"],
      "eval/pairwise_accuracy_high": accuracy["high"],
      "eval/pairwise_longer_accuracy": longer["share"],
      "eval/pairwise_margin": margin.mean(),
      "eval/pairwise_calibration_error": calibration_error(curve),
      "eval/score_mean": scores[is_present].mean(),
      "eval/score_std": scores[is_present].std(),
      "eval/score_length_correlation": _correlation(
        scores, lengths, is_present
      ),
    }
    found |= {"accuracy": accuracy, "longer": longer, "reliability": curve}
  return found | {"scalars": {k: float(x) for k, x in scalars.items()}}


def reliability(margin: np.ndarray) -> list[dict[str, float]]:
  """The reliability curve of pairs: their share right by predicted chance.

  The model gives the higher score of a pair the chance sigmoid(|margin|) to be
  the better completion's. Each bin that has `pairs` has their mean `predicted`
  chance, and the share that is `right`, where a tie is a half.
  """
  predicted = 1.0 / (1.0 + np.exp(-np.abs(margin)))
  number = np.searchsorted(_BIN_EDGES[1:-1], predicted, side="right")
  bins = []
  for index, (low, high) in enumerate(
    zip(_BIN_EDGES[:-1], _BIN_EDGES[1:], strict=True)
  ):
    if (inside := number == index).any():
      means = predicted[inside].mean(), _wins(margin[inside]).mean()
      values = low, high, inside.sum(), *means
      names = ("low", "high", "pairs", "predicted", "right")
      bins.append(dict(zip(names, map(float, values), strict=True)))
  return bins


def calibration_error(curve: list[dict[str, float]]) -> float:
  """The expected calibration error of a reliability curve, over its pairs."""
  gaps = [x["pairs"] * abs(x["right"] - x["predicted"]) for x in curve]
  return sum(gaps) / sum(x["pairs"] for x in curve)


def write(
  figures: Mapping[str, Any], folder: epath.Path, facts: Mapping[str, Any]
) -> None:
  """Writes `scores.json` and the report; see `outputs.write` for `facts`."""
  paths.make_folder(folder)
  found = {**facts, **figures}
  text = json.dumps(found, indent=2) + "\n"
  paths.write_whole(folder / "scores.json", text.encode())
  for name in ("report.md", "report.html"):
    template = f"reward_model_{name}.j2"
    page = pages.render(template, package="grpo_tpu.evaluation", scores=found)
    paths.write_whole(folder / name, page.encode())
  split = f"{facts['set']} {facts['split']}".strip()
  accuracy = "no pair of completions with different labels"
  if "accuracy" in found:
    accuracy = f"pairwise accuracy {pages.figure(found['accuracy'])}"
  logging.info("%s: %s; report: %s", split, accuracy, folder / "report.html")


def _wins(difference: np.ndarray) -> np.ndarray:
  """1 where the better completion is ahead, a half for a tie."""
  return 0.5 * (1.0 + np.sign(difference))


def _clustered(wins: np.ndarray, problem: np.ndarray) -> dict[str, Any]:
  _, number = np.unique(problem, return_inverse=True)
  sizes = np.bincount(number)
  return statistics.clustered_share(np.bincount(number, wins), sizes)


def _correlation(
  scores: np.ndarray, lengths: np.ndarray, is_present: np.ndarray
) -> float:
  """Pearson's correlation within problems; 0 if nothing varies."""
  count = np.maximum(is_present.sum(axis=1, keepdims=True), 1)
  x, y = (np.where(is_present, each, 0.0) for each in (scores, lengths))
  x, y = (
    np.where(is_present, each - each.sum(axis=1, keepdims=True) / count, 0.0)
    for each in (x, y)
  )
  norm = np.sqrt(np.square(x).sum() * np.square(y).sum())
  return float((x * y).sum() / norm) if norm > 0 else 0.0
