"""Collects the completions of all processes, for people to read."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines import pipeline, records
from grpo_tpu.distributed import collectives, sharding
from grpo_tpu.observability.sample_files import Sample
from grpo_tpu.rewards import scoring
from grpo_tpu.rollout.sampler import Sampler

# By the name of a column, its value of each completion of each prompt.
type Columns = Mapping[str, Sequence[Sequence[Any]]]


def make_samples(
  mesh: Mesh,
  prompts: pipeline.Batch,
  columns: Columns,
  *,
  num_shown: int,
  first_group: int = 0,
) -> list[Sample]:
  """The samples of this process, without advantages.

  TensorBoard shows the first completion of each of the first `num_shown` valid
  prompts of all processes. Groups are numbered from `first_group` on.
  """
  is_valid = sharding.all_rows(mesh, prompts.valid)
  rows = sharding.process_rows(mesh, len(is_valid), jax.process_index())
  shown = set(np.flatnonzero(is_valid)[:num_shown].tolist())
  made = []
  for i, problem in enumerate(prompts.problems):
    about = {
      "group": first_group + int(prompts.prompt_index[i]),
      "pid": problem.pid,
      "set": next((x for x, rows in prompts.sets.items() if rows[i]), ""),
      "image": _image_id(problem),
      "answer": problem.answer,
    }
    for generation in range(len(columns["completion"][i])):
      own = {name: x[i][generation] for name, x in columns.items()}
      is_shown = generation == 0 and rows[i] in shown
      # Further images of the prompt are not shown, nor a slot without one.
      has_image = is_shown and problem.images and prompts.images.shape[1]
      made.append(
        Sample(
          about | {"generation": generation} | own,
          question=problem.query if is_shown else None,
          image=prompts.images[i, 0] if has_image else None,
        )
      )
  return made


def step_samples(
  sampler: Sampler,
  prompts: pipeline.Batch,
  texts: list[list[str]],
  lengths: np.ndarray,
  values: Mapping[str, jax.Array],
  *,
  num_shown: int,
  first_group: int = 0,
  stopped: np.ndarray | bool = True,
  more: Columns | None = None,
) -> list[Sample]:
  """The samples of this process of a step of training.

  Args:
    sampler: Sampled the completions, or reads those of the data.
    prompts: The prompts of this process.
    texts: The completions of each prompt.
    lengths: Their numbers of tokens, [B, C].
    values: Columns of the whole batch, on the mesh.
    num_shown: See `make_samples`.
    first_group: See `make_samples`.
    stopped: False for truncated completions.
    more: Columns of this process.
  """
  count = len(texts[0])
  own = sharding.local_rows(sampler.mesh, dict(values))
  reasons = np.broadcast_to(np.where(stopped, "stop", "length"), lengths.shape)
  columns = {name: x.tolist() for name, x in own.items()} | {
    "prompt": [
      [sampler.tokenizer.transcribe(ids[:length])] * count
      for ids, length in zip(
        prompts.prompt_ids, prompts.prompt_length, strict=True
      )
    ],
    "prompt_tokens": [[x] * count for x in prompts.prompt_length.tolist()],
    "completion": texts,
    "completion_tokens": lengths.tolist(),
    "finish_reason": reasons.tolist(),
    **(more or {}),
  }
  return make_samples(
    sampler.mesh,
    prompts,
    columns,
    num_shown=num_shown,
    first_group=first_group,
  )


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
  rewards = {"reward": scores.total} | {
    f"reward/{name}": values for name, values in scores.components.items()
  }
  columns = {k: x.reshape(len(texts), -1).tolist() for k, x in rewards.items()}
  columns["completion"] = texts
  made = make_samples(mesh, prompts, columns, num_shown=count)
  return gather([x for x in made if x.question is not None])


def add_advantages(
  mesh: Mesh, samples: list[Sample], group: jax.Array, advantages: jax.Array
) -> None:
  """Adds the advantage to samples, None where their group was not kept.

  `group` [U] holds the numbers of the groups whose `advantages` [U, C] are.
  """
  own = sharding.local_rows(mesh, (group, advantages))
  numbers, values = sharding.all_rows(mesh, own)
  found = dict(zip(numbers.tolist(), values.tolist(), strict=True))
  for sample in samples:
    kept = found.get(sample.columns["group"])
    generation = sample.columns["generation"]
    sample.columns["advantage"] = kept[generation] if kept else None


def gather(own: list[Sample]) -> list[Sample]:
  """The samples of all processes, by group and generation.

  Images are large: the process that writes has its own, and sends none.
  """
  with_images = not collectives.is_first_process()
  sent = json.dumps([_to_json(x, with_images) for x in own]).encode()
  everywhere = []
  for process, data in enumerate(collectives.gather_bytes(sent)):
    is_own = process == jax.process_index()
    everywhere += own if is_own else map(_from_json, json.loads(data))
  order = ("group", "generation")
  return sorted(everywhere, key=lambda x: [x.columns[name] for name in order])


def _image_id(problem: records.Problem) -> str:
  """The first image's path in the data, or else its hash; "" for text alone."""
  if not problem.images or problem.image_path:
    return problem.image_path
  return f"sha256:{hashlib.sha256(problem.images[0]).hexdigest()}"


def _to_json(sample: Sample, with_image: bool) -> dict[str, Any]:
  image = sample.image if with_image else None
  encoded = image is not None and {
    "shape": image.shape,
    "dtype": image.dtype.str,
    "data": base64.b64encode(image.tobytes()).decode(),
  }
  return vars(sample) | {"image": encoded or None}


def _from_json(fields: dict[str, Any]) -> Sample:
  sample = Sample(**fields)
  if image := fields["image"]:
    data = np.frombuffer(base64.b64decode(image["data"]), image["dtype"])
    sample = dataclasses.replace(sample, image=data.reshape(image["shape"]))
  return sample
