"""Checkpoints as they lie on a disk, of this run or of another one.

Which there are, whether they are whole, and what is in them. Writes nothing; a
run that still trains may be writing there. What one process decides or finds is
told to all, so where there are several they call these functions together.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from grpo_tpu.checkpoint import manifest, retention
from grpo_tpu.distributed import collectives

_MISMATCHES_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Unfinished:
  """A step that was left between two of its updates.

  Attributes:
    updates_done: Of the step's updates, at least 1.
    arrays: Global arrays that the rest of the step needs, by name; each is laid
      out by its first axis alone.
    record: What else it needs, as JSON would hold it.
  """

  updates_done: int
  arrays: dict[str, jax.Array]
  record: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint as it was saved.

  Attributes:
    step: Steps done.
    state: The arrays.
    meta: What was saved beside them.
    unfinished: Of the step after `step`; None where none had been begun.
  """

  step: int
  state: Any
  meta: dict[str, Any]
  unfinished: Unfinished | None


def restore_params(
  directory: epath.PathLike, step: int | None, abstract_params: Any
) -> tuple[Any, int]:
  """The `params` alone of another run's state, and the step they come from.

  Reads nothing else of the state, and writes nothing: the other run may still
  be training.

  Args:
    directory: The other run's checkpoints.
    step: The newest whole one if None.
    abstract_params: As in `Checkpoints.restore`, for the `params` of the state.

  Raises:
    ValueError: No such step, a damaged one, or its leaves differ from those
      wanted.
  """
  if step is None:
    step = newest_step(directory)
  path = _found(directory, step)
  if damage := agreed_damage(path):
    raise ValueError(_damaged(path, damage))
  wanted = {"params": abstract_params}
  saved = _read_record(path)["leaves"]
  saved = {k: v for k, v in saved.items() if k.startswith("params/")}
  _check_leaves(saved, leaves(wanted), path)
  params = _read_arrays(path / "state", wanted, is_partial=True)["params"]
  logging.info("Read the parameters of %s.", path)
  return params, step


def read_meta(directory: epath.PathLike, step: int) -> dict[str, Any]:
  """The `meta` that a step of another run was saved with.

  Raises:
    ValueError: No such step, or a damaged one.
  """
  path = _found(directory, step)
  if damage := manifest.damage(path, under="meta/"):
    raise ValueError(_damaged(path, damage))
  return _read_record(path)["meta"]


def newest_step(directory: epath.PathLike) -> int:
  """The newest step that is whole in another run's checkpoints.

  The first process decides: the other run may be saving one just now.

  Raises:
    ValueError: There is none.
  """
  folder = epath.Path(directory).resolve()
  said = collectives.broadcast_string(
    _newest_whole(folder) if collectives.is_first_process() else ""
  )
  if not said:
    raise ValueError(
      f"no checkpoint in {folder} is whole: give the workdir of a run that has"
      " saved one."
    )
  return int(said)


def steps(directory: epath.PathLike) -> list[int]:
  """The steps in another run's checkpoints, whole or not, ascending."""
  return [
    entry.step
    for entry in entries(epath.Path(directory).resolve())
    if not entry.updates
  ]


def newest_path(directory: epath.PathLike) -> epath.Path | None:
  """The newest whole checkpoint, of an unfinished step too; None without one.

  By the looks of it: nothing of it is verified.
  """
  folder = epath.Path(directory).resolve()
  whole = [entry for entry in entries(folder) if entry.is_whole]
  return folder / whole[-1].name if whole else None


def best_path(directory: epath.PathLike) -> epath.Path | None:
  """The whole checkpoint that scored best, the later of two that are as good.

  None where none has a score. By the looks of it, as for `newest_path`.
  """
  folder = epath.Path(directory).resolve()
  # The score is in the manifest: what has one is whole.
  scored = [entry for entry in entries(folder) if entry.score is not None]
  if not scored:
    return None
  return folder / max(scored, key=lambda entry: (entry.score, entry)).name


def _newest_whole(folder: epath.Path) -> str:
  for step in reversed(steps(folder)):
    path = folder / retention.Entry(step).name
    damage = manifest.damage(path)
    if not damage:
      return str(step)
    logging.warning("%s is damaged: %s. An older one is tried.", path, damage)
  return ""


def _found(directory: epath.PathLike, step: int) -> epath.Path:
  """The folder of a step that another run has finished."""
  folder = epath.Path(directory).resolve()
  there = steps(folder)
  path = folder / retention.Entry(step).name
  if step not in there:
    raise ValueError(
      f"no checkpoint of step {step} in {folder}: there are"
      f" {', '.join(map(str, there)) or 'none'}."
    )
  return path


