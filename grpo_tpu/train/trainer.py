"""The three verbs of a GRPO step: collect, score, update.

Builds the parts of a run from its settings. Knows nothing of files: what
writes, saves and watches stands in `setup`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from data_pipelines import dataset, pipeline, record_index, validation
from grpo_tpu.checkpoint import load
from grpo_tpu.checkpoint.frozen import Frozen
from grpo_tpu.config import eval_metrics
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import activity, compile_cache, sharding
from grpo_tpu.evaluation import (
  eval_sets,
  evaluate,
  preferences,
  reward_models,
)
from grpo_tpu.models.gemma3 import lora
from grpo_tpu.models.gemma3.embedding import output_embedding
from grpo_tpu.observability import goodput, writer
from grpo_tpu.observability.sample_files import Sample
from grpo_tpu.rewards.judge import open_judges
from grpo_tpu.rewards.model import open_models
from grpo_tpu.rl import optimizer, pictures, score, shaping
from grpo_tpu.rl.experience import Collector
from grpo_tpu.rl.learner import Learner
from grpo_tpu.rl.partial_step import PartialStep
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rl.train_state import TrainState
from grpo_tpu.rollout import generate
from grpo_tpu.rollout.sampler import Sampler
from grpo_tpu.train.skipped_updates import SkippedUpdates

_top_entropy = jax.jit(shaping.top_entropy, static_argnames="share")


class Trainer:
  """Trains a policy, step by step. Call it inside `jax.set_mesh(mesh)`.

  Attributes:
    state: The newest state, which a preemption saves; after a step's updates,
      still without the step counted.
    partial: The step under way, from its batch on; None between steps.
    skipped_updates: Counts updates whose gradients were not finite.
    write_samples: Called with step and samples; does nothing unless it is set.
  """

  def __init__(
    self,
    config: Config,
    data: dataset.Dataset,
    mesh: Mesh,
    *,
    poll: Callable[[], None] = generate.no_poll,
    clock: goodput.Clock | None = None,
  ):
    """Loads frozen parameters; `config.model.weights` must name its step.

    `poll` is called where a step can be interrupted, and raises to do so.
    """
    self.config, self.mesh = config, mesh
    self._poll, self._clock = poll, clock or goodput.Clock()
    self._key = jax.random.key(config.seed)
    self._schedule = optimizer.make_schedule(config.optimizer_config)
    self.sampler = Sampler(config.model, config.rollout, mesh, data.tokenizer)
    params, forward, frozen_start = None, self.sampler.forward, None
    if config.needs_start or config.lora:
      # Adapters of an earlier run stay beside their base, in the base of ours.
      load_start = load.load_params if config.lora else load.load_merged
      params = load_start(config.model, mesh)
      if config.needs_start:
        # With adapters, the reference is their base itself and no copy of it,
        # with those of `model.lora.init`, if any, as they were at the start.
        start, lora_config = params, config.model.lora
        if lora_config.init:
          first = load.initial_adapters(config.model, mesh, seed=config.seed)
          start = lora.with_adapters(params, first, lora_config)
        frozen_start = Frozen(
          start,
          mesh,
          dtype=config.model.reference_type,
          memory=config.model.reference_memory,
          setting="model.reference_memory",
        )
    self._reference = frozen_start if config.has_reference else None
    self._teacher = self._teacher_embedding = None
    if config.distills:
      params_of_teacher = load.load_merged(config.teacher, mesh)
      # Every update reads it, wherever the rest is.
      self._teacher_embedding = output_embedding(params_of_teacher)
      self._teacher = Frozen(
        params_of_teacher,
        mesh,
        dtype=config.teacher.param_dtype,
        memory=config.rewards.network_memory,
        setting="rewards.network_memory",
      )
    reads = {
      "bundles_at_a_time": config.train.microbatch_bundles,
      "pan_and_scan": config.data.pan_and_scan,
    }
    self._reward_models = open_models(
      config.rewards,
      config.model,
      mesh,
      images_per_shard=config.rollout.pictures_per_shard,
      **reads,
    )
    judges = open_judges(
      *(config.rewards, config.model, frozen_start, data.tokenizer, mesh),
      longest_prompt=config.data.prompt_buckets[-1],
      longest_completion=config.rollout.max_new_tokens,
      **reads,
    )
    rewards = [*self._reward_models, *judges]
    self.collector = Collector(self.sampler, config.collector_config, rewards)
    self.learner = Learner(
      config.model,
      forward,
      mesh,
      config.learner_config,
      frozen=params if config.lora else None,
    )
    score_batch = functools.partial(
      score.score_batch, num_microbatches=config.num_microbatches
    )
    of_policy = functools.partial(score_batch, forward)
    self._score_batch = compile_cache.AotJit(jax.jit(of_policy))
    if config.distills:
      theirs = forward.replace(config=config.teacher.network)
      of_teacher = functools.partial(score_batch, theirs, gives_states=True)
      self._read_batch = compile_cache.AotJit(jax.jit(of_teacher))
    self._data = data
    sets = eval_sets.open_sets(config, data)
    with_pairs = {"": data} if config.data.kind == "preference" else {}
    if config.objective.is_reward_model:
      sets, with_pairs = {}, sets
    self._eval_batches, self._pair_batches = (
      {
        name: evaluate.make_batches(each, config, mesh, name, labelled=labelled)
        for name, each in group.items()
      }
      for group, labelled in ((sets, False), (with_pairs, True))
    )
    # Prompt shapes to come, until their programs are compiled.
    self._shapes: set[record_index.BatchShape] = set()
    self._prompts: Iterator[pipeline.Batch] = iter(())
    self._step: int | None = None
    self.state: TrainState | None = None
    self.partial: PartialStep | None = None
    self.skipped_updates = SkippedUpdates(config.train.max_skipped_updates)
    self.write_samples: Callable[[int, list[Sample]], None] = (
      lambda step, samples: None
    )

  def init(self, params: dict | None = None) -> TrainState:
    """The state before the first step; data are read from their beginning."""
    model, seed = self.config.model, self.config.seed
    if params is None and self.config.lora:
      params = load.initial_adapters(
        model, self.mesh, seed=seed, frozen=self.learner.frozen
      )
    elif params is None:
      # Masters start from what the files hold, before it is rounded.
      finest = dataclasses.replace(model, param_dtype="float32")
      params = load.load_merged(finest, self.mesh)
    state = self.learner.init(params)
    self.resume(state)
    return state

  def resume(
    self, state: TrainState, partial: PartialStep | None = None
  ) -> None:
    """Reads data from where `state`, and the step under way, have come to."""
    self.state, self.partial, self._step = state, partial, None
    position = int(state.position) + (partial.num_batches if partial else 0)
    shards, shard_count = sharding.data_shards(self.mesh)
    with validation.user_errors():
      batches = self._data.train_batches(
        seed=self.config.seed,
        max_new_tokens=self.config.rollout.max_new_tokens,
        start_step=position,
        shards=shards,
        shard_count=shard_count,
      )
    num_batches = self.config.train.num_steps
    if self.config.shaping.zero_variance == "resample":
      num_batches *= self.config.shaping.max_batches
    self._shapes = batches.shapes(max(num_batches - position, 1))
    self._prompts = batches

  def compile_ahead(self, state: TrainState) -> None:
    """Compiles the sampler's programs for every prompt shape to come.

    The first update, and the first scoring, compile theirs for further shapes.
    """
    params, config = self.learner.params(state), self.config
    plans: list[tuple[set[record_index.BatchShape], dict[str, Any]]] = []
    if config.data.kind == "online":
      rollout = {
        "num_prompts": config.data.prompts_per_step,
        "num_completions": config.rollout.num_generations,
        "temperature": config.rollout.temperature,
        "num_parts": config.num_rollouts,
      }
      plans.append((self._shapes, rollout))
    if config.eval.every_steps:
      shapes = set().union(*(x.shapes() for x in self._eval_batches.values()))
      batch = {"num_prompts": config.eval.batch_size}
      plans += [(shapes, batch | way) for way in config.eval.ways]
    models = self._reward_models
    total = sum(self.sampler.num_programs(x, **how) for x, how in plans)
    total += sum(len({s[:2] for s in x}) for x, _ in plans) * len(models)
    folder = compile_cache.describe_folder()
    logging.info("Compiling %d programs (%s).", total, folder)
    with activity.doing("Compiling", total=total, unit="programs"):
      for shapes, how in plans:
        self.sampler.compile_ahead(params, shapes, **how)
        for each in models:
          each.compile_ahead(
            {shape[:2] for shape in shapes},
            *(how["num_prompts"], how["num_completions"]),
            config.rollout.max_new_tokens,
          )

  def collect(
    self, state: TrainState, step: int
  ) -> tuple[TrainBatch, writer.Scalars]:
    """The batch with advantages; a step that resumes has it already."""
    self._start = time.perf_counter()
    if self._step is not None:
      self.partial = None  # The step before is over.
    self._step, self.state = step, state
    if self.partial is None:
      self._poll()
      self.partial = self._collect(state, step)
    batch = pictures.with_num_encoded(self.partial.batch, self.mesh)
    return batch, self.partial.metrics

  def _collect(self, state: TrainState, step: int) -> PartialStep:
    samples, every = self.config.samples, self.config.samples.every_steps
    with self._clock.phase("rollout"):
      experience = self.collector.collect(
        self.learner.params(state),
        self._prompts,
        self._key,
        position=int(state.position),
        num_shown=samples.count if every and step % every == 0 else None,
        poll=self._poll,
      )
    metrics = experience.metrics
    if index := self._data.train_index:
      position = int(state.position) + experience.num_batches
      asked = position * self.config.data.prompts_per_step
      metrics["data/epoch"] = asked / len(index.usable)
    for phase in ("data", "reward"):
      seconds = float(metrics.get(f"perf/{phase}_seconds", 0.0))
      self._clock.reassign("rollout", phase, seconds)
    if experience.samples:
      self.write_samples(step, experience.samples)
    return PartialStep(experience.batch, experience.num_batches, metrics, [])

  def score(self, state: TrainState, batch: TrainBatch) -> TrainBatch:
    """Adds reference and old log-probabilities, and entropy weights."""
    assert self.partial is not None
    if not self.partial.updates_done:
      with self._clock.phase("update"):
        batch = self._add_logps(state, batch)
      self.partial.batch = batch
    self._scored = time.perf_counter()
    return batch

  def _add_logps(self, state: TrainState, batch: TrainBatch) -> TrainBatch:
    kind, share = self.config.data.kind, self.config.shaping.top_entropy_share
    if self._reference is not None:
      params = self._reference.params
      ref_logps, _ = self._run(self._score_batch, params, batch)
      batch = batch.replace(
        ref_per_token_logps=ref_logps,
        # The frozen start stands for whoever wrote the completions.
        old_per_token_logps=ref_logps if kind == "preference" else None,
      )
    if self._teacher is not None:
      shown = batch
      if batch.pixels is not None:
        shown = batch.replace(images=batch.pixels, pixels=None)
        shown = pictures.with_num_encoded(shown, self.mesh)
      states = self._run(self._read_batch, self._teacher.params, shown)
      batch = batch.replace(teacher_states=states, pixels=None)
    is_off_policy = self.config.train.num_iterations > 1 and kind == "online"
    is_policy = not self.config.objective.is_reward_model
    weighs_entropy = share < 1 and kind != "demonstrations" and is_policy
    if is_off_policy or weighs_entropy:
      params = self.learner.params(state)
      old_logps, entropy = self._run(self._score_batch, params, batch)
      if is_off_policy:
        batch = batch.replace(old_per_token_logps=old_logps)
      if weighs_entropy:
        is_top = _top_entropy(entropy, batch.completion_mask, share=share)
        batch = batch.replace(token_weights=is_top.astype(jnp.float32))
    # Updates compile for shardings, which must not depend on interruptions. A
    # compiled program would do this once for each shape.
    return jax.device_put(batch, sharding.batch_sharding(self.mesh))

  def _run(
    self, program: compile_cache.AotJit, params: dict, batch: TrainBatch
  ) -> Any:
    found = program(params, batch)
    self._compile_for_shapes(program, params, batch)
    return found

  def update(
    self, state: TrainState, batch: TrainBatch
  ) -> tuple[TrainState, writer.Scalars]:
    """Updates the policy `train.num_iterations` times on one batch.

    Returns the state after the step, and all metrics of the step so far.

    Raises:
      FloatingPointError: Too many gradients in a row were not finite.
    """
    partial, step = self.partial, self._step
    assert partial is not None and step is not None
    if not partial.updates_done:
      num_updates = int(optimizer.num_updates(state.opt_state))
      learning_rate = jnp.asarray(self._schedule(num_updates))
      partial.metrics["train/learning_rate"] = learning_rate
    while partial.updates_done < self.config.train.num_iterations:
      if partial.updates_done:
        self._poll()
      number = (
        f"{partial.updates_done + 1} of {self.config.train.num_iterations}"
      )
      with self._clock.phase("update"), activity.doing(f"update {number}"):
        state = self._update_once(state, batch, step)
    self.skipped_updates.check(step, partial.skipped)
    lost_fraction = self.learner.lost_fraction(state)
    end, tokens = time.perf_counter(), float(partial.metrics["train/tokens"])
    partial.metrics |= {
      "perf/update_seconds": end - self._scored,
      "perf/step_seconds": end - self._start,
      "perf/tokens_per_second": tokens / (end - self._start),
      "train/skipped_updates": sum(partial.skipped),
      "train/update_below_half_ulp_fraction": lost_fraction,
    }
    state = state.replace(
      step=state.step + 1, position=state.position + partial.num_batches
    )
    return state, partial.metrics

  def _update_once(
    self, state: TrainState, batch: TrainBatch, step: int
  ) -> TrainState:
    learner, partial = self.learner, self.partial
    assert partial is not None
    constants = learner.frozen, self._teacher_embedding
    state, metrics = learner.update(state, batch, *constants)
    self.state = state  # The update has taken over the memory of the old one.
    self._compile_for_shapes(learner.update, state, batch, *constants)
    self._shapes = set()  # The first update compiles for all of them.
    partial.metrics |= {f"train/{name}": x for name, x in metrics.items()}
    if self._teacher is not None and not partial.updates_done:
      # Of the policy that sampled.
      partial.metrics["train/teacher_kl"] = metrics["kl"]
    jax.block_until_ready(state)
    partial.skipped.append(float(metrics["skipped_updates"]))
    return state

  def evaluate(self, state: TrainState) -> tuple[writer.Scalars, list[Sample]]:
    """Metrics on held-out data, and completions of the run's own eval split."""
    params, metrics = self.learner.params(state), dict[str, writer.Scalar]()
    shown = list[Sample]()
    for name, batches in self._eval_batches.items():
      result = evaluate.evaluate_set(
        self.sampler,
        params,
        batches,
        self.config,
        name=name,
        num_shown=0 if name else self.config.samples.count,
        poll=self._poll,
        combination=self.collector.combination,
      )
      metrics |= eval_metrics.of_set(result.scalars, name)
      shown += result.shown
    for name, batches in self._pair_batches.items():
      if self._reference is None:
        figures = reward_models.evaluate(self.collector, params, batches)
        metrics |= eval_metrics.of_set(figures["scalars"], name)
      else:
        metrics |= preferences.evaluate_preferences(
          self.collector, params, self._reference.params, batches
        )
    return metrics, shown

  def _compile_for_shapes(
    self, program: compile_cache.AotJit, first: Any, batch: Any, *rest: Any
  ) -> None:
    """Compiles a program for the prompt shapes to come, after a call of it."""
    abstract, others = _abstract(batch), {}
    ids, images = abstract.prompt_ids, abstract.images
    for length, per_row, num_images in sorted(self._shapes):
      other = abstract.replace(
        prompt_ids=ids.update(shape=(len(batch.prompt_ids), length)),
        images=images.update(
          shape=(images.shape[0], per_row, *images.shape[2:])
        ),
      )
      other = pictures.with_num_encoded(other, self.mesh, num_images)
      others[length, per_row, other.num_encoded] = other
    others.pop((ids.shape[1], images.shape[1], batch.num_encoded), None)
    for other in others.values():
      program.prepare(_abstract(first), other, *_abstract(rest))
      if pictures.has_pixels(other):
        pictures.count_images.prepare(other.prompt_ids)


def _abstract(tree: Any) -> Any:
  """Shapes, types and shardings of arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding if x.committed else None
    ),
    tree,
  )
