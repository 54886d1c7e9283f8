"""The parameters that `model.weights` names, on a mesh.

Adapters of a run stay beside the weights they were trained on, for in a narrow
type a sum would lose them, or are merged on request. The head of a reward model
is zero where its source has none.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from data_pipelines import validation
from data_pipelines.validation import SettingError, run_errors, user_errors
from grpo_tpu.checkpoint import reader
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import lora, weights
from grpo_tpu.models.gemma3.convert import peft
from grpo_tpu.models.settings import LoraConfig, ModelSettings


class SavedAdapters(NamedTuple):
  """Adapters of a run's checkpoint."""

  adapters: dict  # The factors, on the mesh.
  config: LoraConfig
  base_weights: str  # The weights below them, as `model.weights` names them.


def load_params(model: ModelSettings, mesh: Mesh) -> dict:
  """The parameters that `model.weights` names, sharded over the mesh.

  Those of a run with adapters hold `lora.AdaptedWeight`s: with its
  `model.param_dtype`, they are the policy of that run to the bit.

  Raises:
    SettingError: The files or the run do not exist, or belong to another model.
    RuntimeError: They cannot be read.
  """
  if not model.weights:
    raise SettingError(model.describe_weights())
  with run_errors(f"load {model.weights}"):
    source = resolve(model)
    check_head(model, source.head)
    params = _load(source, mesh)
  if model.head and not source.head:
    logging.info("%s has no head; it starts at zero.", source.weights)
    w = abstract_params(model, mesh)["score"]["w"]
    params["score"] = {"w": jnp.zeros(w.shape, w.dtype, device=w.sharding)}
  return params


def _load(model: ModelSettings, mesh: Mesh) -> dict:
  abstract = abstract_params(model, mesh)
  scheme, _, rest = model.weights.partition(":")
  if scheme == "run":
    if saved := load_adapters(model, mesh):
      base = _load_base(model, mesh, saved)
      return lora.with_adapters(base, saved.adapters, saved.config)
    return reader.restore_params(*_checkpoint(model.weights), abstract)
  if scheme == "random":
    dtype = np.dtype(model.param_dtype)
    values = weights.random_params(model.network, int(rest), dtype)
    return _on_mesh(values, abstract)
  with user_errors():
    checkpoint = weights.open_files(scheme, model.network, rest)
  return checkpoint.load(abstract)


def resolve(model: ModelSettings) -> ModelSettings:
  """The settings with the step of the weights, and the head that they have."""
  weights = resolve_weights(model.weights)
  with user_errors():
    head = "score" * has_head(weights)
  return dataclasses.replace(model, weights=weights, head=head)


def has_head(name: str) -> bool:
  """True if resolved `model.weights` are those of a reward model."""
  scheme, _, rest = name.partition(":")
  if scheme != "run":
    return weights.has_head(scheme, rest)
  saved = reader.read_record(*_checkpoint(name))
  return f"params/{lora.HEAD}" in saved["leaves"]


def check_head(model: ModelSettings, head: str) -> None:
  """Refuses weights with a `head` as those of a language model."""
  rule = "be those of a language model, and are those of a reward model"
  remedy = "name them in rewards.models, or set data.kind=preference and "
  remedy += "objective.preset=bradley_terry to train or evaluate them"
  holds = bool(model.head) or not head
  with user_errors():
    validation.require(holds, "model.weights", model.weights, rule, remedy)


def load_merged(model: ModelSettings, mesh: Mesh) -> dict:
  """Those of `load_params`, with adapters added in fp32 and rounded once."""
  params = load_params(model, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh))
  if jax.tree.structure(params) == jax.tree.structure(shardings):
    return params
  return jax.jit(lora.merge_adapters, out_shardings=shardings)(params)


def abstract_params(model: ModelSettings, mesh: Mesh) -> dict:
  """Shapes, types and shardings of the parameters."""
  dtype = jnp.dtype(model.param_dtype)
  return with_shardings(mesh, weights.abstract_params(model.network, dtype))


def initial_adapters(
  model: ModelSettings, mesh: Mesh, *, seed: int, frozen: dict | None = None
) -> dict:
  """The adapters of `model.lora.init`, or new ones, without effect yet.

  The head of a reward model starts from that of `frozen`.
  """
  values = lora.initial_adapters(model.network, model.lora, seed)
  if frozen and "score" in frozen:
    values["score"] = jax.tree.map(np.array, frozen["score"])
  if model.lora.init:
    with user_errors():
      values = peft.load(model.network, model.lora, values)
  return _on_mesh(values, abstract_adapters(model, mesh))


def abstract_adapters(
  model: ModelSettings, mesh: Mesh, config: LoraConfig | None = None
) -> dict:
  """Shapes, types and shardings of the adapters of `config` or `model.lora`."""
  shapes = lora.abstract_adapters(model.network, config or model.lora)
  return with_shardings(mesh, shapes)


def load_adapters(model: ModelSettings, mesh: Mesh) -> SavedAdapters | None:
  """The adapters that `model.weights` names; None if it names a whole model.

  They have the head of `model`.

  Raises:
    SettingError: The run has no such checkpoint, or one of another model.
  """
  name = resolve_weights(model.weights)
  if not name.startswith("run:"):
    return None
  saved = reader.read_record(*_checkpoint(name))["meta"].get("lora")
  if saved is None:
    return None
  base_weights = saved.pop("weights")
  saved |= {"targets": tuple(saved["targets"]), "init": ""}
  config = LoraConfig(**saved)
  # Not by the settings of our own adapters: this run may train without any.
  abstract = abstract_adapters(model, mesh, config)
  adapters = reader.restore_params(*_checkpoint(name), abstract)
  return SavedAdapters(adapters, config, base_weights)


def resolve_weights(name: str) -> str:
  """`model.weights` with the step that it means now, so that it stays fixed.

  Raises:
    SettingError: The run has no checkpoint.
  """
  if not name.startswith("run:"):
    return name
  folder, step = _checkpoint(name)
  if step is None:
    step = reader.newest_step(folder)
  elif step == "best":
    step = reader.best_step(folder)
  return f"run:{split_run(name)[0]}@{step}"


def with_shardings(mesh: Mesh, tree: Any) -> Any:
  """Shapes with the shardings that the rules give to parameters."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    sharding.param_shardings(mesh, tree),
  )


def _load_base(model: ModelSettings, mesh: Mesh, saved: SavedAdapters) -> dict:
  """The parameters that saved adapters belong to."""
  try:
    base = dataclasses.replace(model, weights=saved.base_weights)
    return _load(resolve(base), mesh)
  except (OSError, ValueError) as error:
    raise SettingError(
      f"model.weights ({model.weights!r}) is a run that saved adapters only, "
      f"and the weights they belong to ({saved.base_weights!r}) cannot be "
      f"read: {error}"
    ) from error


def _on_mesh(values: dict, abstract: dict) -> dict:
  """Puts host arrays on devices, sharded as `abstract` says."""
  return jax.tree.map(
    lambda x, shape: jax.make_array_from_callback(
      x.shape, shape.sharding, lambda index, x=x: x[index]
    ),
    values,
    abstract,
  )


def split_run(name: str) -> tuple[str, Any]:
  """Splits `run:WORKDIR[@STEP]` or `@best`; the workdir may contain an @."""
  rest = name.removeprefix("run:")
  workdir, at, step = rest.rpartition("@")
  if not at or not (step == "best" or step.isdecimal()):
    return rest, None
  return workdir, step if step == "best" else int(step)


def _checkpoint(name: str) -> tuple[str, Any]:
  workdir, step = split_run(name)
  return f"{workdir}/checkpoints", step
