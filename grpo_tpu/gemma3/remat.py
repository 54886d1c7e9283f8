"""What a layer keeps of its forward pass for its backward pass.

A policy is a name, so that it can be a setting; the decoder and the image tower
follow the same one.
"""

from collections.abc import Callable

import jax

# From most memory and least work to the reverse.
POLICIES = ("none", "dots", "full")


def rematerialised(layer: Callable, policy: str) -> Callable:
  """The layer, recomputed in the backward pass as far as the policy says.

  Args:
    layer: The body of a scan.
    policy: "none" keeps all that the backward pass reads. "dots" keeps the
      products with weights, and recomputes the rest, attention scores too.
      "full" keeps the layer's input alone.
  """
  assert policy in POLICIES, policy
  if policy == "none":
    return layer
  saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  # Inside a scan nothing could be merged with the forward pass anyway.
  return jax.checkpoint(
    layer, prevent_cse=False, policy=saved if policy == "dots" else None
  )
