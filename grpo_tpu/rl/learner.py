"""Parameters or adapters, their optimizer, and the update of both."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_tpu.checkpoint import load
from grpo_tpu.distributed import compile_cache
from grpo_tpu.models.gemma3 import lora
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.models.settings import ModelSettings
from grpo_tpu.rl import masters, optimizer, train_step
from grpo_tpu.rl.settings import LearnerConfig, OptimizerConfig
from grpo_tpu.rl.train_state import TrainState


class Learner:
  """Updates a policy on batches; `frozen` holds what is under adapters."""

  def __init__(
    self,
    model: ModelSettings,
    forward: ForwardConfig,
    mesh: Mesh,
    config: LearnerConfig,
    *,
    frozen: Any = None,
  ):
    """Compiles nothing yet."""
    self._model, self._mesh, self.frozen = model, mesh, frozen
    self.tx = policy_optimizer(model, config.optimizer)
    self.update = compile_cache.AotJit(
      train_step.make_train_step(
        forward,
        self.tx,
        config=config.objective,
        entropy_bonus=config.shaping.entropy_bonus,
        sampler_correction=config.shaping.sampler_correction,
        ratio_bounds=config.shaping.sampler_ratio_bounds,
        off_policy_bound=config.shaping.off_policy_bound,
        num_microbatches=config.num_microbatches,
        lora=model.adapters,
      )
    )
    self._lost_fraction = jax.jit(
      functools.partial(optimizer.lost_fraction, config.optimizer)
    )

  def init(self, params: dict) -> TrainState:
    """The state before the first update of the parameters, or adapters.

    Parameters that are finer than `model.param_dtype` are rounded to it. They
    become the masters, which take over their memory.
    """
    wanted = self.abstract_state()
    shardings = jax.tree.map(lambda x: x.sharding, wanted)
    are_finer = jax.tree.map(
      lambda x, y: x.dtype != y.dtype, params, wanted.params
    )
    if any(jax.tree.leaves(are_finer)):
      params, opt_state = jax.jit(
        self._init_from_finer,
        donate_argnums=0,
        out_shardings=(shardings.params, shardings.opt_state),
      )(params)
    else:
      init = jax.jit(self.tx.init, out_shardings=shardings.opt_state)
      opt_state = init(params)
    # Two arrays, because an update takes over the memory of each.
    step, position = (
      jax.device_put(jnp.zeros((), jnp.int32), shardings.step) for _ in range(2)
    )
    return TrainState(step, position, params, opt_state)

  def _init_from_finer(self, finer: dict) -> tuple[dict, Any]:
    wanted = self.abstract_state().params
    params = jax.tree.map(lambda x, y: x.astype(y.dtype), finer, wanted)
    state: Any = self.tx.init(params)
    found = masters.select(state.masters, lambda _, x: x, finer)
    return params, state._replace(masters=found)

  def params(self, state: TrainState) -> dict:
    """Parameters of the forward pass, with the adapters in their places."""
    return forward_params(self._model, state.params, self.frozen)

  def lost_fraction(self, state: TrainState) -> jax.Array:
    """Share of the weights whose last update was lost by rounding."""
    return self._lost_fraction(state.params, state.opt_state)

  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings of the state."""
    return abstract_state(self._model, self._mesh, self.tx)


def forward_params(model: ModelSettings, trained: Any, frozen: Any) -> dict:
  """Trained parameters, or `frozen` ones with trained adapters in them."""
  if model.adapters is None:
    return trained
  return lora.with_adapters(frozen, trained, model.adapters)


def abstract_state(
  model: ModelSettings, mesh: Mesh, tx: optax.GradientTransformation
) -> TrainState:
  """Shapes, types and shardings of the state of a policy and its optimizer."""

  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, tx.init(params))

  abstract = load.abstract_adapters if model.adapters else load.abstract_params
  return load.with_shardings(mesh, jax.eval_shape(init, abstract(model, mesh)))


def policy_optimizer(
  model: ModelSettings, config: OptimizerConfig
) -> optax.GradientTransformation:
  """The optimizer; it leaves an image tower alone that is not trained."""
  return optimizer.make_optimizer(
    config,
    is_frozen=lambda path: (
      path.startswith("vision_encoder") and not model.train_vision
    ),
  )
