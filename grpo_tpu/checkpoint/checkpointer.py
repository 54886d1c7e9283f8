"""Checkpoints of a run: saved while training goes on, restored onto any mesh.

Knows nothing of what a state is made of: any tree of jax arrays, typed keys
among them. Orbax writes beside the newest good checkpoint and renames when all
is there; a manifest of sizes and checksums follows, and older checkpoints go
only after it. So a process killed at any point leaves a checkpoint to go on
from, and one that was damaged since is known before a number of it is used.

All processes of a run call every method, in the same order: what one of them
met, they all know. Which methods look at the devices follows from that alone.
What lies there, and whether it is whole, `archive` tells.

What Orbax lets pass in silence is an error here: it restores a flipped byte,
casts a leaf whose dtype has changed, and tells of a failed save only when the
next one is asked for. Its `CheckpointManager` is not used: it deletes older
steps before a manifest could be written, and it polls the preemption notice
with the number of the step, which would throw the run's own polls off.

References:
  Orbax, https://orbax.readthedocs.io/en/latest/guides/checkpoint/
"""

import concurrent.futures
import contextlib
import functools
import time
import types
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from grpo_tpu.checkpoint import directory_lock, manifest, reader, retention
from grpo_tpu.distributed import collectives

_RUNNING = "..."


class CheckpointError(RuntimeError):
  """Checkpoints that could not be written, or not be trusted."""


