"""Checkpoints as tests open them: every step, and few settings to name."""

import dataclasses
import os

from configs import base
from grpo_tpu.checkpoint import checkpointer, retention


def config(**changes) -> retention.CheckpointConfig:
  """The settings of `configs/base.py`, but for these and `every_steps`."""
  settings = retention.CheckpointConfig(**base.get_config().checkpoint)
  return dataclasses.replace(settings, **{"every_steps": 1} | changes)


def opened(path: str | os.PathLike[str], **changes) -> checkpointer.Checkpoints:
  """Those under `path`, with these settings."""
  return checkpointer.Checkpoints(path, config(**changes))
