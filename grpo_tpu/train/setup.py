"""Starts a run: restores its state, opens its files, starts what watches it."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from data_pipelines import dataset, validation
from data_pipelines.text import untrusted
from grpo_tpu.checkpoint import checkpointer, load
from grpo_tpu.config import defaults
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import (
  activity,
  compile_cache,
  initialize,
  interrupt,
  preemption,
  preflight,
  sharding,
  watchdog,
)
from grpo_tpu.observability import (
  alarms,
  exit_report,
  mirror,
  profiler,
  reward_trends,
  run_record,
  writer,
)
from grpo_tpu.rl.partial_step import PartialStep
from grpo_tpu.rl.train_state import TrainState
from grpo_tpu.train.trainer import Trainer


@contextlib.contextmanager
def start(
  config: Config,
  workdir: str,
  data: dataset.Dataset,
  report: exit_report.ExitReport,
) -> Iterator["Run"]:
  """Starts or resumes the run of a workdir; ends it when the context ends.

  Raises:
    SettingError: A setting that only the devices or the workdir can refute.
  """
  folder = epath.Path(workdir)
  with interrupt.saving(), contextlib.ExitStack() as stack:
    with validation.user_errors():
      record = run_record.RunRecord(
        workdir,
        config.to_dict(),
        defaults=defaults.get_config().to_dict(),
        data=data.identity,
        resolved=config.to_resolved_dict(),
      )
      saved = record.check()
      mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
      files = mirror.Mirror(workdir)
      watch = watchdog.Watchdog(
        files.folder / f"stacks.{jax.process_index()}.txt",
        seconds=config.distributed.watchdog_seconds,
        start_seconds=config.distributed.watchdog_start_seconds,
        report=report.report_stuck,
      )
      trainer = Trainer(
        _fix_weights(config, saved),
        data,
        mesh,
        poll=preemption.Poll(on_poll=watch.mark),
        clock=report.clock,
      )
    report.attach_run(folder, files)
    stack.enter_context(watch)
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(activity.reporting())
    checkpoints = stack.enter_context(
      checkpointer.Checkpoints(
        folder / "checkpoints",
        config.checkpoint,
        before_commit=functools.partial(
          files.wait, config.checkpoint.timeout_seconds
        ),
      )
    )
    files.before_copy = checkpoints.lock.check
    with activity.doing("Restoring the run"):
      step, evaluation = _restore_or_init(trainer, checkpoints, record)
    # Not before: a run that is refused has not started.
    if jax.process_index() == 0:
      record.write(trainer.config.model.weights)
      data.publish()
    report.has_run_record = True
    if jax.process_index() == 0:
      files.fetch()
    if step is not None:
      report.clock.resume(files.folder / "metrics.jsonl", step)
    metric_writer = writer.Writer(
      files.folder,
      is_writer=jax.process_index() == 0,
      resume_step=step,
      has_partial_step=trainer.partial is not None,
      is_mirrored=files.is_remote,
    )
    stack.enter_context(metric_writer)
    metric_writer.write_config(config.to_resolved_dict())
    trainer.write_samples = functools.partial(
      metric_writer.write_samples, split="train"
    )
    profile = stack.enter_context(
      profiler.Profiler(files, config.profile.steps)
    )
    stack.enter_context(report.abort_peers_on_error())
    parts = (trainer, data.identity, checkpoints, files)
    run = Run(*parts, metric_writer, watch, report, profile)
    run.begin(step, evaluation)
    yield run
    run.finish()


@dataclasses.dataclass
class Run:
  """The files and the watchers of a run; see `start`."""

  trainer: Trainer  # Takes the steps.
  identity: dict[str, str]  # Fingerprints of the data.
  checkpoints: checkpointer.Checkpoints
  files: mirror.Mirror
  metric_writer: writer.Writer
  watch: watchdog.Watchdog
  report: exit_report.ExitReport
  profiler: profiler.Profiler

  def __post_init__(self):
    self._config, self._clock = self.trainer.config, self.report.clock
    self._meta: dict[str, Any] = self.identity
    if lora := self._config.lora:
      weights = {"weights": self._config.model.weights}
      self._meta = self.identity | {"lora": dataclasses.asdict(lora) | weights}
    self._compilations = compile_cache.CompileCounter()
    # The policy did not sample the completions of preference data.
    self._alarms = alarms.Alarms(
      own_samples=self._config.data.kind != "preference"
    )
    is_online = self._config.data.kind == "online"
    watched = self._config.rewards.watched if is_online else ()
    self._trends = reward_trends.RewardTrends(watched)
    self._metrics: writer.Scalars = {}
    # The finite metrics of an evaluation after the last finished step, if any.
    self._evaluation: dict[str, float] = {}
    assert self.trainer.state is not None
    # The state that the run starts from, and the number of steps before it.
    self.state, self.start = self.trainer.state, 0

  def begin(
    self, restored_step: int | None, evaluation: dict[str, float]
  ) -> None:
    """Compiles; evaluates, writes and saves the state of a new run."""
    self._evaluation = evaluation
    self.trainer.compile_ahead(self.state)
    num_steps = self._config.train.num_steps
    self._clock.start_steps()
    if restored_step is None:
      metrics = jax.device_get(self.evaluate(self.state, 0))
      self._write(0, metrics | self._clock.scalars())
      self.save(0, self.state)
      self._clock.start_steps()
    elif jax.process_index() == 0:
      self._trends.resume(self.files.folder / "metrics.jsonl", restored_step)
    self.start = self.report.step = restored_step or 0
    if self.start >= num_steps:
      logging.info("Nothing left to do: step %d of %d.", self.start, num_steps)

  def steps(self) -> Iterator[int]:
    """The numbers of the steps to take, until `train.stop_when` is met."""
    for step in range(self.start + 1, self._config.train.num_steps + 1):
      if reason := self._describe_met_target():
        logging.info("%s at step %d.", reason, step - 1)
        self.report.reason = reason
        return
      yield step

  def _describe_met_target(self) -> str:
    """The target that the last evaluation has met; "" if none."""
    rule = self._config.train.stop_rule
    if rule is None or not rule.is_met(self._evaluation):
      return ""
    metric, comparison, limit = rule
    text = f"train.stop_when ({metric} {comparison} {limit:g}) is met"
    return f"{text}: {metric} is {self._evaluation[metric]:.6g}"

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Takes a step inside; a preemption saves what is done and passes on."""
    with self.profiler.step(step), activity.doing(f"Step {step}"):
      try:
        yield
      except preemption.Preempted:
        state, partial = self.trainer.state, self.trainer.partial
        data = partial.to_data() if partial else None
        self._save(step - 1, state, partial_step=data, force=True)
        self._wait_for_checkpoints()
        raise
      finally:
        self.report.skipped_updates = self.trainer.skipped_updates.count

  def evaluate(self, state: TrainState, step: int) -> writer.Scalars:
    """Metrics on held-out data if the step is due for them, else nothing."""
    every = self._config.eval.every_steps
    is_last = step == self._config.train.num_steps
    if not every or (step % every and not is_last):
      return {}
    with self._clock.phase("evaluate"):
      start = time.perf_counter()
      metrics, samples = self.trainer.evaluate(state)
      self.metric_writer.write_samples(step, samples, split="eval")
      return metrics | {"perf/eval_seconds": time.perf_counter() - start}

  def write(self, step: int, metrics: writer.Scalars) -> None:
    """Writes the metrics of a step and raises alarms about them."""
    metrics |= initialize.straggler_metrics(self._clock.alone_seconds())
    metrics |= self._compilations.scalars() | self._clock.scalars()
    metrics = jax.device_get(metrics)
    if jax.process_index() == 0:
      self._alarms.check(step, metrics)
      metrics |= self._trends.check(step, metrics)
    metrics |= self.checkpoints.scalars()
    failures = self.metric_writer.failures + self.files.failures
    metrics["perf/write_failures"] = failures
    self._write(step, metrics)
    self.report.step = step
    self.watch.end_startup()

  def _write(self, step: int, metrics: writer.Scalars) -> None:
    self._metrics = metrics
    values = {k: float(x) for k, x in metrics.items() if k.startswith("eval/")}
    self._evaluation = {k: x for k, x in values.items() if math.isfinite(x)}
    self.metric_writer.write(step, metrics)
    self.metric_writer.log_progress(self._config.train.num_steps)

  def save(self, step: int, state: TrainState) -> None:
    """Saves a checkpoint if the step is due, first or last."""
    is_forced = step in (0, self._config.train.num_steps)
    is_forced |= bool(self._describe_met_target())
    self._save(step, state, metrics=self._metrics, force=is_forced)

  def finish(self) -> None:
    """Waits for the last checkpoint."""
    if self.report.step != self.start:
      self._wait_for_checkpoints()

  def _save(self, step: int, state: Any, **options: Any) -> None:
    with self._clock.phase("checkpoint"), activity.doing("Saving"):
      self.metric_writer.flush()  # No saved step lacks its samples.
      # A resumed run must know what this evaluation has met.
      meta = self._meta | {"evaluation": self._evaluation}
      if moments := self.trainer.collector.combination.state():
        meta["reward_moments"] = moments
      if self._config.rewards.watched:
        meta["first_tokens"] = self.trainer.collector.first_tokens.state()
      self.checkpoints.save(step, state, meta, **options)

  def _wait_for_checkpoints(self) -> None:
    with self._clock.phase("checkpoint"), activity.doing("Saving"):
      self.checkpoints.wait()


