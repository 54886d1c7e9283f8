"""Gemma 3 4B on one v6e-16 slice: 16 chips on 4 hosts.

Trains the whole model, or adapters with `:lora` after the file name.
"""

import ml_collections

from configs import base


def get_config(kind: str = "full") -> ml_collections.ConfigDict:
  """The settings to train the "full" model or "lora" adapters."""
  if kind not in ("full", "lora"):
    raise ValueError(f"kind ({kind!r}) must be full or lora.")
  config = base.get_config()
  config.model.name = "gemma3_4b"
  config.mesh.update(fsdp=4, tensor=4)
  config.data.prompt_buckets = (384, 512, 1024)
  config.train.microbatch_bundles = 16
  if kind == "lora":
    config.model.lora.rank = 16
    config.model.param_dtype = "bfloat16"  # The frozen model.
    config.optimizer.learning_rate = 1e-5
  return config
