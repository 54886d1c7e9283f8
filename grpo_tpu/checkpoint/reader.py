"""Lists, verifies and reads checkpoints of this run or of another run.

Writes nothing, and a run that still trains may be writing in the directory.
Process 0 lists the files and tells the others, so all call these functions.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

from data_pipelines.storage import paths
from data_pipelines.text import untrusted
from data_pipelines.validation import SettingError, run_errors
from grpo_tpu.checkpoint import manifest, retention
from grpo_tpu.checkpoint.retention import CheckpointInfo
from grpo_tpu.distributed import collectives

_MISMATCHES_SHOWN = 10
_FIELDS = {"step": int, "leaves": dict, "meta": dict}
_PARTIAL_STEP_FIELDS = {"updates_done": int, "leaves": dict, "record": dict}
_FLOATS = {"float32", "bfloat16"}
_MASTERS = "opt_state/masters"  # Paths of `rl.masters` in a state.


class PartialStepData(NamedTuple):
  """A training step that was interrupted between two of its updates."""

  updates_done: int  # At least 1.
  # What the rest of the step needs: arrays, sharded along their first axis,
  arrays: dict[str, jax.Array]
  record: dict[str, Any]  # and values, as JSON can hold them.


class RestoredCheckpoint(NamedTuple):
  """The contents of a checkpoint, as `Checkpoints.save` describes them."""

  step: int
  state: Any
  meta: dict[str, Any]
  partial_step: PartialStepData | None


def restore_params(
  directory: epath.PathLike, step: int, abstract_params: Any
) -> Any:
  """Reads only another run's `params`.

  Values get the wanted types. Where float32 is wanted, they come from the
  masters of a run that has any (`rl.masters`). `abstract_params` is the
  `params` part of what `Checkpoints.restore` takes.

  Raises:
    SettingError: The step is missing or damaged, or its leaves differ from
      `abstract_params` by more than a floating-point type.
  """
  path = _whole_path(directory, step, find_damage)
  saved = _read_record(path)["leaves"]
  wanted = describe_leaves({"params": abstract_params})
  _check_leaves(_cast_leaves(saved, wanted), wanted, path)
  # A master of the wanted type is what the rounded parameter is not.
  sources = {
    name: master
    if saved.get(master := name.replace("params", _MASTERS, 1)) == leaf
    else name
    for name, leaf in wanted.items()
  }
  abstract = traverse_util.flatten_dict({"params": abstract_params}, sep="/")
  tree = {sources[name]: leaf for name, leaf in abstract.items()}
  tree = traverse_util.unflatten_dict(tree, sep="/")
  tree = _read_arrays(path / "state", tree, is_partial=True)
  arrays = traverse_util.flatten_dict(tree, sep="/")
  params = {name: arrays[source] for name, source in sources.items()}
  logging.info("Read the parameters of %s.", path)
  return traverse_util.unflatten_dict(params, sep="/")["params"]


def read_record(directory: epath.PathLike, step: int) -> dict[str, Any]:
  """Reads `leaves`, types and shapes by path, and `meta` of another run's step.

  Raises:
    SettingError: The step is missing or damaged.
  """
  verify = functools.partial(manifest.find_damage, under="meta/")
  path = _whole_path(directory, step, verify)
  return _read_record(path)


def newest_step(directory: epath.PathLike) -> int:
  """The newest verified step in another run's checkpoints.

  Process 0 decides, because the other run may be saving a step right now.

  Raises:
    SettingError: No step is whole.
  """
  folder = paths.absolute(directory)

  def newest_whole() -> str:
    for step in reversed(steps(folder)):
      path = folder / CheckpointInfo(step).name
      damage = manifest.find_damage(path)
      if not damage:
        return str(step)
      logging.warning("%s is damaged: %s. Trying an older one.", path, damage)
    return ""

  newest = ask_first_process(newest_whole)
  if not newest:
    raise SettingError(
      f"no checkpoint in {folder} is whole: give the workdir of a run that has"
      " saved one."
    )
  return int(newest)


def steps(directory: epath.PathLike) -> list[int]:
  """The finished steps in a directory, whole or not, in ascending order."""
  saved = list_checkpoints(directory)
  return [info.step for info in saved if not info.updates]


def newest_path(directory: epath.PathLike) -> epath.Path | None:
  """The newest checkpoint with a manifest, or None; its files may be damaged.

  A partial step counts too.
  """
  whole = [info for info in list_checkpoints(directory) if info.is_whole]
  return paths.absolute(directory) / whole[-1].name if whole else None


def best_path(directory: epath.PathLike) -> epath.Path | None:
  """The checkpoint with the best score, the later one of two equals, or None.

  If the best metric has changed, the newest score decides which one counts. Its
  files may be damaged.
  """
  # The score stands in the manifest, so a scored checkpoint is whole.
  scored = [x for x in list_checkpoints(directory) if x.score is not None]
  if not scored:
    return None
  best = retention.by_score(scored, scored[-1].metric)[-1]
  return paths.absolute(directory) / best.name


def best_step(directory: epath.PathLike) -> int:
  """The step of `best_path`, which process 0 decides.

  Raises:
    SettingError: No checkpoint has a score.
  """
  best = ask_first_process(lambda: getattr(best_path(directory), "name", ""))
  if not best:
    raise SettingError(
      f"no checkpoint in {directory} is known as the best: its run must have "
      "trained with checkpoint.best_metric, as in eval/accuracy. Name a step"
      " instead, or none for the newest."
    )
  return int(best)


def _whole_path(
  directory: epath.PathLike, step: int, verify: Callable[[epath.Path], str]
) -> epath.Path:
  """The verified folder of a finished step of another run."""
  folder = paths.absolute(directory)
  saved = steps(folder)
  if step not in saved:
    raise SettingError(
      f"no checkpoint of step {step} in {folder}: there are"
      f" {', '.join(map(str, saved)) or 'none'}."
    )
  path = folder / CheckpointInfo(step).name
  if damage := verify(path):
    raise SettingError(
      f"checkpoint {path} is damaged: {damage}; name another step, or no step"
      " for the newest whole one."
    )
  return path


def find_damage(path: epath.Path) -> str:
  """Verifies a checkpoint, every process a share; returns damage or ""."""
  parts = collectives.num_processes()
  part = jax.process_index() if parts > 1 else 0
  damage = manifest.find_damage(path, part=part, parts=parts)
  return collectives.first_error(damage)


def ask_first_process(function: Callable[[], str]) -> str:
  """The result of `function` on process 0, the only one that calls it."""
  return collectives.broadcast_string(
    function() if collectives.is_first_process() else ""
  )


def broadcast_checkpoints(directory: epath.Path) -> list[CheckpointInfo]:
  """The checkpoints that process 0 lists, on every process."""
  text = ask_first_process(
    lambda: json.dumps([*map(dataclasses.astuple, list_checkpoints(directory))])
  )
  return [CheckpointInfo(*row) for row in json.loads(text)]


def list_checkpoints(directory: epath.PathLike) -> list[CheckpointInfo]:
  """All checkpoints in a directory, in ascending order.

  A manifest without its folder is listed too: that checkpoint was lost.
  """
  checkpoints, directory = set(), epath.Path(directory)
  for path in directory.iterdir() if directory.exists() else ():
    name = path.name.removesuffix(manifest.SUFFIX)
    if (info := CheckpointInfo.from_name(name)) is None:
      continue
    try:
      facts = manifest.read(directory / info.name)
      scored = {k: facts[k] for k in ("score", "metric") if k in facts}
      info = dataclasses.replace(info, **scored)
    except manifest.ManifestError:
      info = dataclasses.replace(info, is_whole=False)
    checkpoints.add(info)
  return sorted(checkpoints)


def read_checkpoint(
  path: epath.Path,
  abstract_state: Any,
  partial_step_sharding: jax.sharding.Sharding | None,
) -> RestoredCheckpoint:
  """Reads a verified checkpoint; see `Checkpoints.restore` for the arguments.

  Raises:
    SettingError: The saved leaves differ from `abstract_state`.
  """
  record = _read_record(path)
  _check_leaves(record["leaves"], describe_leaves(abstract_state), path)
  state = _read_arrays(path / "state", abstract_state)
  partial_step = None
  if (saved := record["unfinished"]) is not None:
    assert partial_step_sharding is not None, "a partial step needs a sharding"
    wanted = {}
    for name, leaf in saved["leaves"].items():
      dtype, *sizes = re.findall(r"\w+", leaf)
      wanted[name] = jax.ShapeDtypeStruct(
        tuple(map(int, sizes)), dtype, sharding=partial_step_sharding
      )
    arrays = _read_arrays(path / "unfinished", wanted)
    partial_step = PartialStepData(
      saved["updates_done"], arrays, saved["record"]
    )
  return RestoredCheckpoint(record["step"], state, record["meta"], partial_step)


def _read_record(path: epath.Path) -> dict[str, Any]:
  try:
    file = path / "meta" / "metadata"  # As Orbax writes JSON.
    record = untrusted.read_json(file, source="its record")
    parts = [(record, _FIELDS, "its record")]
    if (partial := record.setdefault("unfinished")) is not None:
      parts.append((partial, _PARTIAL_STEP_FIELDS, "its unfinished step"))
    for part, fields, source in parts:
      untrusted.check_kind(part, dict, source)
      for name, kind in fields.items():
        untrusted.get_field(part, name, kind, source)
      untrusted.check_items(part["leaves"].values(), str, "its leaves")
  except ValueError as error:
    raise SettingError(
      f"checkpoint {path} is whole, but not one of this program: {error} Name "
      "another, or use an empty workdir."
    ) from error
  return record


def _read_arrays(
  path: epath.Path, abstract: Any, *, is_partial: bool = False
) -> Any:
  """Reads the arrays of `abstract`, from a larger tree if `is_partial`."""
  # Without a sharding Orbax would use the mesh that the checkpoint came from.
  assert all(leaf.sharding for leaf in jax.tree.leaves(abstract))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    abstract,
  )
  args = ocp.args.PyTreeRestore(
    abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=is_partial,
  )
  # A `Checkpointer` would synchronize the hosts after each item, and hang if
  # one of them has failed. A bare handler does not.
  with (
    run_errors(f"read {path}"),
    contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler,
  ):
    return handler.restore(path, args=args)


def describe_leaves(tree: Any) -> dict[str, str]:
  """Each leaf's dtype and shape by path, as in `params/w`: `float32[4,8]`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _cast_leaves(
  saved: Mapping[str, str], wanted: Mapping[str, str]
) -> dict[str, str]:
  """The saved parameters, with the wanted types if both are floating-point."""

  def cast(name: str, leaf: str) -> str:
    old, _, shape = leaf.partition("[")
    new = wanted.get(name, leaf).partition("[")[0]
    return f"{new}[{shape}" if {old, new} <= _FLOATS else leaf

  return {k: cast(k, v) for k, v in saved.items() if k.startswith("params/")}


