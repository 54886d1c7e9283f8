"""Counts the records of a batch, and splits its rewards by data set."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data_pipelines import pipeline


def set_metrics(
  gather: Callable[[Any], Any],
  prompts: pipeline.Batch,
  rewards: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, float]:
  """The `data/` metrics of a step: `gather` gives the rows of all processes.

  `rewards` hold the values of this process's completions, and where they count;
  each [rows, completions].
  """
  own = {"valid": prompts.valid, "sets": dict(prompts.sets), "rewards": rewards}
  rows = gather(own)
  valid = rows["valid"]
  metrics: dict[str, float] = {"data/skipped": int((~valid).sum())}
  for name, inside in rows["sets"].items():
    metrics[f"data/{name}/share"] = float(inside.mean())
    metrics[f"data/{name}/skipped"] = int((inside & ~valid).sum())
    for reward, (values, counts) in (rows["rewards"] or {}).items():
      if (counts & inside[:, None]).any():
        mean = values[counts & inside[:, None]].mean(dtype=np.float64)
        metrics[f"data/{name}/{reward}"] = float(mean)
  return metrics
