"""--mode=export: writes `model.weights` as a Hugging Face folder to serve."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from data_pipelines.validation import user_errors
from grpo_tpu.checkpoint import companions, load, model_card
from grpo_tpu.checkpoint.settings import ExportConfig
from grpo_tpu.distributed import sharding
from grpo_tpu.distributed.settings import MeshConfig
from grpo_tpu.models.gemma3.convert import huggingface, peft
from grpo_tpu.models.settings import ModelSettings


def check(model: ModelSettings, settings: ExportConfig, workdir: str) -> None:
  """Refuses, before any device is used, an export that cannot be written.

  Raises:
    ValueError: There is no such checkpoint or tokenizer, or the export exists.
  """
  huggingface.check_no_checkpoint(epath.Path(workdir) / "export")
  _make_files(load.resolve(model), settings)


def run(
  model: ModelSettings,
  settings: ExportConfig,
  mesh_config: MeshConfig,
  workdir: str,
) -> str:
  """Writes `workdir`/export, for transformers or peft; returns what to do next.

  Raises:
    SettingError: A setting that only the devices or the weights can refute.
  """
  with user_errors():
    mesh = sharding.make_mesh(**dataclasses.asdict(mesh_config))
    exported = load.resolve(model)
    if settings.dtype == "float32":
      # Reads masters, and merges adapters, without rounding to `param_dtype`.
      exported = dataclasses.replace(exported, param_dtype="float32")
    files = {} if jax.process_index() else _make_files(exported, settings)
    if settings.adapter:
      saved = load.load_adapters(exported, mesh)
      if saved is None:
        raise ValueError(
          "export.adapter (True) must go with a run that has saved adapters, "
          f"and {model.weights} has none; set export.adapter=False."
        )
      scheme, _, base = saved.base_weights.partition(":")
      base = base if scheme == "hf" else ""
      parts = exported.network, saved.config, saved.adapters
      write = functools.partial(peft.save, *parts, base_model=base)
    else:
      parts = exported.network, load.load_merged(exported, mesh)
      dtype = jnp.dtype(settings.dtype)
      write = functools.partial(huggingface.save, *parts, dtype=dtype)
  logging.info("Exporting %s.", exported.weights)
  folder = epath.Path(workdir) / "export"
  write(folder, files=files)
  return f"open {folder / model_card.NAME}, which says how to load and serve it"


def _make_files(model: ModelSettings, settings: ExportConfig) -> dict[str, Any]:
  """The files beside the weights by name."""
  stages, origin = model_card.read_stages(model.weights)
  card = model_card.render(model, stages, origin, settings.adapter)
  files: dict[str, Any] = {model_card.NAME: card.encode()}
  if settings.adapter:
    return files
  parts = model.network, model.weights, origin, settings.tokenizer_dir
  return files | companions.make_files(*parts)
