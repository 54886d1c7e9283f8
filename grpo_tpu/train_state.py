"""What an update changes, and a checkpoint holds."""

import flax.struct
from jaxtyping import Array, Int
from typing import Any


@flax.struct.dataclass
class TrainState:
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