def _fix_weights(config: Config, saved: dict[str, Any] | None) -> Config:
  """The settings with the step of `model.weights` that the run started from."""
  named = config.model.weights
  weights = saved["weights"] if saved else load.resolve_weights(named)
  model = dataclasses.replace(config.model, weights=weights)
  return dataclasses.replace(config, model=model)


def _restore_or_init(
  trainer: Trainer,
  checkpoints: checkpointer.Checkpoints,
  record: run_record.RunRecord,
) -> tuple[int | None, dict[str, float]]:
  """Gives the trainer the newest state; returns its step, None if it is new.

  Also the metrics of the evaluation after it, if no further step is under way.
  """
  row_sharding = sharding.batch_sharding(trainer.mesh)
  restored = checkpoints.restore(
    trainer.learner.abstract_state(), partial_step_sharding=row_sharding
  )
  step, evaluation = None, {}
  if restored:
    record.check_data(restored.meta)
    step, saved = restored.step, restored.partial_step
    partial = saved and PartialStep.from_data(saved, row_sharding)
    trainer.resume(restored.state, partial)
    evaluation = {} if saved else restored.meta.get("evaluation", {})
    with validation.user_errors():
      untrusted.check_kind(evaluation, dict, "the checkpoint's evaluation")
      untrusted.check_items(evaluation.values(), float, "its evaluation")
      moments = restored.meta.get("reward_moments", {})
      trainer.collector.combination.restore(moments)
      if first_tokens := restored.meta.get("first_tokens"):
        trainer.collector.first_tokens.restore(first_tokens)
  else:
    trainer.init()
  updates = trainer.partial.updates_done if trainer.partial else 0
  timeout = trainer.config.distributed.preflight_timeout_seconds
  facts = {"checkpoint": {"step": step, "updates": updates}}
  preflight.check("restored", facts, timeout_seconds=timeout)
  return step, evaluation