class Checkpoints:
  """The checkpoints under one directory, which one run at a time may write.

  Use as a context manager: leaving it waits for the save on its way, unless
  an error of one of several processes ends the run.

  Attributes:
    failures: How many saves have failed since this was opened, refused ones
      among them.
    refusals: How many of them would have saved a state that is not finite.
    quarantined: How many damaged checkpoints were moved aside.
  """

  def __init__(
    self, directory: epath.PathLike, config: retention.CheckpointConfig
  ) -> None:
    """Opens `directory`, making it if missing and clearing unfinished saves.

    Raises:
      CheckpointError: It cannot be written, or another run is writing there.
    """
    self.failures = self.refusals = self.quarantined = 0
    self._failures_in_row = 0
    self._last_failure = ""
    self._block_seconds = 0.0
    self._config = config
    self._directory = epath.Path(directory).resolve()
    self._lock = directory_lock.Lock(self._directory)
    self._writer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(),
      async_options=ocp.AsyncOptions(timeout_secs=config.timeout_seconds),
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix="checkpoints"
    )
    self._pending: concurrent.futures.Future[None] | None = None
    self._pending_entry: retention.Entry | None = None
    self._removal: concurrent.futures.Future[None] | None = None
    self._save_time = time.monotonic()
    complaint = self._claim() if collectives.is_first_process() else ""
    if complaint := collectives.broadcast_string(complaint):
      raise CheckpointError(complaint)
    self._entries = reader.listed(self._directory)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    try:
      if error is None:
        self.wait()
      elif self._pending is not None and collectives.num_processes() == 1:
        # Where there are more, they may be anywhere: nobody can be waited for.
        # The error that ended the run is the one to show, and a failed save
        # has been logged.
        concurrent.futures.wait([self._pending])
    finally:
      is_over = error is None or collectives.num_processes() == 1
      self._thread.shutdown(wait=is_over)
      if is_over:
        with contextlib.suppress(Exception):  # `wait` has raised it.
          self._writer.close()
      self._lock.release()

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    *,
    metrics: Mapping[str, Any] | None = None,
    unfinished: reader.Unfinished | None = None,
    force: bool = False,
  ) -> bool:
    """Starts to save `state`, if the step is due or `force` is set.

    To be called after every step: it is here that a failed save is met. It is
    logged and counted, and this step stands in for it, due or not.

    Returns when the values have been copied, so the caller may donate `state`
    at once; writing goes on behind. A second save waits for the first.

    Args:
      step: Steps done. With `unfinished` the state is some updates further.
      state: Any tree of jax arrays.
      meta: What else a resumed run has to know, as JSON would hold it.
      metrics: Of this step, among which the one that says which is best.
      unfinished: What was begun of the step after `step`. It is always saved.
      force: Save though the step is not due. One saved already is left alone.

    Returns:
      Whether a save was started.

    Raises:
      ValueError: An older step than the newest saved one.
      CheckpointError: `checkpoint.max_failures` saves in a row have failed.
    """
    start = time.perf_counter()
    try:
      entry = retention.Entry(
        step,
        unfinished.updates_done if unfinished else 0,
        score=retention.score(metrics or {}, self._config),
      )
      self._settle(is_blocking=False)
      newest = self._newest()
      if newest is not None and entry < newest:
        raise ValueError(
          f"step {step} is older than the newest checkpoint ({newest.step}) in"
          f" {self._directory}: resume from the newest, or move the newer ones"
          " away."
        )
      is_due = force or unfinished is not None or self._is_due(entry)
      if entry == newest or not is_due:
        return False
      self._settle(is_blocking=True)
      return self._start(entry, state, meta, unfinished)
    finally:
      self._block_seconds += time.perf_counter() - start

  def wait(self) -> None:
    """Returns once what was saved last is on disk and has its manifest.

    Raises:
      CheckpointError: It is not.
    """
    self._settle(is_blocking=True)
    if self._failures_in_row:
      raise CheckpointError(
        f"the last checkpoint could not be saved: {self._last_failure}. "
        f"{self._standing()}"
      )
    if self._removal is not None:
      self._removal.result()

  def scalars(self) -> dict[str, float]:
    """By the names of `metrics`; the seconds are those since the last call."""
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
    unfinished_sharding: jax.sharding.Sharding | None = None,
  ) -> reader.Restored | None:
    """The newest checkpoint that is whole, laid out as `abstract_state` says.

    A damaged one that is newer is moved into `quarantine/` and counted.

    Args:
      abstract_state: The tree wanted: leaves with shape, dtype and sharding
        (`jax.ShapeDtypeStruct` or arrays). The mesh need not be the one that
        the checkpoint was saved from.
      unfinished_sharding: Of the arrays of an unfinished step.

    Returns:
      None where nothing has been saved yet.

    Raises:
      ValueError: The leaves of the newest differ from those wanted.
      CheckpointError: There are checkpoints, and none is whole.
    """
    self._settle(is_blocking=True)
    while self._entries:
      entry = self._entries[-1]
      path = self._directory / entry.name
      damage = reader.agreed_damage(path)
      if not damage:
        restored = reader.read(path, abstract_state, unfinished_sharding)
        logging.info("Restored %s.", path)
        return restored
      self._quarantine(entry, damage)
    lost = collectives.broadcast_string(
      ", ".join(_lost_steps(self._directory))
      if collectives.is_first_process()
      else ""
    )
    if lost:
      raise CheckpointError(
        f"no checkpoint in {self._directory} is whole: {lost}. Look into its"
        " quarantine folder, bring a good copy back, or name an empty workdir;"
        " a run is never silently started again."
      )
    return None

  def _claim(self) -> str:
    """Makes the directory this run's own; what stands against it, or ""."""
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._lock.acquire()
      for path in self._directory.iterdir():
        is_cut_off = ocp.utils.TMP_DIR_SUFFIX in path.name
        if is_cut_off or path.name.endswith(manifest.UNFINISHED_SUFFIX):
          logging.info("Removing %s, a save that was cut off.", path)
          _remove(path)
    except OSError as error:
      return f"checkpoints cannot be written in {self._directory}: {error}"
    return ""

  def _newest(self) -> retention.Entry | None:
    """The newest one, on its way or on disk."""
    return self._pending_entry or (self._entries[-1] if self._entries else None)

  def _is_due(self, entry: retention.Entry) -> bool:
    if self._failures_in_row or entry.score is not None:
      return True
    if entry.step % self._config.every_steps == 0:
      return True
    if not self._config.every_minutes:
      return False
    seconds = time.monotonic() - self._save_time
    return bool(
      collectives.broadcast_string(
        "y" * (seconds >= self._config.every_minutes * 60)
      )
    )

  def _start(
    self,
    entry: retention.Entry,
    state: Any,
    meta: Mapping[str, Any],
    unfinished: reader.Unfinished | None,
  ) -> bool:
    if not _is_finite(state):
      self.refusals += 1
      self._fail(f"the state of {entry.name} has numbers that are not finite")
      return False
    if self._removal is not None:
      self._removal.result()
    complaint = self._unwritable() if collectives.is_first_process() else ""
    if complaint := collectives.broadcast_string(complaint):
      self._fail(f"{entry.name}: {complaint}")
      return False
    items: dict[str, Any] = {"state": ocp.args.PyTreeSave(state)}
    record = {
      "step": entry.step,
      "leaves": reader.leaves(state),
      "meta": dict(meta),
      "unfinished": None,
    }
    if unfinished is not None:
      record["unfinished"] = {
        "updates_done": unfinished.updates_done,
        "leaves": reader.leaves(unfinished.arrays),
        "record": unfinished.record,
      }
      items["unfinished"] = ocp.args.PyTreeSave(unfinished.arrays)
    items["meta"] = ocp.args.JsonSave(record)
    path = self._directory / entry.name
    self._save_time = time.monotonic()
    self._pending_entry = entry
    try:
      self._writer.save(path, args=ocp.args.Composite(**items))
    except Exception as error:
      logging.exception("%s could not be saved.", path)
      self._pending = concurrent.futures.Future()
      self._pending.set_exception(error)
    else:
      self._pending = self._thread.submit(self._finish, entry)
    return True

  def _unwritable(self) -> str:
    """Why nothing can be written now; "" if it can.

    Where Orbax cannot make a folder, its threads wait for it for minutes.
    """
    probe = self._directory / "probe"
    try:
      probe.mkdir(exist_ok=True)
      probe.rmdir()
    except OSError as error:
      return f"{type(error).__name__}: {error}"
    return ""

  def _finish(self, entry: retention.Entry) -> None:
    """Sees the save to its end, in a thread."""
    path = self._directory / entry.name
    try:
      self._writer.wait_until_finished()
      if collectives.is_first_process():
        manifest.write(path, {"score": entry.score})
    except Exception:
      # At once, though the other hosts may not know before they have waited.
      logging.exception("%s could not be saved.", path)
      # Else the next save would meet what Orbax has not told yet, on one
      # process alone, and that one would miss where all of them meet.
      with contextlib.suppress(Exception):
        self._writer.wait_until_finished()
      raise

  def _settle(self, *, is_blocking: bool) -> None:
    """Takes note of how the save on its way has ended, if it has on all hosts.

    Raises:
      CheckpointError: As many in a row as are allowed have failed.
    """
    pending, entry = self._pending, self._pending_entry
    if pending is None or entry is None:
      return
    if is_blocking:
      concurrent.futures.wait([pending])
    complaint = _RUNNING
    if pending.done():
      error = pending.exception()
      complaint = f"{type(error).__name__}: {error}" if error else ""
    complaints = [
      x.decode() for x in collectives.gather_bytes(complaint.encode())
    ]
    if _RUNNING in complaints:
      return
    self._pending = self._pending_entry = None
    failed = [i for i, each in enumerate(complaints) if each]
    if failed:
      # Those that only waited for the one at fault say so.
      host = min(failed, key=lambda i: complaints[i].startswith("TimeoutError"))
      # The disk may be full of it.
      self._remove_later([entry])
      self._fail(f"{entry.name}, by process {host}: {complaints[host]}")
      return
    self._failures_in_row = 0
    self._entries.append(entry)
    doomed = retention.doomed(self._entries, self._config)
    self._entries = [each for each in self._entries if each not in doomed]
    self._remove_later(doomed)

  def _fail(self, reason: str) -> None:
    self.failures += 1
    self._failures_in_row += 1
    self._last_failure = reason
    limit = self._config.max_failures
    logging.error(
      "A checkpoint could not be saved (%d in a row, of checkpoint.max_failures"
      "=%d): %s. %s",
      self._failures_in_row,
      limit,
      reason,
      self._standing(),
    )
    if self._failures_in_row >= limit:
      raise CheckpointError(
        f"{self._failures_in_row} saves in a row have failed, and "
        f"checkpoint.max_failures ({limit}) allows no more: {reason}. "
        f"{self._standing()}"
      )

  def _standing(self) -> str:
    whole = [entry.name for entry in self._entries if entry.is_whole]
    newest = whole[-1] if whole else "none"
    return f"The newest good one in {self._directory} is {newest}."

  def _remove_later(self, entries: list[retention.Entry]) -> None:
    if entries and collectives.is_first_process():
      names = [entry.name for entry in entries]
      self._removal = self._thread.submit(_remove_steps, self._directory, names)

  def _quarantine(self, entry: retention.Entry, damage: str) -> None:
    """Moves a damaged checkpoint, and its manifest, out of the way."""
    self._entries.remove(entry)
    self.quarantined += 1
    path = self._directory / entry.name
    target = self._directory / "quarantine" / _label(entry.name, damage)
    logging.error(
      "CHECKPOINT %s IS DAMAGED: %s. It is moved to %s, and the run goes on"
      " from an older one.",
      path,
      damage,
      target,
    )
    complaint = ""
    if collectives.is_first_process():
      try:
        target = _unused(target)
        target.parent.mkdir(exist_ok=True)
        for source, goal in (
          (manifest.path_of(path), manifest.path_of(target)),
          (path, target),
        ):
          if source.exists():
            source.rename(goal)
      except OSError as error:
        complaint = f"{path} is damaged, and cannot be moved aside: {error}"
    if complaint := collectives.broadcast_string(complaint):
      raise CheckpointError(complaint)


