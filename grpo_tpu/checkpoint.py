"""Checkpoints of a run: saved while training goes on, restored onto any mesh.

Knows nothing of what a state is made of: any tree of jax arrays, typed keys
among them. Orbax writes beside the newest good step and renames when all is
there, so a process killed in the middle of a save leaves the older step as it
was. What Orbax lets pass in silence is an error here: it casts a leaf whose
dtype has changed, it declines to save a step that is not newer than the last,
and it tells of a failed save only when the next one is asked for.

References:
  Orbax, https://orbax.readthedocs.io/en/latest/guides/checkpoint/
"""

import types
from collections.abc import Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

# How long the hosts wait for each other to commit one save.
_COMMIT_TIMEOUT_SECONDS = 600
_MISMATCHES_SHOWN = 10
_STEP_NAMES = ocp.path.step.standard_name_format(step_format_fixed_length=8)


class Checkpoints:
  """The checkpoints under one directory, which one run at a time may write.

  Use as a context manager: leaving it waits for the save on its way.

  Attributes:
    failures: How many saves of this process have failed so far.
  """

  def __init__(
    self, directory: epath.PathLike, *, every_steps: int, keep: int
  ) -> None:
    """Opens `directory`, making it if missing and clearing unfinished saves.

    Args:
      directory: Where the steps lie, one folder each.
      every_steps: A step that is a multiple of this is due to be saved.
      keep: How many of the newest steps stay on disk.
    """
    self.failures = 0
    # True from a failed save until a later one is known to have succeeded.
    self._is_retrying = False
    self._directory = epath.Path(directory).resolve()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(
          every_steps
        ),
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        step_name_format=_STEP_NAMES,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(timeout_secs=_COMMIT_TIMEOUT_SECONDS),
      ),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    try:
      self.wait()
    except Exception:
      # The error that ended the run is the one to show; `wait` has logged ours.
      if error is None:
        raise
    finally:
      self._manager.close()

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    *,
    force: bool = False,
  ) -> bool:
    """Starts to save `state` as `step`, if the step is due or `force` is set.

    Returns when the values have been copied, so the caller may donate `state`
    at once; writing goes on behind. A second save waits for the first.

    A save that failed is met here, at the next one: it is logged and counted,
    and this save stands in for it. If this one fails too, the next call raises.

    Args:
      step: Newer than every step saved before.
      state: Any tree of jax arrays.
      meta: What else a resumed run has to know, as JSON would hold it.
      force: Save though `step` is not due. A step saved already is left alone.

    Returns:
      Whether a save was started.

    Raises:
      ValueError: An older step than the newest saved one.
      Exception: Whatever made two saves in a row fail.
    """
    newest = self._manager.latest_step()
    if newest is not None and step < newest:
      raise ValueError(
        f"step {step} is older than the newest checkpoint ({newest}) in"
        f" {self._directory}: resume from the newest, or move the newer ones"
        " away."
      )
    if step == newest or not (force or self._manager.should_save(step)):
      return False
    try:
      self.wait()
      self._is_retrying = False
    except Exception:
      if self._is_retrying:
        raise
      self._is_retrying = True
      logging.warning("Step %d is saved in place of the one that failed.", step)
    record = {"step": step, "leaves": _leaves(state), "meta": dict(meta)}
    is_started = self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(record)
      ),
      force=force,
    )
    if not is_started:
      raise RuntimeError(
        f"Orbax declined to save step {step} in {self._directory}, where the"
        f" newest is {newest}."
      )
    return True

  def wait(self) -> None:
    """Returns once the save on its way is on disk, or raises its error."""
    try:
      self._manager.wait_until_finished()
    except Exception:
      self.failures += 1
      # Orbax has struck the failed step and those it was to displace off its
      # list; the latter are still on disk.
      self._manager.reload()
      logging.exception(
        "A checkpoint in %s could not be saved. The newest good one is step"
        " %s.",
        self._directory,
        self._manager.latest_step(),
      )
      raise

  def latest_step(self) -> int | None:
    """The newest step on disk, after waiting for the one on its way."""
    self.wait()
    return self._manager.latest_step()

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, dict[str, Any]] | None:
    """The state and meta of a step, laid out as `abstract_state` says.

    Args:
      abstract_state: The tree wanted: leaves with shape, dtype and sharding
        (`jax.ShapeDtypeStruct` or arrays). The mesh need not be the one that
        the checkpoint was saved from.
      step: The newest one if None.

    Returns:
      State and meta, or None where nothing has been saved yet.

    Raises:
      ValueError: No such step, or its leaves differ from those wanted.
    """
    self.wait()
    if step is None and self._manager.latest_step() is None:
      return None
    path, _ = _find(self._directory, step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      record = _read_record(reader, path)
      _check_leaves(record["leaves"], _leaves(abstract_state), path)
      state = _read_state(reader, path, abstract_state)
    logging.info("Restored %s.", path)
    return state, record["meta"]


def restore_params(
  directory: epath.PathLike, step: int | None, abstract_params: Any
) -> tuple[Any, int]:
  """The `params` alone of another run's state, and the step they come from.

  Reads nothing else of the state, and writes nothing: the other run may still
  be training.

  Args:
    directory: The other run's checkpoints.
    step: The newest one if None.
    abstract_params: As in `Checkpoints.restore`, for the `params` of the state.

  Raises:
    ValueError: No such step, or its leaves differ from those wanted.
  """
  path, step = _find(epath.Path(directory).resolve(), step)
  wanted = {"params": abstract_params}
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    saved = _read_record(reader, path)["leaves"]
    saved = {k: v for k, v in saved.items() if k.startswith("params/")}
    _check_leaves(saved, _leaves(wanted), path)
    params = _read_state(reader, path, wanted, is_partial=True)["params"]
  logging.info("Read the parameters of %s.", path)
  return params, step


def read_meta(directory: epath.PathLike, step: int) -> dict[str, Any]:
  """The `meta` that a step of another run was saved with.

  Raises:
    ValueError: No such step.
  """
  path, _ = _find(epath.Path(directory).resolve(), step)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    return _read_record(reader, path)["meta"]


def _find(directory: epath.Path, step: int | None) -> tuple[epath.Path, int]:
  """The folder of a finished step, and its number; the newest if None."""
  found = {each.step: each.path for each in _STEP_NAMES.find_all(directory)}
  if not found:
    raise ValueError(
      f"no checkpoint in {directory}: give the workdir of a run that has saved"
      " one."
    )
  if step is None:
    step = max(found)
  if step not in found:
    raise ValueError(
      f"no checkpoint of step {step} in {directory}: there are"
      f" {', '.join(map(str, sorted(found)))}."
    )
  return found[step], step


def _read_record(reader: ocp.Checkpointer, path: epath.Path) -> dict[str, Any]:
  args = ocp.args.Composite(meta=ocp.args.JsonRestore())
  return reader.restore(path, args=args).meta


def _read_state(
  reader: ocp.Checkpointer,
  path: epath.Path,
  abstract_state: Any,
  *,
  is_partial: bool = False,
) -> Any:
  """The arrays of `abstract_state`; of a larger saved tree if `is_partial`."""
  # Without one Orbax would lay a leaf out as the mesh of the save had it.
  assert all(leaf.sharding for leaf in jax.tree.leaves(abstract_state))
  abstract_state = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    abstract_state,
  )
  args = ocp.args.PyTreeRestore(
    abstract_state,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
    partial_restore=is_partial,
  )
  return reader.restore(path, args=ocp.args.Composite(state=args)).state