def _check_leaves(
  saved: Mapping[str, str], wanted: Mapping[str, str], path: epath.Path
) -> None:
  """Raises one SettingError that lists all leaves that differ."""
  names = sorted(dict(saved.items() ^ wanted.items()))
  if not names:
    return
  sides = [[x.get(name, "nothing") for name in names] for x in (saved, wanted)]
  triples = zip(names, *sides, strict=True)
  lines = [f"  {x}: saved {old}, wanted {new}" for x, old, new in triples]
  if len(lines) > _MISMATCHES_SHOWN:
    more = f"  and {len(lines) - _MISMATCHES_SHOWN} more"
    lines[_MISMATCHES_SHOWN:] = [more]
  old, new = ([leaf.partition("[")[2] for leaf in side] for side in sides)
  if old == new:
    settings = "model.param_dtype"
  elif any(name.startswith("params/") for name in names):
    settings = "model.name and model.lora"
  else:
    settings = "model.train_vision, model.lora and optimizer"
  remedy = f"Set {settings} to what it was saved with, or start in an empty"
  if any(x.startswith(_MASTERS) for x in wanted.keys() - saved.keys()):
    remedy = (
      "If it has parameters in bfloat16 and no masters of them in float32, as"
      f" older versions saved it, set model.weights=run:{path.parent.parent} in"
      " an empty"
    )
  first = f"checkpoint {path} does not match the state that the settings make:"
  raise SettingError("\n".join([first, *lines, f"{remedy} workdir."]))
