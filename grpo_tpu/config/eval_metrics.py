"""The metrics of a run's evaluations, and the settings that may name one.

The names follow from the settings alone, so a wrong one is refused at once.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from data_pipelines import records
from data_pipelines.settings import DataConfig
from data_pipelines.sources import mixtures
from data_pipelines.validation import require
from grpo_tpu.checkpoint.settings import CheckpointConfig
from grpo_tpu.config.sections import EvalConfig, TrainConfig
from grpo_tpu.observability import registry

# Beginnings of the names that only a reward model's evaluation writes.
_OF_SCORES = ("eval/pairwise_", "eval/score_")
# Buckets of reward margins with their lower edges.
MARGIN_BUCKETS = {
  "margin_0.0_to_0.25": 0.0,
  "margin_0.25_to_0.5": 0.25,
  "margin_0.5_to_0.75": 0.5,
  "margin_0.75_and_more": 0.75,
}


def of_set(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
  """The metrics of one of `eval.sets`, without slices, by their full names."""
  if not name:
    return dict(metrics)
  return {f"{k}/{name}": x for k, x in metrics.items() if k.count("/") == 1}


def names(
  evaluation: EvalConfig, data: DataConfig, *, is_reward_model: bool = False
) -> list[str]:
  """All names that the evaluations of a run may write."""
  declared = [metric.name for metric in registry.metrics()]
  plain = [x for x in declared if x.startswith("eval/") and "{" not in x]
  plain = [x for x in plain if x.startswith(_OF_SCORES) == is_reward_model]
  pairs = [x for x in plain if "preference" in x]
  plain = [x for x in plain if x not in pairs]
  if (count := evaluation.num_samples) and not is_reward_model:
    plain.append(f"eval/mean_at_{count}")
    plain += [f"eval/pass_at_{k}" for k in evaluation.pass_ks]
  found = list(plain)
  for name, *_ in evaluation.sets:
    found += of_set(dict.fromkeys(plain), name)
  if is_reward_model:
    return found
  slices = (*records.QUESTION_TYPES, *records.ANSWER_TYPES)
  found += [f"eval/accuracy/{x}" for x in (*slices, *data_set_names(data))]
  if data.kind == "preference":
    margin = "eval/implicit_preference_accuracy"
    found += [*pairs, *(f"{margin}/{bucket}" for bucket in MARGIN_BUCKETS)]
  return found


def data_set_names(data: DataConfig) -> list[str]:
  """The names of the data sets of a mixture in metrics."""
  folders = [folder for folder, _ in data.weighted_dirs]
  return mixtures.names(folders) if len(folders) > 1 else []


def targets(
  train: TrainConfig, checkpoint: CheckpointConfig
) -> list[tuple[str, str, str]]:
  """The setting, its value and the metric of each setting that names one."""
  rule, best = train.stop_rule, checkpoint.best_metric
  found = [("checkpoint.best_metric", best, best)] if best else []
  if rule:
    found.append(("train.stop_when", train.stop_when, rule.metric))
  return found


def check(
  evaluation: EvalConfig,
  data: DataConfig,
  train: TrainConfig,
  checkpoint: CheckpointConfig,
  *,
  is_reward_model: bool,
) -> None:
  """Refuses names of sets that mean two things, and metrics never written."""
  taken = {name for name, *_ in evaluation.sets} & {*data_set_names(data)}
  rule = f"not take a name of the data sets of data.dirs, {', '.join(taken)}"
  require(not taken, "eval.sets", evaluation.sets, rule, "rename the set")
  written = []
  if evaluation.every_steps:
    written = names(evaluation, data, is_reward_model=is_reward_model)
  for setting, value, metric in targets(train, checkpoint):
    if metric not in written:
      close = difflib.get_close_matches(metric, written, n=1)
      question = f"; did you mean {close[0]}?" if close else "."
      listed = ", ".join(written) or "none, because eval.every_steps is 0"
      raise ValueError(
        f"{setting} ({value!r}) must name a metric that the evaluations of "
        f"this run write: {listed}{question}"
      )
