"""Collects the completions of all processes, for people to read."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines import pipeline, records
from grpo_tpu.distributed import collectives, sharding
from grpo_tpu.observability.sample_files import Sample
from grpo_tpu.rewards import scoring
from grpo_tpu.rl.train_batch import ScoredGroups
from grpo_tpu.rollout.sampler import Sampler


def make_samples(
  sampler: Sampler,
  prompts: pipeline.Batch,
  texts: list[list[str]],
  columns: Mapping[str, list],
  *,
  num_shown: int,
) -> list[Sample]:
  """The samples of this process.

  TensorBoard shows the first completion of each of the first `num_shown` valid
  prompts of all processes. Further `columns` have a value of each prompt, or a
  list with those of its completions.
  """
  mesh = sampler.mesh
  is_valid = sharding.all_rows(mesh, prompts.valid)
  rows = sharding.process_rows(mesh, len(is_valid), jax.process_index())
  shown = set(np.flatnonzero(is_valid)[:num_shown].tolist())
  made = []
  for i, problem in enumerate(prompts.problems):
    length = int(prompts.prompt_length[i])
    about = {
      "group": int(prompts.prompt_index[i]),
      "pid": problem.pid,
      "set": next((x for x, inside in prompts.sets.items() if inside[i]), ""),
      "image": _image_id(problem),
      "prompt": sampler.tokenizer.transcribe(prompts.prompt_ids[i, :length]),
      "prompt_tokens": length,
      "answer": problem.answer,
    }
    for generation, text in enumerate(texts[i]):
      own = {
        name: x[i][generation] if isinstance(x[i], list) else x[i]
        for name, x in columns.items()
      }
      row = about | {"generation": generation, "completion": text} | own
      if generation or rows[i] not in shown:
        made.append(Sample(row))
        continue
      # Further images of the prompt are not shown, nor a slot without one.
      has_image = problem.images and prompts.images.shape[1]
      image = prompts.images[i, 0] if has_image else None
      made.append(Sample(row, problem.query, image))
  return made


def step_samples(
  sampler: Sampler,
  prompts: pipeline.Batch,
  texts: list[list[str]],
  mask: np.ndarray,
  groups: ScoredGroups | None = None,
  *,
  num_shown: int,
  stopped: np.ndarray | bool = True,
  **columns: list,
) -> list[Sample]:
  """The samples of this process of a step of training, without advantages.

  `mask` [B, C, T] is True on tokens of completions, and `stopped` False for
  those that were cut off; demonstrations have no `groups`.
  """
  reasons = np.where(stopped, "stop", "length")
  columns["finish_reason"] = np.broadcast_to(reasons, mask.shape[:2]).tolist()
  columns["completion_tokens"] = mask.sum(axis=-1).tolist()
  if groups is not None:
    rewards = dict(groups.rewards)
    del rewards["heuristics"]
    values = {"group": groups.group, "valid": groups.valid}
    values["reward"] = rewards.pop("total")
    if "length_penalty" in rewards:
      values["length_penalty"] = rewards.pop("length_penalty")
    values |= {f"reward/{name}": x for name, x in rewards.items()}
    own = sharding.local_rows(sampler.mesh, values)
    columns |= {name: x.tolist() for name, x in own.items()}
  return make_samples(sampler, prompts, texts, columns, num_shown=num_shown)


def first_samples(
  sampler: Sampler,
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
  rewards = {f"reward/{name}": x for name, x in scores.components.items()}
  rewards["reward"] = scores.total
  columns = {k: x.reshape(len(texts), -1).tolist() for k, x in rewards.items()}
  made = make_samples(sampler, prompts, texts, columns, num_shown=count)
  return gather([x for x in made if x.question is not None])


def add_advantages(
  sampler: Sampler,
  samples: list[Sample],
  group: jax.Array,
  advantages: jax.Array,
) -> None:
  """Adds their advantages to samples; None where the group was not kept.

  `group` [U] holds the numbers of the groups whose `advantages` [U, C] are.
  """
  mesh = sampler.mesh
  own = sharding.local_rows(mesh, (group, advantages))
  numbers, values = sharding.all_rows(mesh, own)
  found = dict(zip(numbers.tolist(), values.tolist(), strict=True))
  for columns in (sample.columns for sample in samples):
    kept = found.get(columns["group"])
    columns["advantage"] = kept[columns["generation"]] if kept else None


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
    "data": base64.b64encode(image.tobytes()).decode(),
  }
  return vars(sample) | {"image": encoded or None}


def _from_json(fields: dict[str, Any]) -> Sample:
  sample = Sample(**fields)
  if image := fields["image"]:
    data = np.frombuffer(base64.b64decode(image["data"]), np.uint8)
    sample = dataclasses.replace(sample, image=data.reshape(image["shape"]))
  return sample
