"""Saves checkpoints during training, and restores them onto any mesh.

A state is any tree of jax arrays, typed keys included. Orbax writes a new
checkpoint beside the newest good one, and renames it when it is complete; in a
bucket it writes `commit_success.txt` instead. Then a manifest of sizes and
checksums is written, and only then are older checkpoints deleted. So a process
killed at any point leaves a checkpoint to resume from, and damage is found
before use. All processes of a run call every method, in the same order, and all
learn of an error on any of them.

References:
  https://orbax.readthedocs.io/en/latest/guides/checkpoint/
  Why not its `CheckpointManager`: docs/adr/0013.
"""

import concurrent.futures
import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.options import FileOptions

from data_pipelines.storage import paths
from grpo_tpu.checkpoint import finite, manifest, reader, retention
from grpo_tpu.checkpoint.directory_lock import DirectoryLock, Lease
from grpo_tpu.checkpoint.retention import CheckpointInfo
from grpo_tpu.checkpoint.settings import CheckpointConfig
from grpo_tpu.distributed import collectives

_RUNNING = "..."
_COMMITTED = "commit_success.txt"  # Orbax writes it last.

# A bucket may be away for minutes: so long `save` waits for the save before it,
# so long it pauses after a failed one, and so long all must fail to end a run.
_WAIT_SECONDS, _PAUSE_SECONDS, _OUTAGE_SECONDS = 10.0, 10.0, 1200.0


