"""The report of an evaluation, as a Markdown page and as an HTML page.

Pure: takes figures and examples, returns strings; see `pages`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.scoring import pages

_ABLATIONS = {
  "removed": "a plain grey image instead",
  "shuffled": "the image of another problem",
}
_OUTCOMES = {
  "right": "right",
  "wrong": "wrong",
  "no answer": "no answer found",
  "cut off": "truncated before an answer",
  "not asked": "not asked: damaged, or too long",
}


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
    rows=_overall_rows(scores) if scores["accuracy"] else [],
    worst=worst,
    slices=slices,
    outcomes=_OUTCOMES,
    examples=examples,
  )


def _overall_rows(
  scores: Mapping[str, Any],
) -> list[tuple[str, str, Mapping[str, Any]]]:
  """The name, note and figure of each row of the first table."""
  rows = [("Greedy", "", scores["accuracy"])]
  rows += [
    (f"Image {name}", _ABLATIONS[name], ablation["accuracy"])
    for name, ablation in scores["ablations"].items()
  ]
  for each in scores["official"].values():
    note = "by the set's own rule, on the whole response"
    rows.append((f"Official: {each['title']}", note, each))
  if sampled := scores.get("sampled"):
    note = f"mean of {sampled['num_samples']}"
    rows.append(("One sample", note, sampled["accuracy"]))
    for name, note, figures in (
      ("pass", "at least one is right", sampled["pass_at_k"]),
      ("maj", "the most frequent answer is right", sampled["maj_at_k"]),
    ):
      # For k = 1 both equal the accuracy of one sample.
      rows += [(f"{name}@{k}", note, x) for k, x in figures.items() if k != "1"]
  return rows
