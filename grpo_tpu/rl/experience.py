"""From a batch of prompts to what an update learns from.

Online, completions are sampled and paid; offline, they come with the data.
Either way the update sees bundles, and the metrics are means over the whole
batch, whatever the number of hosts.
"""

import dataclasses
import functools
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from data_pipelines import pipeline
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import collectives, sharding
from grpo_tpu.observability import writer
from grpo_tpu.rewards import scoring
from grpo_tpu.rl import diagnostics, objective, preference_metrics, shaping
from grpo_tpu.rl import policy as policies
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rollout import generate


@dataclasses.dataclass(frozen=True)
class Experience:
  """What one step learns from.

  Attributes:
    bundles: For the update, on the mesh.
    scalars: By the names of `metrics`.
    samples: Some completions to look at.
    num_batches: How many batches of prompts it took.
  """

  bundles: TrainBatch
  scalars: dict[str, writer.Scalar]
  samples: list[writer.Sample]
  num_batches: int

  def seconds(self, phase: str) -> float:
    """What it took to wait for "data", or for "reward"; 0 where it had none."""
    return float(self.scalars.get(f"perf/{phase}_seconds", 0.0))


class _Groups(flax.struct.PyTreeNode):
  """Completions of a batch of prompts, and what they were paid.

  Attributes:
    bundles: Without advantages.
    rewards: By name, before weights; "total" and "heuristics" are weighted.
    valid: Which rows count: well-formed, and paid without error.
  """

  bundles: TrainBatch
  rewards: dict[str, Float[Array, "U C"]]
  valid: Bool[Array, "U C"]


def online(
  policy: policies.Policy,
  params: dict,
  batches: Iterator[pipeline.Batch],
  key: jax.Array,
  *,
  position: int,
  num_samples: int,
  poll: Callable[[], None] = generate.no_poll,
) -> Experience:
  """Samples `num_generations` completions of each prompt and pays them.

  With `shaping.zero_variance` at "resample" it goes on to further batches until
  every group of the step has rewards that differ, or the budget is spent; the
  groups that do, in the order of the data, stand first. The metrics are means
  over all batches sampled, kept or not.

  Args:
    policy: What samples.
    params: Its parameters.
    batches: The data from `position` on; as many are taken as are needed.
    key: Of the run; a batch's own is folded from it and the batch's number.
    position: Batches that the run took before.
    num_samples: Completions to hand out for people to look at.
    poll: As in `Policy.sample`.
  """
  shaping_config = policy.config.shaping
  resamples = shaping_config.zero_variance == "resample"
  limit = shaping_config.max_batches if resamples else 1
  groups, scalars, seen = None, [], []
  for number in range(position + 1, position + limit + 1):
    batch_key = jax.random.fold_in(key, number)
    new, statistics, some = _sampled(
      policy,
      params,
      batches,
      batch_key,
      num_samples=num_samples - len(seen),
      poll=poll,
    )
    scalars.append(statistics)
    seen += some
    groups = new if groups is None else _merged(policy, groups, new)
    if number < position + limit and _all_teach(groups):
      break
  assert groups is not None
  bundles, statistics = _with_advantages(policy, groups)
  return Experience(
    bundles=bundles,
    scalars=_over_batches(scalars) | statistics,
    samples=seen,
    num_batches=len(scalars),
  )


