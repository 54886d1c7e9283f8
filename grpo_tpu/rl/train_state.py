"""What an update changes, and a checkpoint holds."""

from typing import Any

import flax.struct
from jaxtyping import Array, Int


class TrainState(flax.struct.PyTreeNode):
  """The policy and its optimizer.

  Attributes:
    step: GRPO steps done.
    position: Batches of prompts taken from the data, which the sampler's keys
      follow too; the steps done, where none was resampled.
    params: Of the policy; of a run with LoRA, the adapters alone.
    opt_state: Of the optimizer.
  """

  step: Int[Array, ""]
  position: Int[Array, ""]
  params: dict
  opt_state: Any
