"""Writes the files of an evaluation: results, `scores.json` and the report."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from data_pipelines import records
from data_pipelines.storage import paths
from grpo_tpu.config import sections
from grpo_tpu.evaluation import report, scores
from grpo_tpu.observability import sample_files

# The list of the worst slices; smaller slices say too little.
_WORST_SLICES, _MIN_PROBLEMS = 10, 5


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The completions of a split, from all hosts, in the order of the split.

  A problem that cannot be asked counts as answered wrongly.
  """

  scalars: dict[str, float]  # The `eval/` metrics.
  shown: list[sample_files.Sample]  # Some greedy completions, for people.
  greedy: list[scores.GradedCompletion]
  samples: list[list[scores.GradedCompletion]]  # One list per draw.
  # Greedy completions with ablated images, by name of the ablation.
  ablated: dict[str, list[scores.GradedCompletion]]

  def figures(self, ks: Sequence[int]) -> dict[str, Any]:
    """The figures of `scores.compute`, and the metrics as `scalars`."""
    figures = scores.compute(
      self.greedy, samples=self.samples, ks=ks, ablated=self.ablated
    )
    return figures | {"scalars": {k: float(x) for k, x in self.scalars.items()}}


def write(
  evaluation: Evaluation,
  folder: epath.Path,
  problems: records.Source,
  settings: sections.EvalConfig,
  facts: Mapping[str, Any],
) -> None:
  """Writes results files, figures and reports, with images of the problems.

  `facts` are the first fields of `scores.json`: `set`, "" for the run's own,
  `split`, `split_size`, `parts` (see `Dataset.eval_parts`), `model`, `weights`
  with the checkpoint's step, and `seed`.
  """
  split = facts["split"]
  files = {f"output_{split}.json": evaluation.greedy}
  for number, draw in enumerate(evaluation.samples):
    files[f"samples/output_{split}_{number:03}.json"] = draw
  for name, completions in evaluation.ablated.items():
    files[f"output_{split}_{name}.json"] = completions
  for name, completions in files.items():
    records_by_pid = {each.record["pid"]: each.record for each in completions}
    write_json(folder / name, records_by_pid)
  temperature = settings.temperature if evaluation.samples else 0.0
  figures = {**facts, "temperature": temperature}
  figures |= evaluation.figures(settings.pass_ks)
  write_json(folder / "scores.json", figures)
  worst = scores.worst_slices(
    figures, count=_WORST_SLICES, min_problems=_MIN_PROBLEMS
  )
  examples = [
    make_example(completion, evaluation.samples, problems)
    for completion in scores.examples(evaluation.greedy, settings.num_examples)
  ]
  for name in ("report.md", "report.html"):
    page = report.render(name, figures, worst, examples)
    paths.write_whole(folder / name, page.encode())
  logging.info("%s; report: %s", report.line(figures), folder / "report.html")
  for part in facts["parts"]:
    logging.warning("%s", part)
  if (rest := facts["split_size"] - settings.num_problems) > 0:
    logging.warning(
      "eval.num_problems (%d) leaves out %d problems of %s.",
      *(settings.num_problems, rest, f"{facts['set']} {split}".strip()),
    )


def make_example(
  completion: scores.GradedCompletion,
  draws: Sequence[Sequence[scores.GradedCompletion]],
  problems: records.Source,
) -> report.Example:
  """An example of the report, with its images if they are readable."""
  try:
    images = problems[completion.index].images
  except (ValueError, OSError):
    images = ()
  same = [x for draw in draws for x in draw if x.index == completion.index]
  return report.Example(
    record=completion.record,
    outcome=completion.outcome,
    num_samples=len(same),
    samples_right=sum(x.is_right for x in same),
    images=images,
  )


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a file, and makes its folder."""
  paths.make_folder(path.parent)
  text = json.dumps(value, indent=2, ensure_ascii=False)
  paths.write_whole(path, f"{text}\n".encode())