class CheckpointError(RuntimeError):
  """Checkpoints could not be written or cannot be trusted."""


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
  """The checkpoints in one directory, which one run at a time may write.

  Use as a context manager: leaving it waits for the pending save, unless an
  error of one of several processes ends the run.

  Attributes:
    failures: Failed saves since this object was made, including `refusals`.
    refusals: Saves refused because the state was not finite.
    quarantined: Damaged checkpoints that were moved aside.
    lock: Process 0 holds it; its `check` precedes whatever this run writes.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    config: CheckpointConfig,
    *,
    before_commit: Callable[[], None] | None = None,
  ) -> None:
    """Creates and locks `directory`, and removes interrupted saves from it.

    A thread of process 0 calls `before_commit` when the arrays of a save are
    written. The checkpoint does not count before it has returned.

    Raises:
      CheckpointError: The directory cannot be written, or another run holds it.
    """
    self.failures = self.refusals = self.quarantined = 0
    # The times and reasons of the last saves, all of which have failed.
    self._failing: list[tuple[float, str]] = []
    self._is_late = False  # A due step was not saved.
    # The arguments of a save that is pending or failed, to repeat it.
    self._last_save: tuple[Any, ...] = ()
    self._block_seconds = 0.0
    self._config = config
    self._directory = paths.absolute(directory)
    self._is_remote = paths.is_remote(self._directory)
    self._pause = _PAUSE_SECONDS if self._is_remote else 0.0
    self.lock = (Lease if self._is_remote else DirectoryLock)(self._directory)
    self._writer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(),
      async_options=ocp.AsyncOptions(
        timeout_secs=config.timeout_seconds,
        post_finalization_callback=before_commit,
      ),
      # They would wait in `save` for a bucket that does not answer.
      file_options=FileOptions(skip_sync_file_validations=self._is_remote),
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
    self._pending: concurrent.futures.Future[None] | None = None
    self._removal: concurrent.futures.Future[None] | None = None
    self._save_time = time.monotonic()
    failing = f"checkpoints cannot be written in {self._directory}"
    if error := _error_of(self._open_directory, failing):
      raise CheckpointError(error)
    self._saved = reader.broadcast_checkpoints(self._directory)

  def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
    # Several processes could wait forever for one that has failed.
    is_over = error is None or collectives.num_processes() == 1
    try:
      if error is None:
        self.wait()
    finally:
      # A failed save is only logged if another error ends the run.
      self._thread.shutdown(wait=is_over)
      if is_over:
        with contextlib.suppress(Exception):  # `wait` has raised the error.
          self._writer.close()
      if is_over or self._pending is None:
        self.lock.release()

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    *,
    metrics: Mapping[str, Any] | None = None,
    partial_step: reader.PartialStepData | None = None,
    force: bool = False,
  ) -> bool:
    """Starts to save `state` if it is due, and returns True if it has started.

    Must be called after every step, because this call notices that an earlier
    save has failed: this step is then saved in its stead, due or not.

    Returns when the values are copied, so the caller may donate `state`. A
    thread writes the files; a second save waits for the first one, but in a
    bucket only for seconds, and is then left to a later step.

    Args:
      step: Finished steps.
      state: Any tree of jax arrays; with `partial_step`, the state after the
        finished updates of the next step.
      meta: Other values that a resumed run needs, as JSON can hold them.
      metrics: Metrics of this step, which may include the best metric.
      partial_step: The interrupted step after `step`; always saved.
      force: Save although the step is not due. A saved step is not repeated.

    Raises:
      ValueError: The step is older than the newest saved one.
      CheckpointError: `checkpoint.max_failures` saves in a row have failed.
    """
    start = time.perf_counter()
    try:
      info = CheckpointInfo(
        step,
        partial_step.updates_done if partial_step else 0,
        score=retention.score(metrics or {}, self._config),
        metric=self._config.scored_by,
      )
      is_forced = force or partial_step is not None
      can_skip = self._is_remote and not is_forced
      if not self._is_wanted(info, is_forced):
        return False
      seconds = 0.0 if self._is_late else _WAIT_SECONDS
      if not self._collect_pending(seconds if can_skip else None):
        text = "%s is not saved: the save before it waits for the bucket."
        logging.log_every_n_seconds(logging.WARNING, text, 60, info.name)
        self._is_late = True
        return False
      save = info, state, meta, partial_step
      return self._start_save(*save, is_patient=not can_skip)
    finally:
      self._block_seconds += time.perf_counter() - start

  def wait(self) -> None:
    """Waits until the last save is whole, with its manifest.

    A save that failed in a bucket is repeated, for twenty minutes at least.

    Raises:
      CheckpointError: The last save failed.
    """
    self._collect_pending()
    while self._failing and self._is_remote and self._last_save:
      time.sleep(self._pause)
      self._start_save(*self._last_save, is_patient=True)
      self._collect_pending()
    if self._failing:
      raise CheckpointError(
        f"the last checkpoint could not be saved: {self._failing[-1][1]}. "
        f"{self._newest_good()}"
      )
    if self._removal is not None:
      self._removal.result()

  def scalars(self) -> dict[str, float]:
    """Metrics by name; the seconds are those since the last call."""
    seconds, self._block_seconds = self._block_seconds, 0.0
    return {
      "checkpoint/save_failures": self.failures,
      "checkpoint/refused_not_finite": self.refusals,
      "checkpoint/quarantined": self.quarantined,
      "perf/checkpoint_block_seconds": seconds,
    }

  def restore(
    self,
    abstract_state: Any,
    *,
    partial_step_sharding: jax.sharding.Sharding | None = None,
  ) -> reader.RestoredCheckpoint | None:
    """Reads the newest whole checkpoint, sharded as in `abstract_state`.

    Its leaves have shape, dtype and sharding, on any mesh; the arrays of a
    partial step get `partial_step_sharding`. Damaged checkpoints that are newer
    are moved into `quarantine/` and counted. Returns None if nothing has been
    saved yet.

    Raises:
      SettingError: The newest checkpoint's leaves differ from `abstract_state`.
      CheckpointError: There are checkpoints, but none is whole.
    """
    self._collect_pending()
    while self._saved:
      path = self._directory / self._saved[-1].name
      if not (damage := reader.find_damage(path)):
        logging.info("Restoring %s.", path)
        parts = abstract_state, partial_step_sharding
        return reader.read_checkpoint(path, *parts)
      del self._saved[-1]
      self.quarantined += 1
      text = "CHECKPOINT %s IS DAMAGED: %s. Moving it into quarantine/."
      logging.error(text, path, damage)
      move = functools.partial(manifest.move_aside, path, damage)
      failing = f"{path} is damaged, and cannot be moved aside"
      if error := _error_of(move, failing):
        raise CheckpointError(error)
    if lost := reader.ask_first_process(self._lost_steps):
      raise CheckpointError(
        f"no checkpoint in {self._directory} is whole: {lost}. Look into its"
        " quarantine folder and bring a good copy back, or use an empty"
        " workdir; a run never silently restarts from step 0."
      )
    return None

  def _open_directory(self) -> None:
    """Creates, locks and cleans the directory."""
    paths.make_folder(self._directory)
    self.lock.acquire()
    for path in self._directory.iterdir():
      if _is_interrupted(path):
        logging.info("Removing %s, an interrupted save.", path)
        _remove(path)

  def _is_wanted(self, info: CheckpointInfo, is_forced: bool) -> bool:
    self._collect_pending(0.0)
    started = [self._last_save[0]] if self._pending else []
    newest = next(reversed(self._saved + started), None)
    if newest is not None and info < newest:
      raise ValueError(
        f"step {info.step} is older than the newest checkpoint ({newest.step}) "
        f"in {self._directory}: resume from the newest, or move the newer ones "
        "away."
      )
    if info == newest or is_forced:
      return info != newest
    if info.score is not None or info.step % self._config.every_steps == 0:
      return True
    seconds = self._config.every_minutes * 60 or math.inf
    return self._have_passed(
      self._pause if self._is_late else seconds, self._save_time
    )

  def _have_passed(self, seconds: float, since: float) -> bool:
    if seconds in (0.0, math.inf):
      return not seconds
    is_over = time.monotonic() - since >= seconds
    # The clocks of the processes differ, so the first one decides.
    return bool(collectives.broadcast_string("y" * is_over))

  def _start_save(
    self,
    info: CheckpointInfo,
    state: Any,
    meta: Mapping[str, Any],
    partial_step: reader.PartialStepData | None,
    *,
    is_patient: bool,
  ) -> bool:
    self._last_save = ()
    if not finite.is_finite(state):
      self.refusals += 1
      self._count_failure(f"the state of {info.name} is not finite")
      return False
    if self._removal is not None and is_patient:
      self._removal.result()
    if error := _error_of(self._probe, info.name):
      self._count_failure(error)
      return False
    self._last_save, self._is_late = (info, state, meta, partial_step), False
    items: dict[str, Any] = {"state": ocp.args.PyTreeSave(state)}
    record = {"step": info.step, "meta": dict(meta), "unfinished": None}
    record["leaves"] = reader.describe_leaves(state)
    if partial_step is not None:
      items["unfinished"] = ocp.args.PyTreeSave(partial_step.arrays)
      record["unfinished"] = {
        "updates_done": partial_step.updates_done,
        "leaves": reader.describe_leaves(partial_step.arrays),
        "record": partial_step.record,
      }
    items["meta"] = ocp.args.JsonSave(record)
    path = self._directory / info.name
    self._save_time = time.monotonic()
    try:
      self._writer.save(path, args=ocp.args.Composite(**items))
    except Exception as error:
      logging.exception("%s could not be saved.", path)
      self._pending = concurrent.futures.Future()
      self._pending.set_exception(error)
    else:
      self._pending = self._thread.submit(self._finish_save, info)
    return True

  def _probe(self) -> None:
    """Creates a folder; if a disk fails, Orbax would wait for minutes."""
    if not self._is_remote:
      probe = self._directory / "probe"
      probe.mkdir(exist_ok=True)
      probe.rmdir()

  def _finish_save(self, info: CheckpointInfo) -> None:
    """Waits for Orbax and writes the manifest; runs in a thread."""
    path = self._directory / info.name
    try:
      self._writer.wait_until_finished()
      if collectives.is_first_process():
        facts = {"score": info.score, "metric": info.metric}
        self.lock.check()
        manifest.write(path, facts)
    except Exception:
      # Logged now: the other hosts may learn of the failure much later.
      logging.exception("%s could not be saved.", path)
      # Clears any further error in Orbax. Otherwise the next save would raise
      # it on this process only, and the other processes would wait for it.
      with contextlib.suppress(Exception):
        self._writer.wait_until_finished()
      raise

  def _collect_pending(self, seconds: float | None = None) -> bool:
    """Handles the result of the pending save, if all hosts have finished it.

    Waits for it so many seconds, or for ever. Returns False if it still runs.

    Raises:
      CheckpointError: `checkpoint.max_failures` saves in a row have failed.
    """
    if self._pending is None:
      return True
    try:
      error = self._pending.exception(seconds)
      result = f"{type(error).__name__}: {error}" if error else ""
    except concurrent.futures.TimeoutError:
      result = _RUNNING
    results = [x.decode() for x in collectives.gather_bytes(result.encode())]
    if _RUNNING in results:
      return False
    self._pending, info = None, self._last_save[0]
    if failed := [i for i, each in enumerate(results) if each]:
      # Hosts that only waited for the failed one report a TimeoutError.
      host = min(failed, key=lambda i: results[i].startswith("TimeoutError"))
      # The remains may be what fills the disk.
      self._remove_later([info])
      reason = f"{info.name}, by process {host}: {results[host]}"
      self._count_failure(reason, _OUTAGE_SECONDS if self._is_remote else 0.0)
      return True
    self._failing, self._last_save = [], ()
    logging.info("Saved %s.", self._directory / info.name)
    saved = [*self._saved, info]
    to_delete = retention.to_delete(saved, self._config)
    self._saved = [each for each in saved if each not in to_delete]
    self._remove_later(to_delete)
    return True

  def _count_failure(self, reason: str, seconds: float = 0.0) -> None:
    """Counts it; raises if it is one too many, and so long after the first."""
    self.failures += 1
    self._failing.append((time.monotonic(), reason))
    self._is_late = True
    limit = self._config.max_failures
    message = (
      f"failed saves in a row: {len(self._failing)}, of "
      f"checkpoint.max_failures ({limit}); {reason}. {self._newest_good()}"
    )
    logging.error("A checkpoint could not be saved; %s", message)
    is_limit = len(self._failing) >= limit
    if is_limit and self._have_passed(seconds, self._failing[0][0]):
      raise CheckpointError(message)

  def _newest_good(self) -> str:
    whole = [info.name for info in self._saved if info.is_whole]
    newest = next(reversed(whole), "none")
    return f"The newest good checkpoint in {self._directory} is {newest}."

  def _remove_later(self, checkpoints: list[CheckpointInfo]) -> None:
    names = [info.name for info in checkpoints]
    if names and collectives.is_first_process():
      self._removal = self._thread.submit(self._remove_steps, names)

  def _remove_steps(self, names: list[str]) -> None:
    """Deletes checkpoints and the remains of failed saves; runs in a thread."""
    try:
      self.lock.check()
      for name in names:
        folder = self._directory / name
        # The marks go first: without them the rest is not trusted.
        for mark in (manifest.path_for(folder), folder / _COMMITTED):
          mark.unlink(missing_ok=True)
      for path in self._directory.iterdir():
        if path.name.partition(ocp.utils.TMP_DIR_SUFFIX)[0] in names:
          _remove(path)
    except Exception:  # A bucket's errors have many types.
      logging.exception("Could not delete %s in %s.", names, self._directory)

  def _lost_steps(self) -> str:
    """Names in quarantine; without step 0, with which every run starts."""
    folder = self._directory / "quarantine"
    names = [x.name for x in folder.iterdir()] if folder.exists() else []
    return ", ".join(sorted(n for n in names if not n.startswith(f"{0:08}-")))


def _error_of(action: Callable[[], None], failing: str) -> str:
  """The error of process 0, which alone acts, on every process; or ""."""

  def act() -> str:
    try:
      action()
    except (OSError, ValueError) as error:  # TensorStore has the second.
      return f"{failing}: {error}"
    return ""

  return reader.ask_first_process(act)


def _remove(path: epath.Path) -> None:
  path.rmtree() if path.is_dir() else path.unlink()


def _is_interrupted(path: epath.Path) -> bool:
  """True for what a killed process left of a save.

  A bucket has no renames, so there a save has its name from the start.
  """
  name, suffix = path.name, manifest.SUFFIX
  if ocp.utils.TMP_DIR_SUFFIX in name:
    return True
  if not paths.is_remote(path):
    return suffix in name and not name.endswith(suffix)
  is_save = CheckpointInfo.from_name(name) is not None
  marks = manifest.path_for(path), path / _COMMITTED
  return is_save and not any(mark.exists() for mark in marks)
