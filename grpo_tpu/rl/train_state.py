"""The state that an update changes and a checkpoint holds."""

from typing import Any

import flax.struct
from jaxtyping import Array, Int


class TrainState(flax.struct.PyTreeNode):
  """The policy and its optimizer.

  Attributes:
    step: Number of finished GRPO steps.
    position: Number of batches of prompts that were read; the sampler's keys
      follow it too. Equals `step` unless batches were resampled.
    params: Parameters of the policy; with LoRA, the adapters alone.
    opt_state: State of the optimizer.
  """

  step: Int[Array, ""]
  position: Int[Array, ""]
  params: dict
  opt_state: Any
