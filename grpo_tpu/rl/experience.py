"""Makes the batch that a step learns from.

Online, completions are sampled and scored by the rewards; offline, they come
with the data. Metrics are means over the whole batch, on any number of hosts.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool

from data_pipelines import pipeline
from grpo_tpu.distributed import activity, sharding
from grpo_tpu.observability import sample_files, writer
from grpo_tpu.rewards import background, combination, scoring
from grpo_tpu.rewards.networks import Completed, NetworkReward
from grpo_tpu.rewards.settings import HEURISTICS
from grpo_tpu.rl import (
  diagnostics,
  preference_metrics,
  reward_health,
  samples,
  set_metrics,
  shaping,
  step_groups,
)
from grpo_tpu.rl.settings import CollectorConfig
from grpo_tpu.rl.train_batch import ScoredGroups, TrainBatch
from grpo_tpu.rollout import generate
from grpo_tpu.rollout.sampler import Sampler

type Metrics = dict[str, writer.Scalar]


@dataclasses.dataclass(frozen=True)
class Experience:
  """A batch to learn from, and what there is to report about it."""

  batch: TrainBatch  # On the mesh, with advantages.
  metrics: Metrics
  samples: list[sample_files.Sample]  # For people to read.
  num_batches: int  # The batches of prompts that were read.


class Collector:
  """Collects experience."""

  def __init__(
    self,
    sampler: Sampler,
    config: CollectorConfig,
    networks: Sequence[NetworkReward] = (),
  ):
    """Collects nothing yet; `networks` add to the rewards of the host."""
    self.sampler, self.config = sampler, config
    self.combination = combination.Combination(
      config.rewards, networks, self._gather
    )
    self.first_tokens = reward_health.FirstTokens(
      sampler.forward.config.vocab_size, sampler.mesh
    )

  def collect(
    self,
    params: dict,
    prompts: Iterator[pipeline.Batch],
    key: jax.Array,
    *,
    position: int,
    num_shown: int | None,
    poll: Callable[[], None] = generate.no_poll,
  ) -> Experience:
    """Collects the experience of one step.

    To resample (`shaping.zero_variance`; dynamic sampling, DAPO), batches are
    read until all groups of the step have rewards that differ. Those come
    first, in the order of the data. Metrics are means over all batches.

    `prompts` are the batches from number `position` on, and each batch's key is
    folded from the run's and its number. TensorBoard shows `num_shown` samples;
    None keeps no samples at all. For `poll` see `Sampler.sample`.
    """
    if self.config.kind != "online":
      return self._collect_offline(params, prompts, num_shown)
    shaped, mesh = self.config.shaping, self.sampler.mesh
    resamples = shaped.zero_variance == "resample"
    last = position + (shaped.max_batches if resamples else 1)
    groups, metrics, kept = None, [], []
    # A step that is interrupted is collected again from its first batch.
    with self.combination.transaction():
      for number in range(position + 1, last + 1):
        new, batch_metrics, new_samples = self._sample_batch(
          *(params, prompts, jax.random.fold_in(key, number)),
          first_group=len(metrics) * len(groups.group) if groups else 0,
          num_shown=0 if num_shown and groups else num_shown,
          poll=poll,
        )
        metrics.append(batch_metrics)
        kept += new_samples
        groups = step_groups.best(mesh, groups, new) if groups else new
        if number < last:
          if jax.jit(shaping.has_signal)(groups.compared, groups.valid).all():
            break
      assert groups is not None
      batch, advantage_metrics = step_groups.add_advantages(groups, self.config)
      step_metrics = _combine_metrics(metrics) | advantage_metrics
      if num_shown is not None:
        kept = samples.with_advantages(self.sampler, kept, groups.group, batch)
    if self.config.rewards.watched:
      tokens = batch.completion_ids, batch.completion_mask
      step_metrics |= self.first_tokens.novelty(*tokens)
    return Experience(batch, step_metrics, kept, len(metrics))

  def _sample_batch(
    self, params, prompts, key, *, first_group, num_shown, poll
  ) -> tuple[ScoredGroups, Metrics, list[sample_files.Sample]]:
    """Samples and scores the next batch; numbers groups from `first_group`."""
    sampler, settings = self.sampler, self.sampler.settings
    wait_start = time.perf_counter()
    with activity.doing("waiting for data"):
      batch = next(prompts)
    start = time.perf_counter()
    how = {"valid": batch.valid, "gather": self._gather}
    with background.BackgroundScorer(
      batch.problems, self.config.rewards, **how
    ) as scorer:
      sampled = sampler.sample(
        params,
        batch,
        key,
        num_completions=settings.num_generations,
        temperature=settings.temperature,
        num_parts=self.config.num_parts,
        poll=poll,
        on_finished=scorer.submit,
      )
      found = sampled.completions
      texts = sampler.texts(found)
      completed = Completed(found.ids, found.mask, texts)
      shape = len(texts), settings.num_generations
      is_present = np.broadcast_to(batch.valid[:, None], shape)
      join = self.combination.start(batch, completed, is_present)
      rollout_end = time.perf_counter()
      with activity.doing("waiting for rewards"):
        stopped = sharding.local_rows(sampler.mesh, found.stopped)
        scores = join(scorer.result(texts, (~stopped).tolist()))
    scored = (
      *self.group_rewards(scores, batch),
      batch.prompt_index + first_group,
      self._apart(scores, is_present.shape),
    )
    scored = sharding.device_put_batch(sampler.mesh, scored)
    reward_end = time.perf_counter()
    groups, metrics = self._make_groups(batch, sampled, *scored)
    metrics |= self._reward_metrics(batch, groups, found.mask)
    metrics |= _error_counts(scores) | {
      "rollout/padded_prompt_length": batch.prompt_ids.shape[1],
      "perf/data_seconds": start - wait_start,
      "perf/rollout_seconds": rollout_end - start,
      "perf/reward_seconds": reward_end - rollout_end,
      "perf/reward_overlap_seconds": scorer.seconds_before(rollout_end),
    }
    metrics |= sampled.metrics
    if num_shown is None:
      return groups, metrics, []
    answers = np.array(scores.answers, object).reshape(stopped.shape)
    mask = sharding.local_rows(sampler.mesh, found.mask)
    kept = samples.step_samples(
      *(sampler, batch, texts, mask, groups),
      num_shown=num_shown,
      stopped=stopped,
      read_answer=answers.tolist(),
    )
    return groups, metrics, kept

  def _make_groups(
    self, prompts, sampled, rewards, valid, group, apart
  ) -> tuple[ScoredGroups, Metrics]:
    """Joins completions and rewards; shapes what truncated completions get."""
    completions = sampled.completions
    mask = completions.mask & valid[..., None]
    batch = self._make_batch(prompts, completions.ids, mask, sampled.images)
    metrics = diagnostics.rollout_statistics(
      mask, completions.stopped, valid, batch.prompt_length
    )
    if self.config.shaping.truncated == "penalise":
      rewards, metrics["rollout/length_penalty"] = _penalise_length(
        rewards,
        mask,
        valid,
        max_length=self.sampler.settings.max_new_tokens,
        soft_tokens=self.config.shaping.soft_tokens,
      )
      if apart:
        apart |= {"length_penalty": rewards["length_penalty"]}
    elif self.config.shaping.truncated == "mask":
      mask &= completions.stopped[..., None]
    batch = batch.replace(completion_mask=mask, sampler_logps=completions.logps)
    return ScoredGroups(batch, rewards, valid, group, apart), metrics

  def _collect_offline(self, params, prompts, num_shown) -> Experience:
    """Takes the completions that come with the next batch.

    Demonstrations, and pairs for a reward model, have no advantages.
    """
    start = time.perf_counter()
    batch = next(prompts)
    metrics: Metrics = {"perf/data_seconds": time.perf_counter() - start}
    if self.config.kind == "demonstrations" or self.config.is_reward_model:
      metrics |= set_metrics.set_metrics(self._gather, batch)
      labelled = self.labelled_completions(params, batch)
      kept = samples.given_samples(self.sampler, batch, num_shown)
      return Experience(labelled, metrics, kept, 1)
    groups, preferred, errors = self.preference_groups(params, batch)
    train_batch, advantage_metrics = step_groups.add_advantages(
      groups, self.config
    )
    chosen, rejected, is_pair = preference_metrics.all_pairs(
      groups.rewards["total"], preferred
    )
    accuracy = preference_metrics.accuracy(chosen, rejected, valid=is_pair)
    metrics |= advantage_metrics
    metrics |= self._reward_metrics(batch, groups)
    metrics |= errors | {"train/preference_accuracy": accuracy}
    train_batch = train_batch.replace(preferred=preferred)
    kept = samples.given_samples(
      self.sampler, batch, num_shown, groups, train_batch
    )
    return Experience(train_batch, metrics, kept, 1)

  def labelled_completions(
    self, params: dict, prompts: pipeline.Batch
  ) -> TrainBatch:
    """The prompts of a batch with the completions that came with them."""
    assert prompts.completion_ids is not None
    assert prompts.completion_mask is not None
    mask = prompts.completion_mask & prompts.valid[:, None, None]
    ids, mask = sharding.device_put_batch(
      self.sampler.mesh, (prompts.completion_ids, mask)
    )
    images = self.sampler.images(params, prompts)
    batch = self._make_batch(prompts, ids, mask, images)
    if not self.config.is_reward_model:
      return batch
    assert prompts.labels is not None
    labels = np.where(prompts.valid[:, None], prompts.labels, np.nan)
    labels = sharding.device_put_batch(self.sampler.mesh, labels)
    return batch.replace(labels=labels)

  def preference_groups(
    self, params: dict, prompts: pipeline.Batch, *, split: str = ""
  ) -> tuple[ScoredGroups, Bool[Array, "U C C"], Metrics]:
    """Labelled completions with their rewards, or with labels as rewards.

    Also `TrainBatch.preferred`, and the number of completions on which each
    reward failed. For `split` see `Combination.start`.
    """
    batch = self.labelled_completions(params, prompts)
    assert prompts.completion_ids is not None
    assert prompts.completion_mask is not None and prompts.labels is not None
    texts = self.sampler.decode(prompts.completion_ids, prompts.completion_mask)
    is_labelled = np.isfinite(prompts.labels)
    is_present = is_labelled & prompts.valid[:, None]
    completed = Completed(batch.completion_ids, batch.completion_mask, texts)
    join = self.combination.start(prompts, completed, is_present, split=split)
    scores = scoring.score(
      [text for group in texts for text in group],
      [x for x in prompts.problems for _ in range(is_labelled.shape[1])],
      self.config.rewards,
      is_present=is_present.ravel(),
      gather=self._gather,
    )
    scores = join(scores)
    rewards, valid = self.group_rewards(scores, prompts)
    valid &= is_labelled
    if self.config.label_rewards:
      rewards["total"] = np.where(valid, prompts.labels, 0).astype(np.float32)
      rewards["heuristics"] = np.zeros_like(rewards["total"])
    better = prompts.labels[:, :, None] > prompts.labels[:, None, :]
    preferred = better & valid[:, :, None] & valid[:, None, :]
    apart = self._apart(scores, is_present.shape)
    rows = rewards, valid, prompts.prompt_index, preferred, apart
    rows = sharding.device_put_batch(self.sampler.mesh, rows)
    rewards, valid, group, preferred, apart = rows
    mask = batch.completion_mask & valid[..., None]
    batch = batch.replace(completion_mask=mask)
    groups = ScoredGroups(batch, rewards, valid, group, apart)
    return groups, preferred, _error_counts(scores)

  def group_rewards(
    self, scores: scoring.Scores, prompts: pipeline.Batch
  ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`rewards` and `valid` of `ScoredGroups`, for this process's rows."""
    shape, weights = (len(prompts.valid), -1), self.config.rewards.weights
    named = scores.components | {
      "total": scores.total,
      "heuristics": sum(weights[x] * scores.terms[x] for x in HEURISTICS),
    }
    rewards = {
      name: np.asarray(values, np.float32).reshape(shape)
      for name, values in named.items()
    }
    return rewards, scores.valid.reshape(shape) & prompts.valid[:, None]

  def _apart(
    self, scores: scoring.Scores, shape: tuple[int, ...]
  ) -> dict[str, np.ndarray]:
    """`apart` of `ScoredGroups`, for this process's rows."""
    return {
      name: np.asarray(scores.terms[name], np.float32).reshape(shape)
      for name, _ in self.config.separate_weights
      if name in scores.terms
    }

  def _make_batch(
    self, prompts: pipeline.Batch, ids: Array, mask: Array, images: Any
  ) -> TrainBatch:
    """Puts prompts on the mesh; `images` None stands for their pixels."""
    put = functools.partial(sharding.device_put_batch, self.sampler.mesh)
    pixels, shown = None, images
    if images is None:
      shown = put(prompts.images)
    elif self.config.keeps_pixels:
      pixels = put(prompts.images)
    read, length = put((prompts.prompt_ids, prompts.prompt_length))
    return TrainBatch(read, length, shown, ids, mask, pixels=pixels)

  def _gather(self, rows: Any) -> Any:
    return sharding.all_rows(self.sampler.mesh, rows)

  def _reward_metrics(
    self,
    prompts: pipeline.Batch,
    groups: ScoredGroups,
    sampled: jax.Array | None = None,
  ) -> Metrics:
    """Metrics of rewards and records, and of what `sampled` rewards go with."""
    mesh, rewards = self.sampler.mesh, groups.rewards
    is_known = np.array([x.is_checkable for x in prompts.problems])
    has_known = bool(self._gather(is_known & prompts.valid).any())
    known = sharding.device_put_batch(mesh, is_known)[:, None] & groups.valid
    metrics = diagnostics.reward_statistics(
      rewards, groups.valid, known, groups.compared
    )
    if not has_known:
      metrics = {k: x for k, x in metrics.items() if k not in _ACCURACIES}
    watched = {name: rewards[name] for name in self.config.rewards.watched}
    if watched and sampled is not None:
      correct, ids = rewards["accuracy"] > 0.5, groups.batch.completion_ids
      metrics |= reward_health.reward_health(
        *(watched, ids, sampled, correct, known, groups.valid)
      )
    rows = {
      "reward": (rewards["total"], groups.valid),
      "accuracy": (rewards["accuracy"], known),
    }
    own = sharding.local_rows(mesh, rows) if prompts.sets else {}
    return {**metrics, **set_metrics.set_metrics(self._gather, prompts, own)}


