"""The run: prompts, experience, updates, metrics, checkpoints.

Choreography only; nothing is computed here. What a step does follows from the
settings, the state and the step's number, so that a run that was killed goes
on as if it had not been.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from data_pipelines import dataset, pipeline, validation
from grpo_tpu.checkpoint import checkpointer
from grpo_tpu.config import defaults
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import (
  compile_cache,
  initialize,
  preemption,
  preflight,
  sharding,
  watchdog,
)
from grpo_tpu.evaluation import evaluate, preferences
from grpo_tpu.observability import alarms, exit_report, run_record
from grpo_tpu.observability import profiler as profiling
from grpo_tpu.observability import writer as metrics
from grpo_tpu.rl import experience as experiences
from grpo_tpu.rl import (
  optimizer,
  partial_step,
  score,
  shaping,
  train_state,
)
from grpo_tpu.rl import policy as policies
from grpo_tpu.rl.train_batch import TrainBatch


def train(
  config: run_config.Config,
  workdir: str,
  data: dataset.Dataset,
  ending: exit_report.ExitReport,
) -> None:
  """Trains to `train.num_steps`, from the workdir's newest checkpoint if any.

  Raises:
    SettingError: A setting that only devices or the workdir can refute.
    Preempted: This machine will be taken away; all that was done is saved.
    Exception: Whatever else ended it, on a run of one process; of several, this
      one ends at once.
  """
  folder = pathlib.Path(workdir)
  with validation.user_errors():
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    run = _Run(config, workdir, data, mesh)
  ending.attach_run(folder)
  with (
    watchdog.Watchdog(
      folder / f"stacks.{jax.process_index()}.txt",
      seconds=config.distributed.watchdog_seconds,
      start_seconds=config.distributed.watchdog_start_seconds,
      report=ending.report_stuck,
    ) as watch,
    jax.set_mesh(mesh),
    checkpointer.Checkpoints(
      folder / "checkpoints", config.checkpoint
    ) as checkpoints,
  ):
    with validation.user_errors():
      state, start, begun = run.restored_or_new(checkpoints)
      said = {"step": start, "updates": begun.updates_done if begun else 0}
      preflight.check(
        "restored",
        {"checkpoint": said},
        timeout_seconds=config.distributed.preflight_timeout_seconds,
      )
      batches = run.batches(batches_taken(state, begun))
    # Not before: a run that was refused has not started.
    run.write_card()
    ending.has_run_record = True
    if start is not None:
      ending.clock.resume(folder / "metrics.jsonl", start)
    with (
      metrics.Writer(
        workdir,
        is_writer=jax.process_index() == 0,
        resume_step=start,
        has_partial_step=begun is not None,
      ) as writer,
      profiling.Profiler(folder, config.profile.steps) as profiler,
    ):
      writer.write_config(config.to_dict())
      loop = _Loop(run, writer, checkpoints, watch, ending, profiler)
      with ending.abort_peers_on_error():
        run.compile_ahead(state)
        if start is None:
          loop.begin(state)
        loop.go_on(state, start or 0, batches, begun)


def batches_taken(
  state: train_state.TrainState, begun: partial_step.BegunStep | None
) -> int:
  """Of prompts, so far; those of a begun step are not in the state yet."""
  return int(state.position) + (begun.num_batches if begun else 0)


class _Loop:
  """The steps of a run, and what watches over them."""

  def __init__(
    self,
    run: "_Run",
    writer: metrics.Writer,
    checkpoints: checkpointer.Checkpoints,
    watch: watchdog.Watchdog,
    ending: exit_report.ExitReport,
    profiler: profiling.Profiler,
  ):
    self._run, self._config, self._profiler = run, run.config, profiler
    self._writer, self._checkpoints = writer, checkpoints
    self._watch, self._ending, self._clock = watch, ending, ending.clock
    self._poll = preemption.Poll(on_poll=watch.mark)
    self._skipped_in_a_row = 0
    self._compilations = compile_cache.CompileCounter()
    # The policy did not sample the completions of preference data.
    self._alarms = alarms.Alarms(
      own_samples=self._config.data.kind != "preference"
    )

  def begin(self, state: train_state.TrainState) -> None:
    """What there is to say and to save before the first step."""
    self._clock.start_steps()
    scalars = jax.device_get(self._evaluated(state, 0))
    scalars |= self._clock.scalars()
    self._writer.write(0, scalars)
    self._writer.log_progress(self._config.train.num_steps)
    self._save(0, state, metrics=scalars, force=True)

  def go_on(
    self,
    state: train_state.TrainState,
    start: int,
    batches: Iterator[pipeline.Batch],
    begun: partial_step.BegunStep | None,
  ) -> None:
    """The steps after `start`, of which one may have been begun."""
    num_steps = self._config.train.num_steps
    self._ending.step = start
    if start >= num_steps:
      logging.info("Nothing left to do: step %d of %d.", start, num_steps)
      return
    self._clock.start_steps()
    for step in range(start + 1, num_steps + 1):
      with self._profiler.step(step):
        state, scalars = self._step(state, batches, step, begun)
      begun = None
      self._writer.write(step, scalars)
      self._writer.log_progress(num_steps)
      self._ending.step = step
      self._watch.end_startup()
      self._save(step, state, metrics=scalars, force=step == num_steps)
    with self._clock.phase("checkpoint"):
      self._checkpoints.wait()

  def _step(
    self,
    state: train_state.TrainState,
    batches: Iterator[pipeline.Batch],
    step: int,
    begun: partial_step.BegunStep | None,
  ) -> tuple[train_state.TrainState, metrics.Scalars]:
    """The state after a step, and what there is to say about it."""
    started = time.perf_counter()
    try:
      if begun is None:
        self._poll()
        begun = self._begun(state, batches, step)
      prepared = time.perf_counter()
      while begun.updates_done < self._config.train.num_iterations:
        if begun.updates_done:
          self._poll()
        with self._clock.phase("update"):
          state = self._run.updated(state, begun, step)
      done = time.perf_counter()
      self._give_up_if_skipped_too_often(step, begun.skipped)
      begun.scalars |= {
        "perf/update_seconds": done - prepared,
        "perf/step_seconds": done - started,
        "perf/tokens_per_second": float(begun.scalars["train/tokens"])
        / (done - started),
      }
      scalars = begun.scalars | self._evaluated(state, step)
    except preemption.Preempted:
      unfinished = begun.unfinished() if begun else None
      self._save(step - 1, state, partial_step=unfinished, force=True)
      with self._clock.phase("checkpoint"):
        self._checkpoints.wait()
      raise
    state = state.replace(
      step=state.step + 1, position=state.position + begun.num_batches
    )
    scalars["train/skipped_updates"] = sum(begun.skipped)
    scalars |= initialize.straggler_metrics(self._clock.alone_seconds())
    scalars |= self._compilations.scalars() | self._clock.scalars()
    scalars = jax.device_get(scalars)
    if jax.process_index() == 0:
      self._alarms.check(step, scalars)
    scalars |= self._checkpoints.scalars()
    return state, scalars | {"perf/write_failures": self._writer.failures}

  def _begun(
    self,
    state: train_state.TrainState,
    batches: Iterator[pipeline.Batch],
    step: int,
  ) -> partial_step.BegunStep:
    """A step with its experience, and none of its updates."""
    with self._clock.phase("rollout"):
      experience = self._run.experience(state, batches, step, self._poll)
    self._clock.reassign("rollout", "data", experience.seconds("data"))
    self._clock.reassign("rollout", "reward", experience.seconds("reward"))
    with self._clock.phase("update"):
      bundles = self._run.compared(state, experience.bundles)
    self._writer.write_samples(step, experience.samples, split="train")
    return partial_step.BegunStep(
      bundles, experience.num_batches, experience.scalars, []
    )

  def _give_up_if_skipped_too_often(
    self, step: int, skipped: list[float]
  ) -> None:
    most = 0
    for flag in skipped:
      self._skipped_in_a_row = self._skipped_in_a_row + 1 if flag else 0
      most = max(most, self._skipped_in_a_row)
    count = int(sum(skipped))
    if not count:
      return
    self._ending.skipped_updates += count
    limit = self._config.train.max_skipped_updates
    logging.warning(
      "Step %d skipped %d updates, whose gradients were not finite: %d in a row"
      " of the %d that train.max_skipped_updates allows.",
      step,
      count,
      most,
      limit,
    )
    if most >= limit:
      raise FloatingPointError(
        f"{most} updates in a row had gradients that were not"
        f" finite, up to step {step}, and train.max_skipped_updates ({limit})"
        " allows no more. They have changed nothing: lower"
        " optimizer.learning_rate, or look at the samples of these steps."
      )

  def _evaluated(
    self, state: train_state.TrainState, step: int
  ) -> metrics.Scalars:
    with self._clock.phase("evaluate"):
      return self._run.evaluated(state, step, self._writer, self._poll)

  def _save(
    self, step: int, state: train_state.TrainState, **settings: Any
  ) -> None:
    with self._clock.phase("checkpoint"):
      self._checkpoints.save(step, state, self._run.checkpoint_meta, **settings)


class _Run:
  """What stays the same from step to step, and what each step does with it."""

  def __init__(
    self,
    config: run_config.Config,
    workdir: str,
    data: dataset.Dataset,
    mesh: Mesh,
  ):
    """Names the run; keeps the policy it starts from where that is of use."""
    record = run_record.RunRecord(
      workdir,
      config.to_dict(),
      defaults=defaults.get_config().to_dict(),
      data=data.identity,
    )
    record.check()
    self._check_data = record.check_data
    saved = run_record.read(workdir)
    weights = saved["weights"] if saved else policies.resolved_weights(config)
    self._write_card = functools.partial(record.write, weights)
    settings = dataclasses.replace(config.model, weights=weights)
    self.config = dataclasses.replace(config, model=settings)
    self.data = data
    self.policy = policies.Policy(self.config, mesh, data.tokenizer)
    self._key = jax.random.key(config.seed)
    self._schedule = optimizer.make_schedule(config.optimizer_config)
    model, num_microbatches = self.policy.model, config.num_microbatches
    self._scoring = compile_cache.AotJit(
      jax.jit(
        lambda params, bundles: score.score_batch(
          model, params, bundles, num_microbatches=num_microbatches
        )
      )
    )
    # Of the batches to come, until what they need is compiled.
    self._shapes: set[tuple[int, int]] = set()
    self._update = compile_cache.AotJit(self.policy.make_update())
    shards, shard_count = sharding.data_shards(mesh)
    self._shards = {"shards": shards, "shard_count": shard_count}
    size = {
      "num_problems": self.config.eval.num_problems,
      "batch_size": self.config.eval.batch_size,
    }
    self._eval_batches = data.eval_batches(**size, **self._shards)
    self._preference_batches = (
      data.preference_batches(
        **size,
        max_new_tokens=self.config.rollout.max_new_tokens,
        **self._shards,
      )
      if config.data.kind == "preference"
      else None
    )
    self._is_off_policy = (
      config.train.num_iterations > 1 and config.data.kind == "online"
    )
    self._has_reference = config.has_reference
    start = (
      self.policy.initial_params()
      if self._has_reference or config.lora
      else None
    )
    # Under adapters lies the reference itself, and no second copy of it.
    self._frozen = start if config.lora else None
    if start is not None and not config.lora:
      start = self.policy.reference(start)
    self._reference = start if self._has_reference else None

  @property
  def checkpoint_meta(self) -> dict[str, Any]:
    """What a checkpoint says beside the state: of adapters, whose they are."""
    config = self.config
    if config.lora is None:
      return self.data.identity
    whose = {"weights": config.model.weights}
    return self.data.identity | {
      "lora": dataclasses.asdict(config.lora) | whose
    }

  def write_card(self) -> None:
    """Says in the workdir what it is a run of."""
    if jax.process_index() == 0:
      self._write_card()

  def restored_or_new(
    self, checkpoints: checkpointer.Checkpoints
  ) -> tuple[train_state.TrainState, int | None, partial_step.BegunStep | None]:
    """The newest state, its step, and what was begun of the next.

    A new state and None if there is none.
    """
    place = sharding.batch_sharding(self.policy.mesh)
    restored = checkpoints.restore(
      self.policy.abstract_state(), partial_step_sharding=place
    )
    if restored:
      self._check_data(restored.meta)
      unfinished = restored.partial_step
      begun = unfinished and partial_step.BegunStep.of(unfinished, place)
      return restored.state, restored.step, begun
    abstract = self.policy.abstract_state()
    lora_config = self.config.lora
    params = (
      self.policy.initial_adapters(lora_config)
      if lora_config
      else self.policy.initial_params()
    )
    init = jax.jit(
      self.policy.tx.init,
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract.opt_state),
    )
    # Two arrays, for an update takes over the memory of each.
    step, position = (
      jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
      for _ in range(2)
    )
    state = train_state.TrainState(step, position, params, init(params))
    return state, None, None

  def _params(self, state: train_state.TrainState) -> dict:
    """What runs the network: of a state with adapters, these where they go."""
    return self.policy.run_params(state.params, self._frozen)

  def batches(self, position: int) -> Iterator[pipeline.Batch]:
    """This process's part of the batches after the first `position`."""
    batches = self.data.train_batches(
      seed=self.config.seed,
      max_new_tokens=self.config.rollout.max_new_tokens,
      start_step=position,
      **self._shards,
    )
    shaping_config, num_steps = self.config.shaping, self.config.train.num_steps
    if shaping_config.zero_variance == "resample":
      num_steps *= shaping_config.max_batches
    self._shapes = batches.shapes(max(num_steps - position, 1))
    return batches

  def compile_ahead(self, state: train_state.TrainState) -> None:
    """Compiles what samples, for every shape of prompts that is to come.

    An update is compiled for those that the first one has not, after it.
    """
    params, config = self._params(state), self.config
    if config.data.kind == "online":
      self.policy.prepare_sampling(
        params,
        self._shapes,
        num_prompts=config.data.prompts_per_step,
        num_completions=config.rollout.num_generations,
        temperature=config.rollout.temperature,
        num_parts=config.num_rollouts,
      )
    if config.eval.every_steps:
      self.policy.prepare_sampling(
        params,
        self._eval_batches.shapes(),
        num_prompts=config.eval.batch_size,
        num_completions=1,
        temperature=0.0,
      )

  def _prepare(
    self,
    program: compile_cache.AotJit,
    first: Any,
    bundles: TrainBatch,
    *rest: Any,
  ) -> None:
    """Compiles what runs on bundles like these, for all shapes to come."""
    ids, images = bundles.prompt_ids, bundles.images
    for width, slots in sorted(
      self._shapes - {(ids.shape[1], images.shape[1])}
    ):
      other = _abstract(bundles).replace(
        prompt_ids=_resized(ids, width), images=_resized(images, slots)
      )
      program.prepare(_abstract(first), other, *_abstract(rest))

  def experience(
    self,
    state: train_state.TrainState,
    batches: Iterator[pipeline.Batch],
    step: int,
    poll: Callable[[], None],
  ) -> experiences.Experience:
    """What the step learns from."""
    if self.config.data.kind != "online":
      return experiences.offline(self.policy, self._params(state), batches)
    every = self.config.samples.every_steps
    return experiences.online(
      self.policy,
      self._params(state),
      batches,
      self._key,
      position=int(state.position),
      num_samples=self.config.samples.count
      if every and step % every == 0
      else 0,
      poll=poll,
    )

  def updated(
    self,
    state: train_state.TrainState,
    begun: partial_step.BegunStep,
    step: int,
  ) -> train_state.TrainState:
    """The state after the next of `num_iterations` updates on one batch."""
    if not begun.updates_done:
      first_update = (step - 1) * self.config.train.num_iterations
      begun.scalars["train/learning_rate"] = jnp.asarray(
        self._schedule(first_update)
      )
    state, update = self._update(state, begun.bundles, self._frozen)
    self._prepare(self._update, state, begun.bundles, self._frozen)
    self._shapes = set()  # The first update has prepared all there are.
    begun.scalars |= {f"train/{name}": value for name, value in update.items()}
    jax.block_until_ready(state)
    begun.skipped.append(float(update["skipped_updates"]))
    return state

  def compared(
    self, state: train_state.TrainState, bundles: TrainBatch
  ) -> TrainBatch:
    """Bundles with what other policies, or this one now, say of them."""
    kind, share = self.config.data.kind, self.config.shaping.top_entropy_share
    if self._reference is not None:
      reference = self.policy.on_device(self._reference)
      frozen, _ = self._score(reference, bundles)
      bundles = bundles.replace(
        ref_per_token_logps=frozen,
        # The frozen start stands for whoever wrote the completions.
        old_per_token_logps=frozen if kind == "preference" else None,
      )
    is_narrowed = share < 1 and kind != "demonstrations"
    if self._is_off_policy or is_narrowed:
      old, entropy = self._score(self._params(state), bundles)
      if self._is_off_policy:
        bundles = bundles.replace(old_per_token_logps=old)
      if is_narrowed:
        bundles = bundles.replace(
          token_weights=_top_entropy_weights(
            entropy, bundles.completion_mask, share=share
          )
        )
    return partial_step.laid_out(
      bundles, sharding.batch_sharding(self.policy.mesh)
    )

  def _score(
    self, params: dict, bundles: TrainBatch
  ) -> tuple[jax.Array, jax.Array]:
    scored = self._scoring(params, bundles)
    self._prepare(self._scoring, params, bundles)
    return scored

  def evaluated(
    self,
    state: train_state.TrainState,
    step: int,
    writer: metrics.Writer,
    poll: Callable[[], None],
  ) -> metrics.Scalars:
    """Held-out scalars, if the step is due for them; samples are written."""
    every = self.config.eval.every_steps
    is_last = step == self.config.train.num_steps
    if not every or (step % every and not is_last):
      return {}
    start = time.perf_counter()
    params = self._params(state)
    result = evaluate.evaluate(
      self.policy,
      params,
      self._eval_batches,
      num_samples=self.config.samples.count,
      poll=poll,
    )
    writer.write_samples(step, result.samples, split="eval")
    scalars = result.scalars
    if self._preference_batches is not None:
      assert self._reference is not None
      scalars |= preferences.evaluate(
        self.policy,
        params,
        self.policy.on_device(self._reference),
        self._preference_batches,
      )
    return scalars | {"perf/eval_seconds": time.perf_counter() - start}


def _abstract(tree: Any) -> Any:
  """The shapes and places of arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding if x.committed else None
    ),
    tree,
  )


def _resized(x: jax.Array, width: int) -> Any:
  """The shape and place of an array, its second axis another."""
  shape = (x.shape[0], width, *x.shape[2:])
  return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)


@functools.partial(jax.jit, static_argnames=("share",))
def _top_entropy_weights(
  entropy: jax.Array, mask: jax.Array, *, share: float
) -> jax.Array:
  return shaping.top_entropy(entropy, mask, share=share).astype(jnp.float32)