def _damaged(path: epath.Path, damage: str) -> str:
  return (
    f"checkpoint {path} is damaged: {damage}; name another step, or none for"
    " the newest whole one."
  )


def agreed_damage(path: epath.Path) -> str:
  """What is wrong with a checkpoint, each process looking at its share."""
  parts = collectives.num_processes()
  part = jax.process_index() if parts > 1 else 0
  return collectives.first_error(manifest.damage(path, part=part, parts=parts))


def listed(directory: epath.Path) -> list[retention.Entry]:
  """What the first process finds there, ascending, told to all."""
  rows = (
    [[e.step, e.updates, e.is_whole, e.score] for e in entries(directory)]
    if collectives.is_first_process()
    else []
  )
  rows = json.loads(collectives.broadcast_string(json.dumps(rows)))
  return [retention.Entry(*row) for row in rows]


def entries(directory: epath.Path) -> list[retention.Entry]:
  """All that is there, ascending; of a name that is left alone, its manifest.

  A folder that went while its manifest stayed is a checkpoint that was lost.
  """
  names = (
    [path.name for path in directory.iterdir()] if directory.exists() else []
  )
  found = set()
  for name in names:
    entry = retention.Entry.of_name(name.removesuffix(manifest.SUFFIX))
    if entry is None:
      continue
    try:
      facts = manifest.read(directory / entry.name)
      entry = dataclasses.replace(entry, score=facts["score"])
    except manifest.Damaged:
      entry = dataclasses.replace(entry, is_whole=False)
    found.add(entry)
  return sorted(found)


def read(
  path: epath.Path,
  abstract_state: Any,
  unfinished_sharding: jax.sharding.Sharding | None,
) -> Restored:
  """What is in a whole checkpoint; the rest as in `Checkpoints.restore`.

  Raises:
    ValueError: Its leaves differ from those wanted.
  """
  record = _read_record(path)
  _check_leaves(record["leaves"], leaves(abstract_state), path)
  state = _read_arrays(path / "state", abstract_state)
  return Restored(
    record["step"],
    state,
    record["meta"],
    _read_unfinished(path, record["unfinished"], unfinished_sharding),
  )


def _read_unfinished(
  path: epath.Path,
  saved: dict[str, Any] | None,
  sharding: jax.sharding.Sharding | None,
) -> Unfinished | None:
  if saved is None:
    return None
  assert sharding is not None, "an unfinished step has to be laid out"
  wanted = {}
  for name, leaf in saved["leaves"].items():
    dtype, _, shape = leaf.removesuffix("]").partition("[")
    sizes = tuple(int(size) for size in shape.split(",") if size)
    wanted[name] = jax.ShapeDtypeStruct(
      sizes, jnp.dtype(dtype), sharding=sharding
    )
  arrays = _read_arrays(path / "unfinished", wanted)
  return Unfinished(saved["updates_done"], arrays, saved["record"])


def _read_record(path: epath.Path) -> dict[str, Any]:
  # The handlers alone: a `Checkpointer` would have the hosts meet after each
  # item, where one that has failed never comes.
  return dict(ocp.JsonCheckpointHandler().restore(path / "meta"))


def _read_arrays(
  path: epath.Path, abstract: Any, *, is_partial: bool = False
) -> Any:
  """The arrays of `abstract`; of a larger saved tree if `is_partial`."""
  # Without one Orbax would lay a leaf out as the mesh of the save had it.
  assert all(leaf.sharding for leaf in jax.tree.leaves(abstract))
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    abstract,
  )
  args = ocp.args.PyTreeRestore(
    abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=is_partial,
  )
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(path, args=args)


def leaves(tree: Any) -> dict[str, str]:
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
  names = [
    name
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  if not names:
    return
  shown = [
    f"  {name}: saved {saved.get(name, 'nothing')},"
    f" wanted {wanted.get(name, 'nothing')}"
    for name in names[:_MISMATCHES_SHOWN]
  ]
  if len(names) > len(shown):
    shown.append(f"  and {len(names) - len(shown)} more")
  is_only_dtype = all(
    saved.get(name, "").partition("[")[2]
    == wanted.get(name, "").partition("[")[2]
    for name in names
  )
  if is_only_dtype:
    settings = "model.param_dtype"
  elif any(name.startswith("params/") for name in names):
    settings = "model.name and model.lora"
  else:
    settings = "model.train_vision, model.lora and optimizer"
  raise ValueError(
    f"checkpoint {path} holds another state than the one wanted:\n"
    + "\n".join(shown)
    + f"\nSet {settings} to what it was saved with, or start in an empty"
    " workdir."
  )
