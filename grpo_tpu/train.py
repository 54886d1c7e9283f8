"""The run: prompts, experience, updates, metrics, checkpoints.

Choreography only; nothing is computed here. What a step does follows from the
settings, the state and the step's number, so that a run that was killed goes
on as if it had not been.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from data_pipelines import pipeline
from grpo_tpu import (
  checkpoint,
  compilation,
  dataset,
  evaluate,
  metrics,
  optimizer,
  run_card,
  sharding,
  train_state,
  train_step,
)
from grpo_tpu import config as run_config
from grpo_tpu import experience as experiences
from grpo_tpu import policy as policies


def train(
  config: run_config.Config, workdir: str, data: dataset.Dataset
) -> None:
  """Trains to `train.num_steps`, from the workdir's newest checkpoint if any.

  Raises:
    SettingError: A setting that only devices or the workdir can refute.
  """
  with run_config.refutable():
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    run = _Run(config, workdir, data, mesh)
  with (
    jax.set_mesh(mesh),
    checkpoint.Checkpoints(
      pathlib.Path(workdir) / "checkpoints",
      every_steps=config.checkpoint.every_steps,
      keep=config.checkpoint.keep,
    ) as checkpoints,
  ):
    with run_config.refutable():
      state, start = run.restored_or_new(checkpoints)
      batches = run.batches(start or 0)
    # Not before: a run that was refused has not started.
    run.write_card()
    with metrics.Writer(
      workdir, is_writer=jax.process_index() == 0, resume_step=start
    ) as writer:
      writer.write_config(config.to_dict())
      if start is None:
        writer.write(0, run.evaluated(state, 0, writer))
        writer.progress(config.train.num_steps)
        checkpoints.save(0, state, data.identity, force=True)
      _loop(run, state, start or 0, batches, writer, checkpoints)


def _loop(
  run: "_Run",
  state: train_state.TrainState,
  start: int,
  batches: Iterator[pipeline.Batch],
  writer: metrics.Writer,
  checkpoints: checkpoint.Checkpoints,
) -> None:
  num_steps = run.config.train.num_steps
  if start >= num_steps:
    logging.info("Nothing left to do: step %d of %d.", start, num_steps)
    return
  compilations = compilation.Counter()
  for step in range(start + 1, num_steps + 1):
    started = time.perf_counter()
    batch = next(batches)
    read = time.perf_counter()
    experience = run.experience(state, batch, step)
    prepared = time.perf_counter()
    state, scalars = run.updated(state, experience, step)
    done = time.perf_counter()
    scalars |= experience.scalars
    scalars |= {
      "perf/data_seconds": read - started,
      "perf/update_seconds": done - prepared,
      "perf/step_seconds": done - started,
      "perf/tokens_per_second": float(scalars["train/tokens"])
      / (done - started),
    }
    scalars |= run.evaluated(state, step, writer)
    writer.write_samples(step, experience.samples, split="train")
    writer.write(step, scalars | compilations.scalars())
    writer.progress(num_steps)
    checkpoints.save(step, state, run.data.identity, force=step == num_steps)


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
    card = run_card.read(workdir)
    run_card.check(card, config, data.identity, workdir)
    weights = card["weights"] if card else policies.resolved_weights(config)
    self._write_card = functools.partial(
      run_card.write, workdir, config, data.identity, weights
    )
    settings = dataclasses.replace(config.model, weights=weights)
    self.config = dataclasses.replace(config, model=settings)
    self.data = data
    self.policy = policies.Policy(self.config, mesh, data.tokenizer)
    self._key = jax.random.key(config.seed)
    self._tx = optimizer.make_optimizer(
      config.optimizer_config,
      is_frozen=lambda path: (
        path.startswith("vision_encoder") and not config.model.train_vision
      ),
    )
    self._schedule = optimizer.make_schedule(config.optimizer_config)
    is_online = config.data.kind == "online"
    self._update = train_step.make_train_step(
      self.policy.model,
      self._tx,
      config=None
      if config.data.kind == "demonstrations"
      else config.objective_config,
      num_microbatches=config.num_microbatches,
    )
    shard_index, shard_count = sharding.data_shard(mesh)
    self._shard = {"shard_index": shard_index, "shard_count": shard_count}
    self._eval_batches = data.eval_batches(self.config, **self._shard)
    self._is_off_policy = config.train.num_iterations > 1 and is_online
    self._has_reference = config.data.kind == "preference" or (
      is_online and config.objective_config.beta > 0
    )
    self._reference = (
      self.policy.initial_params() if self._has_reference else None
    )

  def write_card(self) -> None:
    """Says in the workdir what it is a run of."""
    if jax.process_index() == 0:
      self._write_card()

  def restored_or_new(
    self, checkpoints: checkpoint.Checkpoints
  ) -> tuple[train_state.TrainState, int | None]:
    """The newest state and its step; a new one and None if there is none."""
    restored = checkpoints.restore(self._abstract_state())
    if restored:
      state, _ = restored
      return state, int(state.step)
    abstract = self._abstract_state()
    params = self.policy.initial_params()
    init = jax.jit(
      self._tx.init,
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract.opt_state),
    )
    step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
    return train_state.TrainState(step, params, init(params)), None

  def _abstract_state(self) -> train_state.TrainState:
    def new(params):
      step = jnp.zeros((), jnp.int32)
      return train_state.TrainState(step, params, self._tx.init(params))

    abstract = jax.eval_shape(new, self.policy.abstract_params())
    return self.policy.placed_shapes(abstract)

  def batches(self, start: int) -> Iterator[pipeline.Batch]:
    """This process's part of the batches of step `start + 1` and on."""
    return self.data.train_batches(self.config, start_step=start, **self._shard)

  def experience(
    self, state: train_state.TrainState, batch: pipeline.Batch, step: int
  ) -> experiences.Experience:
    """What the step learns from."""
    if self.config.data.kind != "online":
      return experiences.offline(self.policy, batch)
    every = self.config.samples.every_steps
    return experiences.online(
      self.policy,
      state.params,
      batch,
      jax.random.fold_in(self._key, step),
      num_samples=self.config.samples.count
      if every and step % every == 0
      else 0,
    )

  def updated(
    self,
    state: train_state.TrainState,
    experience: experiences.Experience,
    step: int,
  ) -> tuple[train_state.TrainState, metrics.Scalars]:
    """The state after `num_iterations` updates on one batch."""
    bundles = experience.bundles
    if self._reference is not None:
      frozen = self._score(self._reference, bundles)
      is_preference = self.config.data.kind == "preference"
      bundles = bundles.replace(
        ref_per_token_logps=frozen,
        # The frozen start stands for whoever wrote the completions.
        old_per_token_logps=frozen if is_preference else None,
      )
    if self._is_off_policy:
      old = self._score(state.params, bundles)
      bundles = bundles.replace(old_per_token_logps=old)
    first_update = (step - 1) * self.config.train.num_iterations
    scalars: dict[str, metrics.Scalar] = {
      "train/learning_rate": jnp.asarray(self._schedule(first_update))
    }
    for _ in range(self.config.train.num_iterations):
      state, update = self._update(state, bundles)
      scalars |= {f"train/{name}": value for name, value in update.items()}
    state = state.replace(step=state.step + 1)
    jax.block_until_ready(state)
    return state, scalars

  def _score(self, params: dict, bundles: train_step.Bundles) -> jax.Array:
    return train_step.score(
      self.policy.model,
      params,
      bundles,
      num_microbatches=self.config.num_microbatches,
    )

  def evaluated(
    self, state: train_state.TrainState, step: int, writer: metrics.Writer
  ) -> metrics.Scalars:
    """Held-out scalars, if the step is due for them; samples are written."""
    every = self.config.eval.every_steps
    is_last = step == self.config.train.num_steps
    if not every or (step % every and not is_last):
      return {}
    start = time.perf_counter()
    result = evaluate.evaluate(
      self.policy,
      state.params,
      self._eval_batches,
      num_samples=self.config.samples.count,
    )
    writer.write_samples(step, result.samples, split="eval")
    return result.scalars | {"perf/eval_seconds": time.perf_counter() - start}