_ACCURACIES = (
  *("rollout/accuracy", "reward/accuracy_mean", "reward/accuracy_std"),
)
_AVERAGED = (
  *("perf/rollout_tokens_per_second", "perf/live_row_share"),
  "perf/decode_bandwidth_share",
)


def _combine_metrics(metrics: list[Metrics]) -> Metrics:
  """Sums of seconds and counts over batches, means of the rest."""
  combined: Metrics = {"rollout/batches": len(metrics)}
  if len(metrics) == 1:
    return combined | metrics[0]
  fetched = jax.device_get(metrics)
  # A batch without a row of some data set has no metric of it.
  for name in dict.fromkeys(name for batch in metrics for name in batch):
    values = [batch[name] for batch in fetched if name in batch]
    values = np.array(values, np.float32)
    is_sum = name.endswith(("errors", "/skipped"))
    is_sum |= name.startswith("perf/") and name not in _AVERAGED
    combined[name] = values.sum() if is_sum else values.mean()
  return combined


def _error_counts(scores: scoring.Scores) -> Metrics:
  """Failures of each reward, and of all rewards together."""
  counts: Metrics = {f"reward/{k}_errors": x for k, x in scores.errors.items()}
  return counts | {"reward/errors": sum(scores.errors.values())}


@functools.partial(jax.jit, static_argnames=("max_length", "soft_tokens"))
def _penalise_length(rewards, mask, valid, *, max_length, soft_tokens):
  """Rewards with the length penalty, and its mean."""
  penalty = shaping.length_penalty(
    mask.sum(axis=-1), max_length=max_length, soft_tokens=soft_tokens
  )
  total = rewards["total"] + penalty
  rewards = rewards | {"total": total, "length_penalty": penalty}
  return rewards, diagnostics.valid_mean(penalty, valid)
