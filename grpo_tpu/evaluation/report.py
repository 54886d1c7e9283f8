"""The report of an evaluation, as a Markdown page and as an HTML page.

Pure: takes figures and examples, returns strings; see `pages`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.scoring import pages


@dataclasses.dataclass(frozen=True)
class Example:
  """One answer to show."""

  record: Mapping[str, Any]  # In MathVista's results format.
  outcome: str  # One of `scores.OUTCOMES`.
  num_samples: int  # The number of sampled answers to the same problem.
  samples_right: int
  images: tuple[bytes, ...]  # Encoded.


def line(scores: Mapping[str, Any]) -> str:
  """The greedy accuracy in one line."""
  split = " ".join(filter(None, (scores["set"], scores["split"])))
  if not scores["accuracy"]:
    return f"{split}: {scores['note']}"
  return f"{split}: greedy accuracy {pages.figure(scores['accuracy'])}"


def render(
  name: str,
  scores: Mapping[str, Any],
  worst: Sequence[Mapping[str, Any]],
  examples: Sequence[Example],
) -> str:
  """Renders "report.md", which has no images, or "report.html".

  `scores` are the contents of `eval/scores.json`, `worst` the slices to list
  first.
  """
  slices: dict[str, list[Mapping[str, Any]]] = {}
  for row in scores.get("slices", ()):
    slices.setdefault(row["dimension"], []).append(row)
  return pages.render(
    f"{name}.j2",
    package="grpo_tpu.evaluation",
    scores=scores,
    worst=worst,
    slices=slices,
    examples=examples,
  )
