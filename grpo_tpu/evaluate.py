"""Greedy answers to held-out problems, and what they are worth."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from data_pipelines import pipeline
from grpo_tpu import config as run_config
from grpo_tpu import dataset, experience, metrics, sharding
from grpo_tpu import policy as policies
from grpo_tpu.rewards import scoring


@dataclasses.dataclass(frozen=True)
class Result:
  """What an evaluation found.

  Attributes:
    scalars: By the names of `metrics`; a problem that could not be asked counts
      as one answered wrongly.
    samples: Some completions of this host.
    records: This host's answers in MathVista's results format, by pid.
  """

  scalars: dict[str, metrics.Scalar]
  samples: list[metrics.Sample]
  records: dict[str, dict[str, Any]]


def evaluate(
  policy: policies.Policy,
  params: dict,
  batches: Iterable[pipeline.Batch],
  *,
  num_samples: int,
) -> Result:
  """Decodes one greedy completion for each problem and scores it."""
  sums: collections.Counter[str] = collections.Counter()
  samples, records = [], {}
  for batch in batches:
    completions = policy.sample(
      params, batch, jax.random.key(0), num_completions=1, temperature=0.0
    )
    texts = policy.texts(completions)
    scores = scoring.score(
      [group[0] for group in texts], batch.problems, policy.config.rewards
    )
    mask, stopped = sharding.local_rows(
      policy.mesh, (completions.mask, completions.stopped)
    )
    sums.update(_sums(batch, scores, mask, stopped))
    records |= _records(batch, texts, scores)
    samples += experience.samples(
      policy, batch, texts, scores, num_samples - len(samples)
    )
  totals = _over_hosts(sums)
  return Result(_scalars(totals), samples, records)


def run(config: run_config.Config, workdir: str, data: dataset.Dataset) -> None:
  """Evaluates `model.weights` on the held-out split and writes what it found.

  Raises:
    SettingError: A setting that only devices or the weights can refute.
  """
  with run_config.refutable():
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    policy = policies.Policy(config, mesh, data.tokenizer)
    params = policy.initial_params()
  shard_index, shard_count = sharding.data_shard(mesh)
  with jax.set_mesh(mesh):
    result = evaluate(
      policy,
      params,
      data.eval_batches(
        config, shard_index=shard_index, shard_count=shard_count
      ),
      num_samples=0,
    )
  if jax.process_index() == 0:
    write(result, workdir, config.data.eval_split)
  logging.info(
    "%s: accuracy %.4f", config.data.eval_split, result.scalars["eval/accuracy"]
  )


def write(result: Result, workdir: str, split: str) -> None:
  """Writes `eval/output_<split>.json` and `eval/scores.json`."""
  folder = pathlib.Path(workdir) / "eval"
  folder.mkdir(parents=True, exist_ok=True)
  scalars = {k: float(v) for k, v in result.scalars.items()}
  for name, value in (
    (f"output_{split}.json", result.records),
    ("scores.json", scalars),
  ):
    (folder / name).write_text(
      json.dumps(value, indent=2, ensure_ascii=False) + "\n",
      encoding="utf-8",
    )


_SLICES = ("multi_choice", "free_form", "integer", "float", "text", "list")


def _sums(batch, scores, mask, stopped) -> dict[str, float]:
  """What adds up over batches and hosts, in one order whatever the data."""
  # Padding has no pid; a damaged record has one, and counts as wrong.
  counts = np.array([bool(p.pid) for p in batch.problems])
  # A user's reward that fails says nothing about the answer.
  asked = counts & batch.valid & ~scores.failed["accuracy"]
  accuracy = np.where(asked, scores.components["accuracy"], 0.0)
  sums = {
    "problems": counts.sum(),
    "asked": asked.sum(),
    "accuracy": accuracy.sum(),
    "format": np.where(asked, scores.components["format"], 0.0).sum(),
    "reward": np.where(asked, scores.total, 0.0).sum(),
    "completion_length": mask[:, 0].sum(-1)[asked].sum(),
    "truncated_fraction": (~stopped[:, 0])[asked].sum(),
  }
  for name in _SLICES:
    inside = counts & np.array(
      [name in (p.question_type, p.answer_type) for p in batch.problems]
    )
    sums[f"problems/{name}"] = inside.sum()
    sums[f"accuracy/{name}"] = accuracy[inside].sum()
  return {name: float(value) for name, value in sums.items()}


def _over_hosts(sums: collections.Counter[str]) -> dict[str, float]:
  names = list(sums)
  local = jnp.asarray([sums[name] for name in names], jnp.float32)
  gathered = np.asarray(multihost_utils.process_allgather(local))
  totals = gathered.reshape(-1, len(names)).sum(axis=0)
  return dict(zip(names, totals.tolist(), strict=True))


def _scalars(totals: dict[str, float]) -> dict[str, metrics.Scalar]:
  problems, asked = max(totals["problems"], 1), max(totals["asked"], 1)
  scalars: dict[str, metrics.Scalar] = {
    "eval/accuracy": totals["accuracy"] / problems,
    "eval/format": totals["format"] / problems,
    "eval/reward": totals["reward"] / problems,
    "eval/completion_length": totals["completion_length"] / asked,
    "eval/truncated_fraction": totals["truncated_fraction"] / asked,
  }
  for name in _SLICES:
    if totals[f"problems/{name}"]:
      scalars[f"eval/accuracy/{name}"] = (
        totals[f"accuracy/{name}"] / totals[f"problems/{name}"]
      )
  return scalars


def _records(batch, texts, scores) -> dict[str, dict[str, Any]]:
  """MathVista's results format, its image left out."""
  return {
    problem.pid: {
      "pid": problem.pid,
      "question": problem.question,
      "image": problem.image_path,
      "choices": list(problem.choices) or None,
      "unit": problem.unit or None,
      "precision": problem.precision if problem.precision >= 0 else None,
      "answer": problem.answer,
      "question_type": problem.question_type,
      "answer_type": problem.answer_type,
      "metadata": dict(problem.metadata),
      "query": problem.query,
      "response": texts[row][0] if batch.valid[row] else "",
      "extraction": scores.answers[row] if batch.valid[row] else None,
      "prediction": scores.answers[row] if batch.valid[row] else None,
      "true_false": bool(
        batch.valid[row] and scores.components["accuracy"][row] > 0.5
      ),
    }
    for row, problem in enumerate(batch.problems)
    if problem.pid
  }
