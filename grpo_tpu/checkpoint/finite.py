"""Checks that a state holds no NaN and no infinity before it is saved."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def is_finite(state: Any) -> bool:
  """Returns False if any floating-point leaf holds a NaN or an infinity."""
  leaves = [
    leaf
    for leaf in jax.tree.leaves(state)
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size
  ]
  unsharded_axes = []
  for leaf in leaves:
    shard = leaf.sharding.shard_shape(leaf.shape)
    axes = [i for i, size in enumerate(shard) if size == leaf.shape[i]]
    unsharded_axes.append(tuple(axes))
  return not leaves or bool(_all_finite(leaves, tuple(unsharded_axes)))


@functools.partial(jax.jit, static_argnames=("unsharded_axes",))
def _all_finite(
  leaves: list[jax.Array], unsharded_axes: tuple[tuple[int, ...], ...]
) -> jax.Array:
  # A maximum keeps a NaN and takes a third of the time of isfinite on every
  # number. Maxima over sharded axes are avoided: their collectives may drop it.
  return jnp.stack(
    [
      jnp.isfinite(jnp.abs(leaf).max(axis=axes)).all()
      for leaf, axes in zip(leaves, unsharded_axes, strict=True)
    ]
  ).all()