def _sampled(
  policy, params, batches, key, *, num_samples, poll
) -> tuple[_Groups, dict[str, writer.Scalar], list[writer.Sample]]:
  """One batch of prompts with sampled completions, paid."""
  config = policy.config
  waited = time.perf_counter()
  batch = next(batches)
  start = time.perf_counter()
  with _Payday(policy, batch) as payday:
    sampled = policy.sample(
      params,
      batch,
      key,
      num_completions=config.rollout.num_generations,
      temperature=config.rollout.temperature,
      num_parts=config.num_rollouts,
      poll=poll,
      finished=payday.begin,
    )
    completions = sampled.completions
    texts = policy.texts(completions)
    rolled_out = time.perf_counter()
    scores = payday.end(texts)
  rewards, valid = sharding.device_put_batch(
    policy.mesh, _by_group(scores, batch, config)
  )
  paid = time.perf_counter()
  mask = completions.mask & valid[..., None]
  bundles = _bundles(policy, batch, completions.ids, mask, sampled.images)
  statistics = _sampled_statistics(
    mask, completions.stopped, valid, bundles.prompt_length
  )
  if config.shaping.truncated == "penalise":
    rewards, statistics["rollout/length_penalty"] = _penalised(
      rewards,
      mask,
      valid,
      max_length=config.rollout.max_new_tokens,
      soft_tokens=config.shaping.soft_tokens,
    )
  elif config.shaping.truncated == "mask":
    mask &= completions.stopped[..., None]
  bundles = bundles.replace(
    completion_mask=mask, sampler_logps=completions.logps
  )
  return (
    _Groups(bundles, rewards, valid),
    statistics
    | _reward_statistics(rewards, valid)
    | _error_counts(scores)
    | {
      "data/skipped": _num_skipped(policy, batch),
      "rollout/padded_prompt_length": batch.prompt_ids.shape[1],
      "perf/data_seconds": start - waited,
      "perf/rollout_seconds": rolled_out - start,
      "perf/reward_seconds": paid - rolled_out,
      "perf/reward_overlap_seconds": payday.seconds_before(rolled_out),
    }
    | sampled.scalars,
    samples(policy, batch, texts, scores, num_samples),
  )


_ADD_UP = {"reward/errors", "data/skipped"}
_MEANS = {
  "perf/rollout_tokens_per_second",
  "perf/live_row_share",
  "perf/decode_bandwidth_share",
}


def _over_batches(
  scalars: list[dict[str, writer.Scalar]],
) -> dict[str, writer.Scalar]:
  """Sums of seconds and counts, means of the rest."""
  merged: dict[str, writer.Scalar] = {"rollout/batches": len(scalars)}
  if len(scalars) == 1:
    return merged | scalars[0]
  fetched = jax.device_get(scalars)
  for name in scalars[0]:
    values = [batch[name] for batch in fetched if name in batch]
    values = np.array(values, np.float32)
    adds_up = name in _ADD_UP or name.endswith("_errors")
    adds_up |= name.startswith("perf/") and name not in _MEANS
    merged[name] = values.sum() if adds_up else values.mean()
  return merged


def _all_teach(groups: _Groups) -> bool:
  total, valid = groups.rewards["total"], groups.valid
  return bool(jax.jit(shaping.has_reward_variance)(total, valid).all())


def _merged(policy: policies.Policy, first: _Groups, more: _Groups) -> _Groups:
  """As many groups as `first` has: those that teach, then the others."""
  both = (first, more)
  width = max(x.bundles.prompt_ids.shape[1] for x in both)
  slots = max(x.bundles.images.shape[1] for x in both)
  first, more = (_prompts_padded(x, width, slots) for x in both)
  return _merge(sharding.batch_sharding(policy.mesh), first, more)


def _prompts_padded(groups: _Groups, width: int, slots: int) -> _Groups:
  ids, images = groups.bundles.prompt_ids, groups.bundles.images
  ids = jnp.pad(ids, ((0, 0), (0, width - ids.shape[1])))
  unused = [(0, 0), (0, slots - images.shape[1])]
  unused += [(0, 0)] * (images.ndim - 2)
  bundles = groups.bundles.replace(
    prompt_ids=ids, images=jnp.pad(images, unused)
  )
  return groups.replace(bundles=bundles)


@functools.partial(jax.jit, static_argnums=0)
def _merge(place, first: _Groups, more: _Groups) -> _Groups:
  count = first.valid.shape[0]
  both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, more)
  teaches = shaping.has_reward_variance(both.rewards["total"], both.valid)
  order = jnp.argsort(~teaches, stable=True)[:count]
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(x[order], place), both
  )


