"""Rematerialization: what the backward pass keeps of a layer's forward pass.

A policy is a name, so that it can be a setting; the decoder and the image tower
share them.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from grpo_tpu.models.settings import REMAT_POLICIES

_INPUT = "layer_input"


def rematerialize(layer: Callable, policy: str) -> Callable:
  """Wraps the body of a scan so that the backward pass recomputes parts of it.

  "none" keeps everything that the backward pass reads. "dots" keeps the
  products with weights and recomputes the rest, attention scores too. "full"
  keeps only the layer's input. "offload" keeps the same, in host memory.
  """
  assert policy in REMAT_POLICIES, policy
  policies = jax.checkpoint_policies
  # `prevent_cse` is only needed outside of scans.
  match policy:
    case "none":
      return layer
    case "dots":
      saved = policies.dots_with_no_batch_dims_saveable
      return jax.checkpoint(layer, prevent_cse=False, policy=saved)
    case "full":
      return jax.checkpoint(layer, prevent_cse=False)
  offloaded = policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
  )

  def with_named_input(carry, stack):
    carry = jax.tree.map(lambda x: checkpoint_name(x, _INPUT), carry)
    return layer(carry, stack)

  return jax.checkpoint(with_named_input, prevent_cse=False, policy=offloaded)
