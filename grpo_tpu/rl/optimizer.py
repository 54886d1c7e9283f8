"""AdamW with a schedule, clipping by global norm, and frozen subtrees.

Knows only the names of the model's leaves: norms end in "scale", biases in
"bias".

References:
  AdamW: Loshchilov and Hutter, arXiv:1711.05101
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from grpo_tpu.rl.settings import OptimizerConfig

_NEVER_DECAYED = ("scale", "bias")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """The learning rate of update 0, 1, 2, ..., as the metrics log it."""
  decay_steps = config.num_steps - config.warmup_steps
  peak = config.learning_rate
  if config.schedule == "constant":
    decay = optax.constant_schedule(peak)
  elif config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(peak, decay_steps, config.end_fraction)
  else:
    decay = optax.linear_schedule(peak, peak * config.end_fraction, decay_steps)
  if not config.warmup_steps:
    return decay
  first = peak / (config.warmup_steps + 1)
  warmup = optax.linear_schedule(first, peak, config.warmup_steps)
  return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
  config: OptimizerConfig, *, is_frozen: Callable[[str], bool]
) -> optax.GradientTransformation:
  """Clipping and AdamW; the moments are float32 whatever the parameters' type.

  `is_frozen` takes the path of a leaf, as in "vision/norm/scale". A frozen leaf
  has no state, its update is 0, and its gradient does not enter the norm.
  """

  def label(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: "frozen" if is_frozen(_path(path)) else "trained", params
    )

  clip = optax.identity()
  if config.max_grad_norm < math.inf:
    # Left out at inf, because it would hold a second gradient.
    clip = optax.clip_by_global_norm(config.max_grad_norm)
  tx = optax.chain(
    clip,
    optax.adamw(
      make_schedule(config),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    ),
  )
  tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, label)

  def init(params):
    return tx.init(optax.tree.cast(params, jnp.float32))

  def update(updates, state, params=None):
    assert params is not None, "weight decay needs the parameters"
    return tx.update(
      optax.tree.cast(updates, jnp.float32),
      state,
      optax.tree.cast(params, jnp.float32),
    )

  return optax.GradientTransformation(init, update)


def decay_mask(params: PyTree) -> PyTree:
  """True on the leaves that weight decay shrinks: neither norms nor biases.

  The name decides, because a norm's scale, stacked over layers, has two axes
  like a matrix.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      jnp.ndim(leaf) >= 2
      and _path(path).rpartition("/")[2] not in _NEVER_DECAYED
    ),
    params,
  )


def _path(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
