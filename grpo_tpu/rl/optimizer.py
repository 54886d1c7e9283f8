"""AdamW with a schedule, clipping by global norm, and frozen subtrees.

It knows nothing of the model but how its leaves are named: norms end in
"scale", biases in "bias".

References:
  AdamW: Loshchilov and Hutter, arXiv:1711.05101
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from data_pipelines.validation import require_all, require_one_of

_SCHEDULES = ("constant", "cosine", "linear")
_NEVER_DECAYED = ("scale", "bias")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How far an update goes.

  Attributes:
    learning_rate: The peak, reached after `warmup_steps` updates.
    schedule: From the peak: "constant"; or down to `end_fraction` of it at
      update `num_steps`, along a "cosine" or a "linear" ramp.
    warmup_steps: Updates of linear warm-up; the first is already above 0.
    num_steps: Updates in the whole run, warm-up included. An update is one
      minibatch, so a step with several of them counts as several.
    end_fraction: Share of the peak that is left at the end; "constant" has no
      use for it.
    b1: Decay of Adam's first moment.
    b2: Decay of Adam's second moment.
    eps: Added to the root of the second moment.
    weight_decay: Decoupled, times the learning rate; on matrices only.
    max_grad_norm: Global norm that gradients are scaled down to; inf for off.
  """

  learning_rate: float
  schedule: str
  warmup_steps: int
  num_steps: int
  end_fraction: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  max_grad_norm: float

  def __post_init__(self):
    finite = "be 0 or more, and finite"
    require_one_of("optimizer.schedule", self.schedule, _SCHEDULES)
    require_all(
      self,
      "optimizer",
      (
        "learning_rate",
        0 <= self.learning_rate < math.inf,
        finite,
        "1e-6",
      ),
      ("num_steps", self.num_steps >= 1, "be at least 1", "1"),
      (
        "warmup_steps",
        0 <= self.warmup_steps < self.num_steps,
        f"be 0 or more, and below num_steps ({self.num_steps})",
        "0",
      ),
      ("end_fraction", 0 <= self.end_fraction <= 1, "be in [0, 1]", "0.1"),
      ("b1", 0 <= self.b1 < 1, "be in [0, 1)", "0.9"),
      ("b2", 0 <= self.b2 < 1, "be in [0, 1)", "0.99"),
      ("eps", 0 < self.eps < math.inf, "be above 0, and finite", "1e-8"),
      ("weight_decay", 0 <= self.weight_decay < math.inf, finite, "0"),
      (
        "max_grad_norm",
        self.max_grad_norm > 0,
        "be above 0, and may be inf for no clipping",
        "1.0",
      ),
    )


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """The learning rate of update 0, 1, 2, ...; what the metrics log."""
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
  """Clipping, AdamW, schedule; its moments are float32 whatever the params.

  Args:
    config: See `OptimizerConfig`.
    is_frozen: Of a leaf's path ("vision/norm/scale"), whether it stays as it
      is. A frozen leaf has no state, its update is 0, and its gradient does
      not enter the norm.
  """

  def labels(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: "frozen" if is_frozen(_path(path)) else "trained", params
    )

  clip = optax.identity()
  if config.max_grad_norm < math.inf:
    # Off it goes, for it would hold a second gradient.
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
  tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)

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
  """True on what weight decay shrinks: neither norms nor biases.

  Leaves are stacked over layers, so a norm's scale has two axes like a matrix:
  the name decides.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      jnp.ndim(leaf) >= 2
      and _path(path).rpartition("/")[2] not in _NEVER_DECAYED
    ),
    params,
  )


def num_updates(opt_state: optax.OptState) -> Int[Array, ""]:
  """How many updates this state has seen: the schedule's place."""
  counts = optax.tree.get_all_with_path(opt_state, "count")
  return counts[0][1]  # Adam's and the schedule's, which are equal.


def _path(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
