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
from grpo_tpu.rl.train_batch import ScoredGroups, TrainBatch
from grpo_tpu.rollout.sampler import Sampler


def make_samples(
  sampler: Sampler,
  prompts: pipeline.Batch,
  texts: list[list[str]],
  columns: Mapping[str, list],
  *,
  num_shown: int,
) -> list[Sample]:
  """The samples of this process; TensorBoard shows `num_shown` of all.

  Those are the first completions of the first valid prompts. Further `columns`
  have a value of each prompt, or a list with those of its completions.
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
      "prompt": sampler.tokenizer.transcribe(
        prompts.prompt_ids[i, :length].tolist()
      ),
      "prompt_tokens": length,
      "answer": problem.answer,
    }
    for generation, text in enumerate(texts[i]):
      row = about | {"generation": generation, "completion": text}
      for name, x in columns.items():
        row[name] = x[i][generation] if isinstance(x[i], list) else x[i]
      if generation or rows[i] not in shown:
        made.append(Sample(row))
        continue
      # Further images of the prompt are not shown, nor a slot without one.
      has_image = problem.images and prompts.images.shape[1]
      image = prompts.images[i, 0] if has_image else None
      made.append(Sample(row, problem.question or problem.query, image))
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
    names = {"total": "reward", "length_penalty": "length_penalty"}
    values = {
      names.get(name, f"reward/{name}"): x
      for name, x in groups.rewards.items()
      if name != "heuristics"
    }
    values |= {"group": groups.group, "valid": groups.valid}
    own = sharding.local_rows(sampler.mesh, values)
    columns |= {name: _cells(x) for name, x in own.items()}
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

  The same on all processes; only the one that writes is sure to have images.
  """
  if not count:
    return []
  rewards = {f"reward/{name}": x for name, x in scores.components.items()}
  rewards |= {"reward": scores.total}
  columns = {k: _cells(x.reshape(len(texts), -1)) for k, x in rewards.items()}
  made = make_samples(sampler, prompts, texts, columns, num_shown=count)
  return gather([x for x in made if x.question is not None])


def given_samples(
  sampler: Sampler,
  prompts: pipeline.Batch,
  num_shown: int | None,
  groups: ScoredGroups | None = None,
  batch: TrainBatch | None = None,
) -> list[Sample]:
  """The samples of a step whose completions came with the data."""
  if num_shown is None:
    return []
  ids, mask = prompts.completion_ids, prompts.completion_mask
  assert ids is not None and mask is not None
  labels = {} if prompts.labels is None else {"label": prompts.labels.tolist()}
  texts = sampler.decode(ids, mask)
  kept = step_samples(
    *(sampler, prompts, texts, mask, groups), num_shown=num_shown, **labels
  )
  # A prompt may have fewer completions than others.
  kept = [x for x in kept if x.columns["completion_tokens"]]
  if groups is None or batch is None:
    return gather(kept)
  return with_advantages(sampler, kept, groups.group, batch)


def with_advantages(
  sampler: Sampler, own: list[Sample], group: jax.Array, batch: TrainBatch
) -> list[Sample]:
  """The samples of all processes; those of a `group` [U] have advantages."""
  rows = sharding.local_rows(sampler.mesh, (group, batch.advantages))
  numbers, values = sharding.all_rows(sampler.mesh, rows)
  found = dict(zip(numbers.tolist(), values.tolist(), strict=True))
  for columns in (sample.columns for sample in own):
    kept = found.get(columns["group"])
    columns["advantage"] = kept[columns["generation"]] if kept else None
  return gather(own)


def gather(own: list[Sample]) -> list[Sample]:
  """The samples of all processes, by group and generation.

  Processes that share rows have the same samples, and each is given once.
  Images are large: the process that writes has its own, and sends none.
  """
  sent = own
  if collectives.is_first_process():
    sent = [dataclasses.replace(sample, image=None) for sample in own]
  encoded = json.dumps(list(map(vars, sent)), default=_encode_image).encode()
  found = {}
  for process, data in enumerate(collectives.gather_bytes(encoded)):
    is_own = process == jax.process_index()
    for sample in own if is_own else map(_decode, json.loads(data)):
      key = sample.columns["group"], sample.columns["generation"]
      if is_own or key not in found:
        found[key] = sample
  return [found[key] for key in sorted(found)]


def _cells(values: np.ndarray) -> list:
  """The values as JSON can hold them: None for NaN."""
  cells = values.astype(object)
  cells[np.isnan(values)] = None
  return cells.tolist()


def _encode_image(image: np.ndarray) -> tuple[list[int], str]:
  return list(image.shape), base64.b64encode(image.tobytes()).decode()


def _decode(fields: dict[str, Any]) -> Sample:
  if fields["image"]:
    shape, data = fields["image"]
    pixels = np.frombuffer(base64.b64decode(data), np.uint8)
    fields["image"] = pixels.reshape(shape)
  return Sample(**fields)


def _image_id(problem: records.Problem) -> str:
  """The first image's path in the data, or else its hash; "" for text alone."""
  if not problem.images or problem.image_path:
    return problem.image_path
  return f"sha256:{hashlib.sha256(problem.images[0]).hexdigest()}"
