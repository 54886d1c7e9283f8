"""Gemma 3 4B on one v5e-8 slice: 8 chips on 1 host.

Trains the whole model, or adapters with `:lora` after the file name. A plan
of the longest prompts takes 13.67 of the 15.75 GiB of a chip, 9.25 with LoRA.
The same settings are for one v6e-8, whose chips have 31.24 GiB.
"""

import ml_collections

from configs import base


def get_config(kind: str = "full") -> ml_collections.ConfigDict:
  """The settings to train the "full" model or "lora" adapters."""
  if kind not in ("full", "lora"):
    raise ValueError(f"kind ({kind!r}) must be full or lora.")
  config = base.get_config()
  config.model.name = "gemma3_4b"
  config.mesh.update(fsdp=2, tensor=4)
  config.data.prompt_buckets = (384, 512, 1024)
  config.rollout.prompts_at_a_time = 32
  config.train.microbatch_bundles = 2
  if kind == "lora":
    config.train.microbatch_bundles = 4
    config.model.lora.rank = 16
    config.model.param_dtype = "bfloat16"  # The frozen model.
    config.optimizer.learning_rate = 1e-5
  return config
