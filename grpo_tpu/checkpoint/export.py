"""--mode=export: writes `model.weights` in the format of Hugging Face."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from data_pipelines.text import untrusted
from data_pipelines.validation import user_errors
from grpo_tpu.checkpoint import load
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
  huggingface.check_no_checkpoint(_folder(workdir))
  name = load.resolve_weights(model.weights)
  huggingface.read_generation_config(_source_dir(name, settings))
  tokenizer_dir = settings.tokenizer_dir
  if tokenizer_dir and not pathlib.Path(tokenizer_dir).is_dir():
    raise ValueError(
      f"export.tokenizer_dir ({tokenizer_dir!r}) must be a folder with the "
      "tokenizer's files; correct it, or leave it out."
    )


def run(
  model: ModelSettings,
  settings: ExportConfig,
  mesh_config: MeshConfig,
  workdir: str,
) -> str:
  """Writes `workdir`/export: a transformers checkpoint, or a peft adapter.

  Returns what to do next.

  Raises:
    SettingError: A setting that only the devices or the weights can refute.
  """
  with user_errors():
    mesh = sharding.make_mesh(**dataclasses.asdict(mesh_config))
    name = load.resolve_weights(model.weights)
    exported = dataclasses.replace(model, weights=name)
    if settings.dtype == "float32":
      # Reads masters, and merges adapters, without rounding to `param_dtype`.
      exported = dataclasses.replace(exported, param_dtype="float32")
    if settings.adapter:
      write = _adapter_writer(exported, mesh, model.weights)
    else:
      write = functools.partial(
        huggingface.save,
        model.network,
        load.load_merged(exported, mesh),
        dtype=jnp.dtype(settings.dtype),
        tokenizer_dir=settings.tokenizer_dir or _origin(name),
        source_dir=_source_dir(name, settings),
      )
  logging.info("Exporting %s.", name)
  folder = _folder(workdir)
  write(folder)
  if settings.adapter:
    return f"peft.PeftModel.from_pretrained(model, {str(folder)!r})"
  kind = "ImageTextToText" if model.network.vision else "CausalLM"
  return f"transformers.AutoModelFor{kind}.from_pretrained({str(folder)!r})"


def _adapter_writer(
  model: ModelSettings, mesh: Mesh, named: str
) -> Callable[[pathlib.Path], None]:
  saved = load.load_adapters(model, mesh)
  if saved is None:
    raise ValueError(
      "export.adapter (True) must go with a run that has saved adapters, and "
      f"{named} has none; set export.adapter=False."
    )
  # Other processes may hold parts of the factors; the first one writes all.
  replicate = jax.jit(
    lambda x: x, out_shardings=sharding.replicated_sharding(mesh)
  )
  write = functools.partial(
    peft.save,
    model.network,
    saved.config,
    replicate(saved.adapters),
    base_model=_hf_folder(saved.base_weights),
  )
  return write if jax.process_index() == 0 else lambda directory: None


def _source_dir(name: str, settings: ExportConfig) -> str:
  """The folder whose sampling defaults an export keeps; "" for none."""
  return _origin(name) or settings.tokenizer_dir


def _origin(name: str) -> str:
  """The folder of `hf:` weights that a model began as; "" if it is unknown.

  The record of a run names the weights that it started from, maybe a run too.
  """
  seen = set()
  while name.startswith("run:") and name not in seen:
    seen.add(name)
    try:
      record = untrusted.read_json(f"{load.workdir_of(name)}/run.json")
      name = untrusted.get_field(record, "weights", str, "run.json")
    except (OSError, ValueError):
      return ""
  folder = _hf_folder(name)
  return folder if pathlib.Path(folder).is_dir() else ""


def _hf_folder(name: str) -> str:
  """The folder of `hf:` weights; "" for any others."""
  scheme, _, folder = name.partition(":")
  return folder if scheme == "hf" else ""


def _folder(workdir: str) -> pathlib.Path:
  return pathlib.Path(workdir) / "export"
