"""Grades the completions of a batch: sums for metrics, records for files."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from data_pipelines import pipeline, records
from data_pipelines.scoring import results
from data_pipelines.scoring.official import rules
from grpo_tpu.evaluation import scores
from grpo_tpu.rewards import scoring

_TYPES = (*records.QUESTION_TYPES, *records.ANSWER_TYPES)


def metric_columns(
  batch: pipeline.Batch,
  rewards: scoring.Scores,
  mask: Bool[np.ndarray, "rows T"],
  stopped: Bool[np.ndarray, " rows"],
  *,
  rewards_unchecked: bool,
) -> dict[str, Float[np.ndarray, " rows"]]:
  """The summands of the metrics, of one completion per problem.

  Padding rows have no pid. `stopped` completions ended by themselves. If it
  `rewards_unchecked`, a user's reward needs no public answer.
  """
  problems = np.array([bool(p.pid) for p in batch.problems])
  # A failure of a user's reward says nothing about the answer.
  asked = problems & batch.valid & ~rewards.failed["accuracy"]
  public = np.array([p.is_checkable for p in batch.problems])
  # An unreadable problem counts as wrong, although its answer is unknown.
  graded = problems & (public | ~_is_readable(batch))
  accuracy = graded & _is_right(batch, rewards)
  rewarded = problems if rewards_unchecked else graded
  columns = {
    "problems": problems,
    "public": public,
    "graded": graded,
    "asked": asked,
    "accuracy": accuracy,
    "format": np.where(asked, rewards.components["format"], 0.0),
    "rewarded": rewarded,
    "reward": np.where(asked & rewarded, rewards.total, 0.0),
    "completion_length": np.where(asked, mask.sum(-1), 0),
    "truncated_fraction": asked & ~stopped,
  }
  types = np.array([(p.question_type, p.answer_type) for p in batch.problems])
  slices = {name: (types == name).any(1) for name in _TYPES}
  for name, inside in {**batch.sets, **slices}.items():
    columns[f"graded/{name}"] = graded & inside
    columns[f"accuracy/{name}"] = accuracy & inside
  return {name: rows.astype(np.float32) for name, rows in columns.items()}


def metrics(sums: Mapping[str, float]) -> dict[str, float]:
  """The `eval/` metrics from the sums of all columns of `metric_columns`.

  Accuracy is missing if no answer is public, and so is the reward unless one
  needs none.
  """
  problems, asked = max(sums["problems"], 1), max(sums["asked"], 1)
  scalars = {
    "eval/format": sums["format"] / problems,
    "eval/completion_length": sums["completion_length"] / asked,
    "eval/truncated_fraction": sums["truncated_fraction"] / asked,
  }
  if sums["public"] or sums["rewarded"] > sums["graded"]:
    scalars["eval/reward"] = sums["reward"] / sums["rewarded"]
  if not sums["public"]:
    return scalars
  scalars["eval/accuracy"] = sums["accuracy"] / sums["graded"]
  for name, total in sums.items():
    prefix, _, inside = name.partition("/")
    if prefix == "graded" and inside and total:
      scalars[f"eval/accuracy/{inside}"] = sums[f"accuracy/{inside}"] / total
  return scalars


def pair_accuracies(
  parts: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, float]:
  """How often a network prefers a right completion to a wrong one.

  The area under the ROC curve, ties half, over the rows of all parts with a
  finite score. Missing without a right and a wrong completion.
  """
  metrics, names = {}, parts[0].keys() if parts else ()
  rows = {k: np.concatenate([x[k] for x in parts]) for k in names}
  for name in (x for x in names if x.startswith("eval/")):
    counts = (rows["graded"] * rows["asked"] > 0) & np.isfinite(rows[name])
    right = rows[name][counts & (rows["accuracy"] > 0)]
    wrong = np.sort(rows[name][counts & (rows["accuracy"] <= 0)])
    if len(right) and len(wrong):
      ranks = [np.searchsorted(wrong, right, x) for x in ("left", "right")]
      metrics[name] = float(np.mean(ranks) / len(wrong))
  return metrics


def graded_completions(
  batch: pipeline.Batch,
  texts: list[str],
  rewards: scoring.Scores,
  stopped: np.ndarray,
) -> list[scores.GradedCompletion]:
  """The graded completion of each problem, without padding rows."""
  is_right, is_readable = _is_right(batch, rewards), _is_readable(batch)
  completions = []
  for row, problem in enumerate(batch.problems):
    if not problem.pid:
      continue
    asked = bool(batch.valid[row])
    is_graded = problem.is_checkable or not is_readable[row]
    # A record in MathVista's results format, without its image and without
    # what MathVista's own programs add.
    record = {
      "pid": problem.pid,
      "question": problem.question,
      "image": problem.image_path,
      "choices": list(problem.choices) or None,
      "unit": problem.unit or None,
      "precision": problem.precision if problem.precision >= 0 else None,
      "answer": problem.answer,
      "question_type": problem.question_type,
      "answer_type": problem.answer_type,
      "metadata": dict(problem.metadata) or results.NO_METADATA,
      "query": problem.query,
      "response": texts[row] if asked else "",
      "official_rule": rules.name_of(problem),
      **results.strict_fields(
        problem,
        rewards.answers[row] if asked else None,
        bool(is_right[row]) if is_graded else None,
      ),
    }
    if asked and not stopped[row]:
      record["truncated"] = True
    if problem.aliases:
      record["aliases"] = list(problem.aliases)
    if problem.tolerance:
      record["tolerance"] = problem.tolerance
    completions.append(
      scores.GradedCompletion(
        index=int(batch.prompt_index[row]),
        record=record,
        asked=asked,
        stopped=bool(stopped[row]),
      )
    )
  return completions


def _is_readable(batch: pipeline.Batch) -> np.ndarray:
  """bool [rows], False where the row replaces a damaged record."""
  return np.array([bool(p.question) for p in batch.problems])


def _is_right(batch: pipeline.Batch, rewards: scoring.Scores) -> np.ndarray:
  return batch.valid & (rewards.components["accuracy"] > 0.5)
