"""What a layer keeps of its forward pass for its backward pass.

A policy is a name, so that it can be a setting; the decoder and the image tower
follow the same one.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from grpo_tpu.models.settings import REMAT_POLICIES

_INPUT = "layer_input"


def rematerialize(layer: Callable, policy: str) -> Callable:
  """The layer, recomputed in the backward pass as far as the policy says.

  Args:
    layer: The body of a scan.
    policy: "none" keeps all that the backward pass reads. "dots" keeps the
      products with weights, and recomputes the rest, attention scores too.
      "full" keeps the layer's input alone. "offload" recomputes as much, and
      keeps that input in the host's memory until it is wanted.
  """
  assert policy in REMAT_POLICIES, policy
  policies = jax.checkpoint_policies
  # Inside a scan nothing could be merged with the forward pass anyway.
  match policy:
    case "none":
      return layer
    case "dots":
      saved = policies.dots_with_no_batch_dims_saveable
      return jax.checkpoint(layer, prevent_cse=False, policy=saved)
    case "full":
      return jax.checkpoint(layer, prevent_cse=False)
  moved = policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
  )

  def named(carry, stack):
    carry = jax.tree.map(lambda x: checkpoint_name(x, _INPUT), carry)
    return layer(carry, stack)

  return jax.checkpoint(named, prevent_cse=False, policy=moved)
