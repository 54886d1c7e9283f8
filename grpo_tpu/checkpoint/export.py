"""--mode=export: what was trained, in the format that people serve.

Choreography alone: `policy` reads the parameters, `gemma3` writes them.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from data_pipelines import validation
from grpo_tpu.checkpoint import reader
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.models.gemma3.convert import huggingface, peft
from grpo_tpu.rl import policy as policies


def check(config: run_config.Config, workdir: str) -> None:
  """Refuses, before any device, what could not be exported.

  Raises:
    ValueError: There is no such checkpoint, no such tokenizer, or the export is
      there already.
  """
  huggingface.check_no_checkpoint(_folder(workdir))
  source(config, workdir)
  tokenizer_dir = config.export.tokenizer_dir
  if tokenizer_dir and not pathlib.Path(tokenizer_dir).is_dir():
    raise ValueError(
      f"export.tokenizer_dir ({tokenizer_dir!r}) must be a folder with the "
      "tokenizer's files; correct it, or leave it out."
    )


def run(config: run_config.Config, workdir: str) -> None:
  """Writes `workdir`/export: a checkpoint for transformers, or one for peft.

  Raises:
    SettingError: A setting that only the devices or the weights can refute.
  """
  with validation.user_errors():
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    settings = dataclasses.replace(
      config.model, weights=source(config, workdir)
    )
    settled = dataclasses.replace(config, model=settings)
    if config.export.adapter:
      write = _adapter_writer(settled, mesh)
    else:
      write = _model_writer(config, policies.initial_params(settled, mesh))
  logging.info("Exporting %s.", settings.weights)
  write(_folder(workdir))


def _model_writer(
  config: run_config.Config, params: dict
) -> Callable[[pathlib.Path], None]:
  scheme, _, rest = config.model.weights.partition(":")
  theirs = rest if scheme == "hf" else None
  return functools.partial(
    weights.to_hf,
    config.model_config,
    params,
    dtype=jnp.dtype(config.export.dtype),
    tokenizer_dir=config.export.tokenizer_dir or theirs,
  )


def _adapter_writer(
  config: run_config.Config, mesh: Mesh
) -> Callable[[pathlib.Path], None]:
  found = policies.saved_adapters(config, mesh)
  if found is None:
    raise ValueError(
      "export.adapter (True) must go with a run that has saved adapters, and "
      f"{config.model.weights} has none; set export.adapter=False."
    )
  adapters, settings, under = found
  scheme, _, rest = under.partition(":")
  # Of which other processes may hold parts; the first writes.
  everywhere = jax.jit(
    lambda x: x, out_shardings=sharding.replicated_sharding(mesh)
  )
  write = functools.partial(
    peft.save,
    config.model_config,
    settings,
    everywhere(adapters),
    base_model=rest if scheme == "hf" else "",
  )
  return write if jax.process_index() == 0 else lambda directory: None


def source(config: run_config.Config, workdir: str) -> str:
  """What is exported, in the words of `model.weights`, its step spelt out.

  Raises:
    ValueError: There is no such checkpoint.
  """
  folder, step = f"{workdir}/checkpoints", config.export.step
  saved = reader.steps(folder)
  if not saved and step is None:
    return policies.resolved_weights(config)
  if step is None:
    step = reader.newest_step(folder)
  elif step not in saved:
    there = ", ".join(map(str, saved)) or "none"
    raise ValueError(
      f"export.step ({step}) must be one of the steps in {folder} ({there}); "
      "leave it out for the newest whole one."
    )
  return f"run:{workdir}@{step}"


def _folder(workdir: str) -> pathlib.Path:
  return pathlib.Path(workdir) / "export"
