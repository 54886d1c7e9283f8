"""From a batch of prompts to what an update learns from.

Online, completions are sampled and paid; offline, they come with the data.
Either way the update sees bundles, and the metrics are means over the whole
batch, whatever the number of hosts.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import pipeline
from grpo_tpu import metrics, objective, sharding, train_step
from grpo_tpu import policy as policies
from grpo_tpu.rewards import scoring


@dataclasses.dataclass(frozen=True)
class Experience:
  """What one batch gave.

  Attributes:
    bundles: For the update, on the mesh.
    scalars: By the names of `metrics`.
    samples: Some completions of this host, to look at.
  """

  bundles: train_step.Bundles
  scalars: dict[str, metrics.Scalar]
  samples: list[metrics.Sample]


def online(
  policy: policies.Policy,
  params: dict,
  batch: pipeline.Batch,
  step_key: jax.Array,
  *,
  num_samples: int,
) -> Experience:
  """Samples `num_generations` completions of each prompt and pays them."""
  config = policy.config
  start = time.perf_counter()
  completions = policy.sample(
    params,
    batch,
    step_key,
    num_completions=config.rollout.num_generations,
    temperature=config.rollout.temperature,
  )
  texts = policy.texts(completions)
  sampled = time.perf_counter()
  scores = _scores(texts, batch, config.rewards)
  rewards, valid = sharding.put_batch(
    policy.mesh, _by_group(scores, batch, config.rollout.num_generations)
  )
  paid = time.perf_counter()
  bundles = _bundles(
    policy, batch, completions.ids, completions.mask & valid[..., None]
  )
  advantages, scalars = _advantages(
    rewards,
    valid,
    scale=config.advantage_scale,
    baseline=config.objective.advantage_baseline,
  )
  scalars |= _sampled_statistics(
    bundles.completion_mask, completions.stopped, valid, bundles.prompt_length
  )
  return Experience(
    bundles=bundles.replace(
      advantages=advantages, sampler_logps=completions.logps
    ),
    scalars=scalars
    | {
      "reward/errors": sum(scores.errors.values()),
      "data/skipped": int((~batch.valid).sum()),
      "perf/rollout_seconds": sampled - start,
      "perf/reward_seconds": paid - sampled,
    },
    samples=samples(policy, batch, texts, scores, num_samples),
  )


def offline(policy: policies.Policy, batch: pipeline.Batch) -> Experience:
  """Takes the completions that came with the batch.

  Demonstrations carry no advantage. The completions of a preference pair are
  paid by the reward functions, as sampled ones are.
  """
  config = policy.config
  assert batch.completion_ids is not None and batch.completion_mask is not None
  mask = batch.completion_mask & batch.valid[:, None, None]
  ids, mask = sharding.put_batch(policy.mesh, (batch.completion_ids, mask))
  bundles = _bundles(policy, batch, ids, mask)
  scalars: dict[str, metrics.Scalar] = {
    "data/skipped": int((~batch.valid).sum())
  }
  if config.data.kind == "demonstrations":
    return Experience(bundles, scalars, [])
  texts = [
    [
      policy.tokenizer.decode(row[kept].tolist())
      for row, kept in zip(rows, masks, strict=True)
    ]
    for rows, masks in zip(
      batch.completion_ids, batch.completion_mask, strict=True
    )
  ]
  scores = _scores(texts, batch, config.rewards)
  rewards, valid = sharding.put_batch(
    policy.mesh, _by_group(scores, batch, mask.shape[1])
  )
  advantages, statistics = _advantages(
    rewards,
    valid,
    scale=config.advantage_scale,
    baseline=config.objective.advantage_baseline,
  )
  chosen, rejected = rewards["total"][:, 0], rewards["total"][:, 1]
  is_pair = valid.all(axis=1)
  statistics["train/preference_accuracy"] = objective.preference_accuracy(
    chosen, rejected, valid=is_pair
  )
  return Experience(
    bundles.replace(advantages=advantages, is_pair=is_pair),
    scalars | statistics,
    [],
  )


def samples(
  policy: policies.Policy,
  batch: pipeline.Batch,
  texts: list[list[str]],
  scores: scoring.Scores,
  count: int,
) -> list[metrics.Sample]:
  """The first completion of each of the first `count` usable prompts."""
  width = len(texts[0])
  chosen = [i for i in range(len(texts)) if batch.valid[i]][:count]
  return [
    metrics.Sample(
      pid=batch.problems[i].pid,
      prompt=prompts_text(batch, i),
      completion=texts[i][0],
      answer=batch.problems[i].answer,
      reward=float(scores.total[i * width]),
      rewards={
        name: float(values[i * width])
        for name, values in scores.components.items()
      },
      image=batch.images[i, 0] if batch.images.shape[1] else None,
    )
    for i in chosen
  ]


def _scores(
  texts: list[list[str]],
  batch: pipeline.Batch,
  config: scoring.RewardConfig,
) -> scoring.Scores:
  """Pays every completion of this process's rows."""
  return scoring.score(
    [text for group in texts for text in group],
    [
      problem
      for problem, group in zip(batch.problems, texts, strict=True)
      for _ in group
    ],
    config,
  )