def _leaves(tree: Any) -> dict[str, str]:
  """Each leaf's dtype and shape by its path: `params/w` is `float32[4,8]`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_leaves(
  saved: Mapping[str, str], wanted: Mapping[str, str], path: epath.Path
) -> None:
  """Raises one error that lists the leaves in which the two trees differ."""
  mismatches = [
    f"  {name}: saved {saved.get(name, 'nothing')},"
    f" wanted {wanted.get(name, 'nothing')}"
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  if not mismatches:
    return
  shown = mismatches[:_MISMATCHES_SHOWN]
  if len(mismatches) > len(shown):
    shown.append(f"  and {len(mismatches) - len(shown)} more")
  raise ValueError(
    f"checkpoint {path} holds another state than the one wanted:\n"
    + "\n".join(shown)
    + "\nSet the model, optimizer and dtype settings to those it was saved"
    " with, or start in an empty workdir."
  )


def newest_step(directory: epath.PathLike) -> int:
  """The newest finished step in another run's checkpoints.

  Raises:
    ValueError: There is none.
  """
  return _find(epath.Path(directory).resolve(), None)[1]


def steps(directory: epath.PathLike) -> list[int]:
  """The finished steps in another run's checkpoints, ascending."""
  folder = epath.Path(directory).resolve()
  if not folder.is_dir():
    return []
  return sorted(each.step for each in _STEP_NAMES.find_all(folder))
