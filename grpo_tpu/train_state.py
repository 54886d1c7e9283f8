"""What an update changes, and a checkpoint holds."""

from typing import Any

import flax.struct
from jaxtyping import Array, Int


class TrainState(flax.struct.PyTreeNode):
  """The policy and its optimizer.

  Attributes:
    step: GRPO steps done; the data's position and the sampler's key follow
      from it.
    params: Of the policy.
    opt_state: Of the optimizer.
  """

  step: Int[Array, ""]
  params: dict
  opt_state: Any
