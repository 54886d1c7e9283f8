"""The card of an export: README.md, with the facts that the runs recorded.

It names folders without their paths, so an export does not show where it was
made.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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

  workdir: pathlib.Path
  step: int | None
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
    workdir, step = load.split_run(weights.removeprefix("run:"))
    try:
      record = untrusted.read_json(pathlib.Path(workdir) / "run.json")
      weights = untrusted.get_field(record, "weights", str, "run.json")
    except (OSError, ValueError):
      break
    stages.append(Stage(pathlib.Path(workdir), step, record))
  return stages, weights


def render(
  model: ModelSettings, stages: Sequence[Stage], origin: str, adapter: bool
) -> str:
  """The card, as Markdown with the front matter of the Hugging Face Hub.

  Args:
    model: The settings of the model.
    stages: The runs behind it, the newest first.
    origin: The weights that the first of them started from.
    adapter: True for adapters alone.
  """
  scheme, _, path = origin.partition(":")
  start = origin if scheme == "random" else pathlib.PurePath(path).name
  # The sizes of Gemma 3 that are released, and their folders as downloaded.
  is_released = bool(model.hub_name) and scheme != "random"
  base = f"google/{start}" if start.startswith("gemma-3-") else ""
  newest = stages[0] if stages else None
  return pages.render(
    "model_card.md.j2",
    package="grpo_tpu.checkpoint",
    model=model,
    stages=stages[::-1],
    start=start,
    base=base if is_released and scheme == "hf" else "",
    is_released=is_released,
    adapter=adapter,
    data=[(x.workdir.name, _data_sets(x)) for x in stages[::-1]],
    accuracies=_accuracies(newest, _data_sets(newest)) if newest else {},
    prompt=_prompt(newest) if newest else {},
    lora=next((x for x in stages if x.get("model.lora.rank")), None),
  )


def _prompt(stage: Stage) -> dict[str, str]:
  """The texts that prompts added to the question."""
  name = str(stage.get("data.prompt_template"))
  template = chat_prompts.TEMPLATES.get(name)
  return {
    "template": pathlib.PurePath(name).name,
    "instruction": template.instruction if template else "",
    "system": str(stage.get("data.system_prompt") or ""),
  }


def _data_sets(stage: Stage) -> list[dict[str, Any]]:
  """Name, share and manifest of each data set of a run."""
  saved = stage.get("data") or {}
  try:
    folder, dirs = recorded_dirs(saved, "the record of the run")
  except ValueError:
    return []
  folders = dirs or ((folder or str(stage.workdir / "data"), 1.0),)
  total = sum(weight for _, weight in folders)
  sets = []
  for each, weight in folders:
    path = pathlib.Path(each)
    try:
      manifest = untrusted.read_json(path / "manifest.json")
    except (OSError, ValueError):
      manifest = {}
    source = str(manifest.get("source") or "not known")
    if "/" in source:
      source = pathlib.PurePath(source).name
    known = {x: manifest.get(x) or "" for x in ("fingerprint", "terms")}
    counts = manifest.get("counts") or {}
    share = {"name": path.name, "share": weight / total, "source": source}
    sets.append(share | known | {"counts": counts})
  return sets


def _accuracies(
  stage: Stage, data: Sequence[Mapping[str, Any]]
) -> dict[str, dict[int, str]]:
  """Accuracy by metric and step: at the start, at this step, last before it."""
  try:
    path = stage.workdir / "metrics.jsonl"
    text = untrusted.read_bytes(path, _MAX_METRICS_BYTES)
    rows = {row["step"]: row for row in map(json.loads, text.splitlines())}
    last = stage.step or 0
    evaluated = [x for x in rows if x <= last and "eval/accuracy" in rows[x]]
  except (OSError, ValueError, TypeError, KeyError):
    return {}
  steps = sorted({0, last, max(evaluated, default=0)})
  sets = [f"eval/accuracy/{each[0]}" for each in stage.get("eval.sets") or ()]
  counts = [x["counts"].get(stage.get("data.eval_split"), 0) for x in data]
  problems = {
    "eval/accuracy": min(stage.get("eval.num_problems") or 0, sum(counts))
  }
  return {
    name: {
      step: _figure(rows.get(step, {}).get(name), problems.get(name, 0))
      for step in steps
    }
    for name in ("eval/accuracy", *sets)
  }


def _figure(value: Any, problems: int) -> str:
  """An accuracy, with its interval if the number of problems is known."""
  if not isinstance(value, float):
    return "not measured"
  if not problems:
    return f"{100 * value:.1f} %"
  return pages.figure(statistics.share(value * problems, problems))