def _by_group(
  scores: scoring.Scores, batch: pipeline.Batch, num_completions: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Rewards `{name: [U, C]}`, the total among them, and which rows count."""
  shape = (-1, num_completions)
  rewards = {
    name: np.asarray(values, np.float32).reshape(shape)
    for name, values in (scores.components | {"total": scores.total}).items()
  }
  valid = scores.valid.reshape(shape) & batch.valid[:, None]
  return rewards, valid


def _bundles(policy, batch, ids, mask) -> train_step.Bundles:
  prompt_ids, prompt_length, images = sharding.put_batch(
    policy.mesh, (batch.prompt_ids, batch.prompt_length, batch.images)
  )
  return train_step.Bundles(
    prompt_ids=prompt_ids,
    prompt_length=prompt_length,
    images=images,
    completion_ids=ids,
    completion_mask=mask,
  )


@functools.partial(jax.jit, static_argnames=("scale", "baseline"))
def _advantages(rewards, valid, *, scale, baseline):
  """Advantages `[U, C]`, and what the rewards were."""
  total = rewards["total"]
  advantages = objective.group_advantages(
    total.reshape(-1),
    num_generations=total.shape[1],
    scale=scale,
    baseline=baseline,
    valid=valid.reshape(-1),
  ).reshape(total.shape)
  health = objective.group_health(rewards["accuracy"] > 0.5, valid=valid)
  counted = jnp.maximum(valid.sum(axis=1), 1)
  centred = total - (jnp.where(valid, total, 0.0).sum(1) / counted)[:, None]
  spread = jnp.sqrt(
    jnp.where(valid, centred**2, 0.0).sum(1) / jnp.maximum(counted - 1, 1)
  )
  groups = valid.any(axis=1)
  num_groups = jnp.maximum(groups.sum(), 1)
  highest = jnp.where(valid, total, -jnp.inf).max(1)
  lowest = jnp.where(valid, total, jnp.inf).min(1)
  scalars = {
    "rollout/reward": _mean(total, valid),
    "rollout/reward_std": jnp.where(groups, spread, 0.0).sum() / num_groups,
    "rollout/accuracy": _mean(rewards["accuracy"], valid),
    "rollout/unanimous_fraction": (groups & (highest <= lowest)).sum()
    / num_groups,
    "rollout/all_right_fraction": health["all_right"],
    "rollout/all_wrong_fraction": health["all_wrong"],
    "rollout/mixed_fraction": health["mixed"],
  }
  for name, values in rewards.items():
    if name == "total":
      continue
    mean = _mean(values, valid)
    scalars[f"reward/{name}_mean"] = mean
    scalars[f"reward/{name}_std"] = jnp.sqrt(
      _mean(jnp.square(values - mean), valid)
    )
  return advantages, scalars


@jax.jit
def _sampled_statistics(mask, stopped, valid, prompt_length):
  return {
    "rollout/completion_length": _mean(mask.sum(-1), valid),
    "rollout/truncated_fraction": _mean(~stopped, valid),
    "rollout/prompt_length": _mean(prompt_length, valid.any(axis=1)),
  }


def _mean(values, valid):
  total = jnp.where(valid, values, 0).sum(dtype=jnp.float32)
  return total / jnp.maximum(valid.sum(), 1)


def prompts_text(batch: pipeline.Batch, row: int) -> str:
  """The question of a row, as a person would read it."""
  return batch.problems[row].query
