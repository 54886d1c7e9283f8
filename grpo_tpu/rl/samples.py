"""Picks completions for people to look at."""

import dataclasses
import pickle

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines import pipeline
from grpo_tpu.distributed import collectives, sharding
from grpo_tpu.observability.writer import Sample
from grpo_tpu.rewards import scoring


def first_samples(
  mesh: Mesh,
  prompts: pipeline.Batch,
  texts: list[list[str]],
  scores: scoring.Scores,
  *,
  count: int,
) -> list[Sample]:
  """The first completion of each of the first `count` valid prompts.

  Every process gets the same samples, except that only the process that writes
  is sure to have their images.

  Args:
    mesh: The devices.
    prompts: The prompts of this process.
    texts: Their completions, one list per prompt.
    scores: Their rewards, completion by completion.
    count: Number of samples, over all processes.
  """
  if not count:
    return []
  is_valid = sharding.all_rows(mesh, prompts.valid)
  rows = sharding.process_rows(mesh, len(is_valid), jax.process_index())
  chosen = np.flatnonzero(is_valid)[:count].tolist()
  width = len(texts[0])
  own = {
    row: Sample(
      pid=prompts.problems[i].pid,
      prompt=prompts.problems[i].query,
      completion=texts[i][0],
      answer=prompts.problems[i].answer,
      reward=float(scores.total[i * width]),
      rewards={
        name: float(values[i * width])
        for name, values in scores.components.items()
      },
      image=prompts.images[i, 0] if prompts.images.shape[1] else None,
    )
    for i, row in enumerate(rows)
    if row in chosen
  }
  # Images are large, and the process that writes mostly has its own.
  writer_rows = sharding.process_rows(mesh, len(is_valid), 0)
  sent = {
    row: dataclasses.replace(sample, image=None)
    if row in writer_rows
    else sample
    for row, sample in own.items()
  }
  everywhere = {
    row: sample
    for process in collectives.gather_bytes(pickle.dumps(sent))
    for row, sample in pickle.loads(process).items()
  }
  return [(everywhere | own)[row] for row in chosen]
