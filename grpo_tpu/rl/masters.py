"""Float32 masters of weights that the network runs in a shorter type.

An update of a bfloat16 weight is mostly smaller than half the distance to the
next bfloat16 number, and rounding would lose it. So the optimizer's state holds
such weights in float32. It updates these masters, and the weight that the
network runs is its rounded master.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


class MastersState(NamedTuple):
  """The state of an optimizer whose weights have masters."""

  # Like the parameters, with `optax.MaskedNode` for weights that need none.
  masters: PyTree
  optimizer: Any  # The optimizer's state without them.


def add_masters(params: PyTree, is_frozen: PyTree, state: Any) -> Any:
  """The optimizer's state with masters, if a trained weight is not float32.

  `is_frozen` is a tree of booleans like `params`.
  """
  masters = jax.tree.map(
    lambda x, frozen: (
      optax.MaskedNode()
      if frozen or x.dtype == jnp.float32
      else x.astype(jnp.float32)
    ),
    params,
    is_frozen,
  )
  return MastersState(masters, state) if jax.tree.leaves(masters) else state


def finest(params: PyTree, state: Any) -> PyTree:
  """The parameters in float32: masters where there are any."""
  if isinstance(state, MastersState):
    params = jax.tree.map(
      lambda x, master: x if _is_none(master) else master,
      params,
      state.masters,
    )
  return optax.tree.cast(params, jnp.float32)


def apply_updates(params: PyTree, updates: PyTree, state: Any) -> PyTree:
  """The parameters after an update; `state` is the optimizer's after it."""
  params = optax.apply_updates(params, updates)
  if not isinstance(state, MastersState):
    return params
  return jax.tree.map(
    lambda x, master: x if _is_none(master) else master.astype(x.dtype),
    params,
    state.masters,
  )


def select(masters: PyTree, function: Any, tree: PyTree) -> PyTree:
  """`function(master, x)` of the leaves of `tree` that have a master."""
  return jax.tree.map(
    lambda x, master: master if _is_none(master) else function(master, x),
    tree,
    masters,
  )


def _is_none(master: Any) -> bool:
  return isinstance(master, optax.MaskedNode)
