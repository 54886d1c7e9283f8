"""The card of an export: README.md, with the facts that the runs recorded.

It has the names of folders and never their paths.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from data_pipelines.scoring import pages, statistics
from data_pipelines.settings import recorded_dirs
from data_pipelines.text import chat_prompts, untrusted
from grpo_tpu.checkpoint import load
from grpo_tpu.models.settings import ModelSettings

NAME = "README.md"
_MAX_RUNS = 100
_MAX_METRICS_BYTES = 2**30


class Stage(NamedTuple):
  """A run behind some weights."""

  workdir: epath.Path
  step: int
  record: Mapping[str, Any]  # Its run.json.

  def get(self, name: str) -> Any:
    """The value of a setting such as "optimizer.learning_rate"; or None."""
    value: Any = self.record.get("config")
    for part in name.split("."):
      value = value.get(part) if isinstance(value, Mapping) else None
    return value


def read_stages(weights: str) -> tuple[list[Stage], str]:
  """The runs behind `model.weights`, the newest first, and their start.

  The start is the name of weights that are no run, or of a run without record.
  """
  stages: list[Stage] = []
  while weights.startswith("run:") and len(stages) < _MAX_RUNS:
    workdir, step = load.split_run(weights)
    try:
      record = untrusted.read_json(epath.Path(workdir) / "run.json")
      weights = untrusted.get_field(record, "weights", str, "run.json")
    except (OSError, ValueError):
      break
    stages.append(Stage(epath.Path(workdir), step, record))
  return stages, weights


def render(
  model: ModelSettings, stages: Sequence[Stage], origin: str, adapter: bool
) -> str:
  """The card, as Markdown with the front matter of the Hugging Face Hub.

  `adapter` is True for adapters alone.
  """
  scheme, _, path = origin.partition(":")
  start = origin if scheme == "random" else pathlib.PurePath(path).name
  is_released = bool(model.hub_name) and scheme != "random"
  size = model.hub_name.rpartition("/")[2].removesuffix("-it")
  has_name = scheme == "hf" and start in (size, f"{size}-it", f"{size}-pt")
  newest = stages[0] if stages else None
  template = newest and chat_prompts.TEMPLATES.get(
    newest.get("data.prompt_template")
  )
  metric = "eval/pairwise_accuracy" if model.head else "eval/accuracy"
  return pages.render(
    "model_card.md.j2",
    package="grpo_tpu.checkpoint",
    model=model,
    stages=stages[::-1],
    start=start,
    base=f"google/{start}" if has_name else "",
    is_released=is_released,
    adapter=adapter,
    data=[(x.workdir.name, _data_sets(x)) for x in stages[::-1]],
    metric=metric,
    accuracies=_accuracies(newest, metric) if newest else {},
    instruction=template.instruction if template else "",
    system=newest and newest.get("data.system_prompt"),
  )


def _data_sets(stage: Stage) -> list[dict[str, Any]]:
  """Name, share and manifest of each data set of a run."""
  try:
    settings = untrusted.check_kind(stage.get("data"), dict, "data")
    folder, dirs = recorded_dirs(settings, "the record of the run")
  except ValueError:
    return []
  dirs = dirs or ((folder or str(stage.workdir / "data"), 1.0),)
  sets = []
  for each, weight in dirs:
    path = epath.Path(each)
    try:
      manifest = untrusted.read_json(path / "manifest.json")
    except (OSError, ValueError):
      manifest = {}
    known = {x: manifest.get(x) or "" for x in ("fingerprint", "terms")}
    known["source"] = pathlib.PurePath(str(manifest.get("source") or "")).name
    counts = manifest.get("counts")
    known["counts"] = counts if isinstance(counts, dict) else {}
    share = weight / sum(x for _, x in dirs)
    sets.append({"name": path.name, "share": share} | known)
  return sets


def _accuracies(stage: Stage, metric: str) -> dict[str, dict[int, str]]:
  """Accuracy by metric and step: at the start, at this step, last before it."""
  try:
    path = stage.workdir / "metrics.jsonl"
    lines = untrusted.read_bytes(path, _MAX_METRICS_BYTES).splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}
    last = stage.step
    evaluated = [x for x in rows if x <= last and metric in rows[x]]
    split = stage.get("data.eval_split")
    in_split = sum(x["counts"].get(split, 0) for x in _data_sets(stage))
    problems = min(stage.get("eval.num_problems") or 0, in_split)
    problems *= metric == "eval/accuracy"  # That of others is not known.
    sets = [f"eval/accuracy/{each[0]}" for each in stage.get("eval.sets") or ()]
    steps = sorted({0, last, max(evaluated, default=0)})
    return {
      name: {
        x: _figure(rows.get(x, {}).get(name), problems * (name not in sets))
        for x in steps
      }
      for name in (metric, *sets)
    }
  except (OSError, ValueError, TypeError, KeyError):  # Gone or damaged.
    return {}


def _figure(value: Any, problems: int) -> str:
  """An accuracy, with its interval if the number of problems is known."""
  if not isinstance(value, float):
    return "not measured"
  if not problems:
    return f"{100 * value:.1f} %"
  return pages.figure(statistics.share(value * problems, problems))
