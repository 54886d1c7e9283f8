"""Picks completions for people to look at."""

import base64
import json
from typing import Any

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

  Every process gives its own prompts, with one list of texts each, and gets the
  same samples. Only the process that writes is sure to have their images.
  """
  if not count:
    return []
  is_valid = sharding.all_rows(mesh, prompts.valid)
  rows = sharding.process_rows(mesh, len(is_valid), jax.process_index())
  chosen = np.flatnonzero(is_valid)[:count].tolist()
  width = len(texts[0])
  writer_rows = sharding.process_rows(mesh, len(is_valid), 0)
  own, sent, everywhere = {}, [], {}
  for i, row in enumerate(rows):
    if row not in chosen:
      continue
    problem = prompts.problems[i]
    has_image = problem.images and prompts.images.shape[1]
    own[row] = Sample(
      pid=problem.pid,
      prompt=problem.query,
      completion=texts[i][0],
      answer=problem.answer,
      reward=float(scores.total[i * width]),
      rewards={k: float(x[i * width]) for k, x in scores.components.items()},
      # Further images of the prompt are not shown, nor a slot without one.
      image=prompts.images[i, 0] if has_image else None,
    )
    # Images are large, and the process that writes has its own.
    sent.append([row, _to_json(own[row], with_image=row not in writer_rows)])
  for process in collectives.gather_bytes(json.dumps(sent).encode()):
    everywhere |= {row: _from_json(x) for row, x in json.loads(process)}
  return [(everywhere | own)[row] for row in chosen]


def _to_json(sample: Sample, *, with_image: bool) -> dict[str, Any]:
  image = sample.image if with_image else None
  encoded = image is not None and {
    "shape": image.shape,
    "dtype": image.dtype.str,
    "data": base64.b64encode(image.tobytes()).decode(),
  }
  return vars(sample) | {"image": encoded or None}


def _from_json(fields: dict[str, Any]) -> Sample:
  if image := fields["image"]:
    data = np.frombuffer(base64.b64decode(image["data"]), image["dtype"])
    fields |= {"image": data.reshape(image["shape"])}
  return Sample(**fields)
