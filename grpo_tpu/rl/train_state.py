"""The state that an update changes and a checkpoint holds."""

from typing import Any

import flax.struct
from jaxtyping import Array, Int


class TrainState(flax.struct.PyTreeNode):
  """The policy and its optimizer."""

  step: Int[Array, ""]  # Number of finished GRPO steps.
  # Number of batches of prompts that were read; the sampler's keys follow it
  # too. Equals `step` unless batches were resampled.
  position: Int[Array, ""]
  params: dict  # With LoRA, the adapters alone.
  opt_state: Any
