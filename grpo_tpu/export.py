"""--mode=export: what was trained, in the format that people serve.

Choreography alone: `policy` reads the parameters, `gemma3.weights` writes them.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
from absl import logging

from grpo_tpu import checkpoint, sharding
from grpo_tpu import config as run_config
from grpo_tpu import policy as policies
from grpo_tpu.gemma3 import huggingface, weights


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
  """Writes `workdir`/export, a checkpoint for transformers.

  Raises:
    SettingError: A setting that only the devices or the weights can refute.
  """
  with run_config.refutable():
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    settings = dataclasses.replace(
      config.model, weights=source(config, workdir)
    )
    params = policies.initial_params(
      dataclasses.replace(config, model=settings), mesh
    )
  logging.info("Exporting %s.", settings.weights)
  scheme, _, rest = config.model.weights.partition(":")
  theirs = rest if scheme == "hf" else None
  weights.to_hf(
    config.model_config,
    params,
    _folder(workdir),
    dtype=jnp.dtype(config.export.dtype),
    tokenizer_dir=config.export.tokenizer_dir or theirs,
  )


def source(config: run_config.Config, workdir: str) -> str:
  """What is exported, in the words of `model.weights`, its step spelt out.

  Raises:
    ValueError: There is no such checkpoint.
  """
  folder, step = f"{workdir}/checkpoints", config.export.step
  saved = checkpoint.steps(folder)
  if not saved and step is None:
    return policies.resolved_weights(config)
  if step is None:
    step = checkpoint.newest_step(folder)
  elif step not in saved:
    there = ", ".join(map(str, saved)) or "none"
    raise ValueError(
      f"export.step ({step}) must be one of the steps in {folder} ({there}); "
      "leave it out for the newest whole one."
    )
  return f"run:{workdir}@{step}"


def _folder(workdir: str) -> pathlib.Path:
  return pathlib.Path(workdir) / "export"