def _lost_steps(directory: epath.Path) -> list[str]:
  """What lies in quarantine, but for step 0, which is the run's very start."""
  folder = directory / "quarantine"
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return sorted(n for n in names if not n.startswith(f"{0:08}-"))


def _label(name: str, damage: str) -> str:
  return f"{name}-{damage.partition(':')[0].replace(' ', '-')}"


def _unused(path: epath.Path) -> epath.Path:
  number, free = 1, path
  while free.exists() or manifest.path_of(free).exists():
    number += 1
    free = path.with_name(f"{path.name}-{number}")
  return free


def _remove_steps(directory: epath.Path, names: list[str]) -> None:
  """Deletes checkpoints, and what a save of them has left behind."""
  try:
    for name in names:
      # First, for without it the rest is not taken for a checkpoint.
      manifest.path_of(directory / name).unlink(missing_ok=True)
    for path in directory.iterdir():
      if path.name.partition(ocp.utils.TMP_DIR_SUFFIX)[0] in names:
        _remove(path)
  except OSError:
    logging.exception("Could not delete %s in %s.", names, directory)


def _remove(path: epath.Path) -> None:
  path.rmtree() if path.is_dir() else path.unlink()


def _is_finite(state: Any) -> bool:
  numbers = [
    leaf
    for leaf in jax.tree.leaves(state)
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size
  ]
  whole_axes = tuple(
    tuple(
      axis
      for axis, size in enumerate(leaf.sharding.shard_shape(leaf.shape))
      if size == leaf.shape[axis]
    )
    for leaf in numbers
  )
  return not numbers or bool(_all_finite(numbers, whole_axes))


@functools.partial(jax.jit, static_argnames=("whole_axes",))
def _all_finite(
  numbers: list[jax.Array], whole_axes: tuple[tuple[int, ...], ...]
) -> jax.Array:
  # A maximum keeps a NaN and takes a third of the time; but not one over
  # several devices, whose collectives may lose it.
  return jnp.stack(
    [
      jnp.isfinite(jnp.abs(each).max(axis=axes)).all()
      for each, axes in zip(numbers, whole_axes, strict=True)
    ]
  ).all()
