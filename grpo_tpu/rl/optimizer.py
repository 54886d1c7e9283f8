"""AdamW with a schedule, clipping by global norm, and frozen subtrees.

Knows the names of the model's leaves alone: norms end in "scale", biases in
"bias". AdamW: Loshchilov and Hutter, arXiv:1711.05101.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from grpo_tpu.rl import masters
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

  Updates are of the masters, if any: `masters.apply_updates` applies them.
  `is_frozen` takes the path of a leaf, as in "vision/norm/scale". A frozen leaf
  has no state, its update is 0, and its gradient does not enter the norm.
  """

  def frozen(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: is_frozen(_path(path)), params
    )

  def label(params):
    return jax.tree.map(lambda x: "frozen" if x else "trained", frozen(params))

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
    state = tx.init(optax.tree.cast(params, jnp.float32))
    return masters.add_masters(params, frozen(params), state)

  def update(updates, state, params=None):
    assert params is not None, "weight decay needs the parameters"
    updates = optax.tree.cast(updates, jnp.float32)
    params = masters.finest(params, state)
    if not isinstance(state, masters.MastersState):
      return tx.update(updates, state, params)
    updates, inner = tx.update(updates, state.optimizer, params)
    moved = masters.select(state.masters, optax.apply_updates, updates)
    return updates, masters.MastersState(moved, inner)

  return optax.GradientTransformation(init, update)


def num_updates(state: optax.OptState) -> Int[Array, ""]:
  """Number of updates that were applied; skipped ones do not count."""
  return optax.tree.get_all_with_path(state, "count")[0][1]


def lost_fraction(
  config: OptimizerConfig, params: PyTree, state: optax.OptState
) -> Float[Array, ""]:
  """Share of the weights whose last update was lost by rounding.

  A lost update is not 0, but smaller than half the distance from the weight, or
  its master, to the next float32 number. It is computed again from the state
  after it: another reader of the old weights would hold a copy of them.
  """
  count = jnp.maximum(num_updates(state), 1)
  rate = jnp.asarray(make_schedule(config)(count - 1))
  first, second = 1 - config.b1**count, 1 - config.b2**count

  def counts(x, mu, nu, decays):
    if isinstance(mu, optax.MaskedNode):
      return jnp.zeros(2)  # A frozen weight.
    update = mu / first / (jnp.sqrt(nu / second) + config.eps)
    update = rate * (update + config.weight_decay * x if decays else update)
    is_moved = update != 0
    is_lost = is_moved & (jnp.abs(update) < _half_ulp(x))
    return _count((is_lost, is_moved))

  params = masters.finest(params, state)
  found = jax.tree.map(
    counts,
    params,
    optax.tree.get(state, "mu"),
    optax.tree.get(state, "nu"),
    decay_mask(params),
  )
  lost, moved = sum(jax.tree.leaves(found), jnp.zeros(2))
  return lost / jnp.maximum(moved, 1.0)


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


def _half_ulp(x: Array) -> Array:
  """Half the distance from float32 numbers to the next larger ones."""
  # The bits of the exponent alone are the power of two at or below |x|.
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
  power = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return power * (jnp.finfo(jnp.float32).eps / 2)


def _count(flags: tuple[Array, ...]) -> Array:
  """The number of each array's true elements, to rounding."""
  # One reduction of all arrays, because XLA on a CPU keeps what several read.
  # Integers until the first axis alone is left: sums of ones in float32 stall.
  zeros = [jnp.int32(0)] * len(flags)
  counts = jax.lax.reduce(
    [x.astype(jnp.int32) for x in flags],
    zeros,
    lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
    tuple(range(1, flags[0].ndim)),
  )
  return jnp.stack([x.astype(jnp.float32).sum() for x in counts])


def _path(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