@functools.partial(jax.jit, static_argnames=("max_length", "soft_tokens"))
def _penalised(rewards, mask, valid, *, max_length, soft_tokens):
  """Rewards less what length costs, and the mean of that."""
  penalty = shaping.length_penalty(
    mask.sum(axis=-1), max_length=max_length, soft_tokens=soft_tokens
  )
  rewards = rewards | {"total": rewards["total"] + penalty}
  return rewards, _mean(penalty, valid)


def _with_advantages(
  policy: policies.Policy, groups: _Groups
) -> tuple[TrainBatch, dict[str, writer.Scalar]]:
  config = policy.config
  changes, scalars = _advantages(
    groups.rewards["total"],
    groups.rewards["heuristics"],
    groups.valid,
    groups.bundles.completion_mask,
    scale=config.objective.scale,
    baseline=config.objective.advantage_baseline,
    clip=config.shaping.advantage_clip,
    drops=config.shaping.zero_variance != "keep",
  )
  return groups.bundles.replace(**changes), scalars


def offline(
  policy: policies.Policy, params: dict, batches: Iterator[pipeline.Batch]
) -> Experience:
  """Takes the completions that come with the next batch.

  Demonstrations carry no advantage. The completions of a preference group are
  paid by the reward functions, as sampled ones are, or by their labels.
  """
  config = policy.config
  start = time.perf_counter()
  batch = next(batches)
  scalars: dict[str, writer.Scalar] = {
    "data/skipped": _num_skipped(policy, batch),
    "perf/data_seconds": time.perf_counter() - start,
  }
  if config.data.kind == "demonstrations":
    return Experience(given(policy, params, batch), scalars, [], 1)
  groups, preferred, errors = preferences(policy, params, batch)
  bundles, statistics = _with_advantages(policy, groups)
  total = groups.rewards["total"]
  chosen, rejected, is_pair = preference_metrics.all_pairs(total, preferred)
  accuracy = preference_metrics.accuracy(chosen, rejected, valid=is_pair)
  statistics |= _reward_statistics(groups.rewards, groups.valid) | errors
  statistics["train/preference_accuracy"] = accuracy
  bundles = bundles.replace(preferred=preferred)
  return Experience(bundles, scalars | statistics, [], 1)


def given(
  policy: policies.Policy, params: dict, batch: pipeline.Batch
) -> TrainBatch:
  """The prompts of a batch with the completions that came with them."""
  assert batch.completion_ids is not None and batch.completion_mask is not None
  mask = batch.completion_mask & batch.valid[:, None, None]
  ids, mask = sharding.device_put_batch(
    policy.mesh, (batch.completion_ids, mask)
  )
  return _bundles(policy, batch, ids, mask, policy.images(params, batch))


def preferences(
  policy: policies.Policy, params: dict, batch: pipeline.Batch
) -> tuple[_Groups, Bool[Array, "U C C"], dict[str, writer.Scalar]]:
  """The labelled completions of a batch, paid, and which is preferred to which.

  The last is how many completions each reward failed on, by metric.

  Where `data.preference_rewards` is "labels", a label is the whole reward.
  """
  config = policy.config
  bundles = given(policy, params, batch)
  assert batch.completion_ids is not None
  assert batch.completion_mask is not None and batch.labels is not None
  texts = [
    [
      policy.tokenizer.decode(row[kept].tolist())
      for row, kept in zip(rows, masks, strict=True)
    ]
    for rows, masks in zip(
      batch.completion_ids, batch.completion_mask, strict=True
    )
  ]
  scores = scored(policy, texts, batch)
  rewards, valid = _by_group(scores, batch, config)
  valid &= np.isfinite(batch.labels)
  if config.data.preference_rewards == "labels":
    rewards["total"] = np.where(valid, batch.labels, 0).astype(np.float32)
    rewards["heuristics"] = np.zeros_like(rewards["total"])
  better = batch.labels[:, :, None] > batch.labels[:, None, :]
  preferred = better & valid[:, :, None] & valid[:, None, :]
  rewards, valid, preferred = sharding.device_put_batch(
    policy.mesh, (rewards, valid, preferred)
  )
  mask = bundles.completion_mask & valid[..., None]
  bundles = bundles.replace(completion_mask=mask)
  return _Groups(bundles, rewards, valid), preferred, _error_counts(scores)


