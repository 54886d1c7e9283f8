"""Gemma 3 27B on one v6e-256 slice: 256 chips on 64 hosts.

The whole model is trained; with `:lora` behind the file name, adapters.
"""

import ml_collections

from configs import base


def get_config(kind: str = "full") -> ml_collections.ConfigDict:
  """Settings of one of the two kinds, "full" or "lora"."""
  if kind not in ("full", "lora"):
    raise ValueError(f"kind ({kind!r}) must be full or lora.")
  config = base.get_config()
  config.model.name = "gemma3_27b"
  config.mesh.update(fsdp=32, tensor=8)
  config.data.prompts_per_step = 128
  config.train.microbatch_bundles = 64
  if kind == "lora":
    config.model.lora.rank = 16
    config.model.param_dtype = "bfloat16"  # Of what lies frozen under them.
    config.optimizer.learning_rate = 1e-5
  return config
