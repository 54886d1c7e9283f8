"""How well a reward model's scores agree with labels, on held-out completions.

References:
  Clustered shares: Korn and Graubard 1998, Survey Methodology 24, 193-201.
  Calibration: Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 2.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from data_pipelines import pipeline
from data_pipelines.scoring import pages, statistics
from data_pipelines.storage import paths
from grpo_tpu.distributed import activity, sharding
from grpo_tpu.evaluation import outputs
from grpo_tpu.rl import pictures, score
from grpo_tpu.rl.experience import Collector

_NUM_BINS = 10


def evaluate(
  collector: Collector, params: dict, batches: Iterable[pipeline.Batch]
) -> dict[str, Any]:
  """Scores labelled completions; returns `figures` of them, on every host."""
  sampler, rows = collector.sampler, list[dict[str, np.ndarray]]()
  for batch in activity.count_parts("evaluation", batches, unit="batches"):
    bundles = collector.labelled_completions(params, batch)
    bundles = pictures.with_num_encoded(bundles, sampler.mesh)
    own = {
      "scores": score.score_batch(
        sampler.forward, params, bundles, num_microbatches=1
      ),
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

  A pair is two completions of a problem with different labels. Scores, labels
  (NaN for a missing completion) and lengths are [problems, C]; `skipped`
  [problems] is True for a problem that could not be read.
  """
  problem, better, worse = np.nonzero(labels[:, :, None] > labels[:, None, :])
  is_present = ~np.isnan(labels)
  in_pair = np.zeros_like(is_present)
  in_pair[problem, better] = in_pair[problem, worse] = True
  found: dict[str, Any] = {
    "skipped": int(skipped.sum()),
    "unpaired_completions": int((is_present & ~in_pair).sum()),
    "scalars": {"eval/pairwise_count": float(len(problem))},
  }
  if not len(problem):
    return found
  scores = scores.astype(np.float64)
  margin = scores[problem, better] - scores[problem, worse]
  longer = (lengths[problem, better] - lengths[problem, worse]).astype(float)
  norm = np.sqrt(np.square(margin).sum() * np.square(longer).sum())
  accuracy, curve = _share(margin, problem), reliability(margin)
  gaps = [x["pairs"] * abs(x["right"] - x["predicted"]) for x in curve]
  found |= {"accuracy": accuracy, "longer": _share(longer, problem)}
  scalars = {
    "pairwise_accuracy": accuracy["share"],
    "pairwise_accuracy_low": accuracy["low"],
    "pairwise_accuracy_high": accuracy["high"],
    "pairwise_longer_accuracy": found["longer"]["share"],
    "pairwise_margin": margin.mean(),
    "pairwise_calibration_error": sum(gaps) / len(problem),
    "score_mean": scores[is_present].mean(),
    "score_std": scores[is_present].std(),
    # Of the differences in pairs, whose signs mean nothing.
    "score_length_correlation": (margin @ longer) / norm if norm else 0.0,
  }
  found["scalars"] |= {f"eval/{k}": float(x) for k, x in scalars.items()}
  return found | {"reliability": curve}


def reliability(margin: np.ndarray) -> list[dict[str, float]]:
  """The reliability curve of pairs, in ten bins of the predicted chance.

  The model gives the higher score of a pair the chance sigmoid(|margin|) to be
  the better completion's. Each bin with `pairs` has their mean `predicted`
  chance, and the share that is `right`, where a tie is a half.
  """
  predicted, wins = 1 / (1 + np.exp(-np.abs(margin))), (1 + np.sign(margin)) / 2
  edges = np.linspace(0.5, 1.0, _NUM_BINS + 1)
  number = np.searchsorted(edges[1:-1], predicted, side="right")
  return [
    {
      "low": float(edges[i]),
      "high": float(edges[i + 1]),
      "pairs": float((number == i).sum()),
      "predicted": float(predicted[number == i].mean()),
      "right": float(wins[number == i].mean()),
    }
    for i in np.unique(number)
  ]


def write(
  figures: Mapping[str, Any], folder: epath.Path, facts: Mapping[str, Any]
) -> None:
  """Writes `scores.json` and the report; see `outputs.write` for `facts`."""
  found = {**facts, **figures}
  outputs.write_json(folder / "scores.json", found)
  for name in ("report.md", "report.html"):
    page = pages.render(
      f"reward_model_{name}.j2", package="grpo_tpu.evaluation", scores=found
    )
    paths.write_whole(folder / name, page.encode())
  accuracy = found.get("accuracy")
  shown = pages.figure(accuracy) if accuracy else "none, for want of pairs"
  split = f"{facts['set']} {facts['split']}".strip()
  text = "%s: pairwise accuracy %s; report: %s"
  logging.info(text, split, shown, folder / "report.html")


def _share(difference: np.ndarray, problem: np.ndarray) -> dict[str, Any]:
  """The share of pairs with a positive difference; 0 is half a win.

  Pairs of a problem are not independent, so the 95 % Wilson interval takes
  their effective number: as many independent ones as have the variance that the
  problems show; where all end alike, the number of problems.
  """
  wins = (1 + np.sign(difference)) / 2
  _, number = np.unique(problem, return_inverse=True)
  won, sizes = np.bincount(number, wins), np.bincount(number)
  value, count = wins.mean(), len(sizes)
  squares = np.square(won - value * sizes).sum() * count / max(count - 1, 1)
  if squares > 0:
    effective = value * (1 - value) * len(wins) ** 2 / squares
    count = round(np.clip(effective, 1, len(wins)))
  found = statistics.share(float(value * count), count)
  about = {"pairs": len(wins), "problems": len(sizes), "share": float(value)}
  return found | about
