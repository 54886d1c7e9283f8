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
  shards = tuple(leaf.sharding.shard_shape(leaf.shape) for leaf in leaves)
  return not leaves or bool(_all_finite(leaves, shards))


@functools.partial(jax.jit, static_argnames=("shards",))
def _all_finite(
  leaves: list[jax.Array], shards: tuple[tuple[int, ...], ...]
) -> jax.Array:
  # A maximum keeps a NaN and takes a third of the time of isfinite on every
  # number. Maxima over sharded axes are avoided: their collectives may drop it.
  found = []
  for leaf, shard in zip(leaves, shards, strict=True):
    axes = tuple(i for i, x in enumerate(leaf.shape) if x == shard[i])
    found.append(jnp.isfinite(jnp.abs(leaf).max(axis=axes)).all())
  return jnp.stack(found).all()