def samples(
  policy: policies.Policy,
  batch: pipeline.Batch,
  texts: list[list[str]],
  scores: scoring.Scores,
  count: int,
) -> list[writer.Sample]:
  """The first completion of each of the first `count` usable prompts.

  The same on every process, except that only the one that writes is sure to
  have their pictures.
  """
  if not count:
    return []
  usable = sharding.all_rows(policy.mesh, batch.valid)
  rows = sharding.process_rows(policy.mesh, len(usable), jax.process_index())
  chosen = np.flatnonzero(usable)[:count].tolist()
  width = len(texts[0])
  found = {
    row: writer.Sample(
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
    for i, row in enumerate(rows)
    if row in chosen
  }
  # Pictures are large, and the writer mostly holds the rows itself.
  held = sharding.process_rows(policy.mesh, len(usable), 0)
  sent = {
    row: dataclasses.replace(sample, image=None) if row in held else sample
    for row, sample in found.items()
  }
  everywhere = {
    row: sample
    for host in collectives.gather_bytes(pickle.dumps(sent))
    for row, sample in pickle.loads(host).items()
  }
  return [(everywhere | found)[row] for row in chosen]


class _Payday:
  """Pays the completions of a batch, prompt by prompt, as they are finished.

  In a thread, while the devices go on with the others. What a completion earns
  does not depend on when that was, and failures count in the batch's order.
  """

  def __init__(self, policy: policies.Policy, batch: pipeline.Batch):
    self._problems, self._config = batch.problems, policy.config.rewards
    self._gather = functools.partial(sharding.all_rows, policy.mesh)
    self._paid: dict[int, futures.Future[scoring.RawScores]] = {}
    self._spans: list[tuple[float, float]] = []

  def __enter__(self) -> Self:
    self._thread = futures.ThreadPoolExecutor(max_workers=1)
    return self

  def __exit__(self, *_) -> None:
    self._thread.shutdown(cancel_futures=True)

  def begin(self, texts: Mapping[int, list[str]]) -> None:
    """Takes the completions of some prompts, by their places in the batch."""
    for prompt, completions in texts.items():
      self._paid[prompt] = self._thread.submit(self._pay, prompt, completions)

  def end(self, texts: list[list[str]]) -> scoring.Scores:
    """All scores, by prompts; pays what has not been begun.

    Raises:
      RewardError: A reward has failed too often.
    """
    rest = [x for x in range(len(texts)) if x not in self._paid]
    self.begin({prompt: texts[prompt] for prompt in rest})
    paid = [self._paid[prompt].result() for prompt in range(len(texts))]
    return scoring.reduce(paid, self._config, gather=self._gather)

  def seconds_before(self, time_point: float) -> float:
    """How long completions had been paid by then."""
    return sum(max(min(x, time_point) - begun, 0) for begun, x in self._spans)

  def _pay(self, prompt: int, completions: list[str]) -> scoring.RawScores:
    begun = time.perf_counter()
    problems = [self._problems[prompt]] * len(completions)
    paid = scoring.raw_scores(completions, problems, self._config)
    self._spans.append((begun, time.perf_counter()))
    return paid


def scored(
  policy: policies.Policy, texts: list[list[str]], batch: pipeline.Batch
) -> scoring.Scores:
  """Pays every completion of this process's rows.

  Raises:
    RewardError: A reward has failed too often, over all processes.
  """
  return scoring.score(
    [text for group in texts for text in group],
    [
      problem
      for problem, group in zip(batch.problems, texts, strict=True)
      for _ in group
    ],
    policy.config.rewards,
    gather=functools.partial(sharding.all_rows, policy.mesh),
  )


def _by_group(
  scores: scoring.Scores, batch: pipeline.Batch, config: run_config.Config
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Rewards `{name: [U, C]}` as in `_Groups`, and which rows count."""
  shape = (len(batch.valid), -1)
  heuristics = sum(
    config.rewards.weights[name] * scores.components[name]
    for name in scoring.HEURISTICS
  )
  named = scores.components | {"total": scores.total, "heuristics": heuristics}
  rewards = {
    name: np.asarray(values, np.float32).reshape(shape)
    for name, values in named.items()
  }
  return rewards, scores.valid.reshape(shape) & batch.valid[:, None]


def _bundles(policy, batch, ids, mask, images=None) -> TrainBatch:
  """Bundles with the pictures' pixels, if nothing is given in their place."""
  prompt_ids, prompt_length = sharding.device_put_batch(
    policy.mesh, (batch.prompt_ids, batch.prompt_length)
  )
  if images is None:
    images = sharding.device_put_batch(policy.mesh, batch.images)
  return TrainBatch(
    prompt_ids=prompt_ids,
    prompt_length=prompt_length,
    images=images,
    completion_ids=ids,
    completion_mask=mask,
  )


@functools.partial(
  jax.jit, static_argnames=("scale", "baseline", "clip", "drops")
)
def _advantages(
  total, heuristics, valid, mask, *, scale, baseline, clip, drops
):
  """What bundles are to have of advantages, and what these rest on.

  Not of whole bundles: there is no program for each length of prompts.
  """
  advantages = objective.group_advantages(
    total.reshape(-1),
    num_generations=total.shape[1],
    scale=scale,
    baseline=baseline,
    valid=valid.reshape(-1),
  ).reshape(total.shape)
  scalars = {
    "rollout/effective_sample_size": diagnostics.effective_sample_size(
      advantages
    ),
    "rollout/heuristic_advantage_share": diagnostics.advantage_share(
      heuristics, total, advantages, valid=valid
    ),
  }
  if clip is not None:
    advantages = jnp.clip(advantages, -clip, clip)
  changes = {"advantages": advantages}
  if drops:
    kept = shaping.has_reward_variance(total, valid)[:, None]
    changes["completion_mask"] = mask & kept[..., None]
    changes["counted"] = jnp.broadcast_to(kept, total.shape)
  return changes, scalars


@jax.jit
def _reward_statistics(rewards, valid):
  """What the rewards were, and how they lie within groups."""
  total = rewards["total"]
  correctness = diagnostics.group_correctness(
    rewards["accuracy"] > 0.5, valid=valid
  )
  counted = jnp.maximum(valid.sum(axis=1), 1)
  centred = total - (jnp.where(valid, total, 0.0).sum(1) / counted)[:, None]
  spread = jnp.sqrt(
    jnp.where(valid, centred**2, 0.0).sum(1) / jnp.maximum(counted - 1, 1)
  )
  groups = valid.any(axis=1)
  num_groups = jnp.maximum(groups.sum(), 1)
  unanimous = groups & ~shaping.has_reward_variance(total, valid)
  scalars = {
    "rollout/reward": _mean(total, valid),
    "rollout/reward_std": jnp.where(groups, spread, 0.0).sum() / num_groups,
    "rollout/accuracy": _mean(rewards["accuracy"], valid),
    "rollout/unanimous_fraction": unanimous.sum() / num_groups,
    "rollout/all_right_fraction": correctness["all_right"],
    "rollout/all_wrong_fraction": correctness["all_wrong"],
    "rollout/mixed_fraction": correctness["mixed"],
  }
  for name in sorted(rewards.keys() - {"total", "heuristics"}):
    mean = _mean(rewards[name], valid)
    scalars[f"reward/{name}_mean"] = mean
    scalars[f"reward/{name}_std"] = jnp.sqrt(
      _mean(jnp.square(rewards[name] - mean), valid)
    )
  return scalars


def _num_skipped(policy: policies.Policy, batch: pipeline.Batch) -> int:
  return int((~sharding.all_rows(policy.mesh, batch.valid)).sum())


def _error_counts(scores: scoring.Scores) -> dict[str, writer.Scalar]:
  """Failures of each reward, and of all."""
  counts: dict[str, writer.Scalar] = {
    f"reward/{name}_errors": count for name, count in scores.errors.items()
  }
  return counts | {"reward/errors": sum(scores.errors.values())}


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
