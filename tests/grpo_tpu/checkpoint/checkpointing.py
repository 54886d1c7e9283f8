"""Opens checkpoints for tests, with a save at every step by default."""

import dataclasses
import os

from configs import base
from grpo_tpu.checkpoint import checkpointer
from grpo_tpu.checkpoint.settings import CheckpointConfig


def config(**changes) -> CheckpointConfig:
  """The default settings with a save at every step and these changes."""
  settings = CheckpointConfig(**base.get_config().checkpoint)
  return dataclasses.replace(settings, **{"every_steps": 1} | changes)


def opened(path: str | os.PathLike[str], **changes) -> checkpointer.Checkpoints:
  """Opens the checkpoints in `path` with these settings."""
  return checkpointer.Checkpoints(path, config(**changes))
