"""One optimizer update on a batch of bundles, for every kind of data.

A batch is cut into microbatches whose gradients add up, each divided by the
WHOLE batch's denominator, so the cut changes nothing but memory.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from grpo_tpu import logprobs, objective, train_state
from grpo_tpu.gemma3 import config as gemma3_config
from grpo_tpu.gemma3 import text


class Bundles(flax.struct.PyTreeNode):
  """Prompts, each with its completions; every array has the prompts first.

  Attributes:
    prompt_ids: Right-padded ids.
    prompt_length: Ids before the padding.
    images: Pictures of each prompt, in the order of their placeholders.
    completion_ids: Right-padded ids.
    completion_mask: True on the tokens that count; none of a row that is void.
    advantages: One per completion; zeros for demonstrations.
    old_per_token_logps: Under the policy that sampled; None means the current.
    ref_per_token_logps: Under the frozen reference; None means the current.
    sampler_logps: As the sampler saw them, to be compared with ours; None
      compares nothing.
    is_pair: Which bundles are a chosen and a rejected completion, in this
      order, to be measured against the reference; None measures nothing.
  """

  prompt_ids: Int[Array, "U P"]
  prompt_length: Int[Array, " U"]
  images: UInt8[Array, "U I height width 3"]
  completion_ids: Int[Array, "U C T"]
  completion_mask: Bool[Array, "U C T"]
  advantages: Float[Array, "U C"] | None = None
  old_per_token_logps: Float[Array, "U C T"] | None = None
  ref_per_token_logps: Float[Array, "U C T"] | None = None
  sampler_logps: Float[Array, "U C T"] | None = None
  is_pair: Bool[Array, " U"] | None = None


class Model(flax.struct.PyTreeNode):
  """How the network is run; static under jit.

  Attributes:
    config: Its sizes.
    dtype: Of the matrix products.
    remat: Recompute layers in the backward pass.
    temperature: Of the policy.
    chunk_size: Tokens whose logits exist at a time.
    train_vision: Whether gradients reach the image tower.
  """

  config: gemma3_config.ModelConfig = flax.struct.field(pytree_node=False)
  dtype: jnp.dtype = flax.struct.field(pytree_node=False)
  remat: bool = flax.struct.field(pytree_node=False)
  temperature: float = flax.struct.field(pytree_node=False)
  chunk_size: int = flax.struct.field(pytree_node=False)
  train_vision: bool = flax.struct.field(pytree_node=False)


def token_logps(
  model: Model, params: dict, bundles: Bundles
) -> tuple[Float[Array, "U C T"], Float[Array, "U C T"]]:
  """Log-probability of each completion token, and entropy where it was drawn.

  The one way by which policy, old policy and reference are scored.
  """
  states = text.bundle_states(
    model.config,
    params,
    bundles.prompt_ids,
    bundles.prompt_length,
    bundles.images,
    bundles.completion_ids,
    dtype=model.dtype,
    remat=model.remat,
  )
  return logprobs.per_token_logps(
    states,
    bundles.completion_ids,
    params["embedder"]["input_embedding"],
    temperature=model.temperature,
    chunk_size=model.chunk_size,
  )


@functools.partial(jax.jit, static_argnames=("num_microbatches",))
def score(
  model: Model, params: dict, bundles: Bundles, *, num_microbatches: int
) -> Float[Array, "U C T"]:
  """Log-probabilities of a batch under given parameters, without gradient."""

  def logps(_, micro):
    return None, token_logps(model, params, micro)[0]

  _, parts = jax.lax.scan(logps, None, _cut(bundles, num_microbatches))
  return parts.swapaxes(0, 1).reshape(bundles.completion_ids.shape)


def make_train_step(
  model: Model,
  tx: optax.GradientTransformation,
  *,
  config: objective.ObjectiveConfig | None,
  num_microbatches: int,
) -> Callable[
  [train_state.TrainState, Bundles],
  tuple[train_state.TrainState, dict[str, Float[Array, ""]]],
]:
  """An update, jitted, that donates the state it is given.

  Args:
    model: How the network is run.
    tx: The optimizer.
    config: The GRPO objective; None for the mean negative log-probability of
      demonstrations.
    num_microbatches: Parts that a batch is cut into; divides its prompts.

  Returns:
    The update. It leaves `state.step` to its caller, which may call it several
    times on one batch. Its metrics have the names of `metrics`, without group.
  """

  def loss(params, micro, totals):
    if not model.train_vision and "vision_encoder" in params:
      frozen = jax.lax.stop_gradient(params["vision_encoder"])
      params = params | {"vision_encoder": frozen}
    logps, entropy = token_logps(model, params, micro)
    shape = (-1, logps.shape[-1])
    mask = micro.completion_mask
    num_tokens = totals["num_tokens"]
    metrics = {"entropy": jnp.sum(jnp.where(mask, entropy, 0.0)) / num_tokens}
    if micro.sampler_logps is not None:
      gap = jnp.where(mask, jnp.abs(micro.sampler_logps - logps), 0.0)
      metrics["sampler_logp_difference_mean"] = gap.sum() / num_tokens
    if micro.is_pair is not None:
      metrics |= _implicit_preference(micro, logps, totals["num_pairs"])
    if config is None:
      nll = -jnp.sum(jnp.where(mask, logps, 0.0)) / num_tokens
      return nll, metrics | {"nll": nll}
    loss, loss_metrics = objective.policy_loss(
      logps.reshape(shape),
      _rows(micro.old_per_token_logps, shape),
      _rows(micro.ref_per_token_logps, shape),
      micro.advantages.reshape(-1),
      mask.reshape(shape),
      config=config,
      denominator=totals["denominator"],
      num_tokens=num_tokens,
      sampler_weights=_sampler_weights(micro, logps, config, shape),
    )
    return loss, metrics | loss_metrics

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, bundles):
    mask = bundles.completion_mask
    num_tokens = jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
    totals = {"num_tokens": num_tokens}
    if bundles.is_pair is not None:
      totals["num_pairs"] = jnp.maximum(bundles.is_pair.sum(), 1)
    if config is not None:
      totals["denominator"] = jnp.maximum(
        objective.denominator(mask.reshape(-1, mask.shape[-1]), config), 1.0
      )

    def terms(micro):
      (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
        state.params, micro, totals
      )
      # Parts add up in fp32, whatever the parameters' type.
      return value, metrics, optax.tree.cast(gradient, jnp.float32)

    def accumulate(sums, micro):
      return jax.tree.map(jnp.add, sums, terms(micro)), None

    parts = _cut(bundles, num_microbatches)
    shapes = jax.eval_shape(terms, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (value, metrics, gradient), _ = jax.lax.scan(accumulate, zeros, parts)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    metrics |= {
      "loss": value,
      "grad_norm": optax.tree.norm(gradient),
      "tokens": mask.sum(dtype=jnp.float32),
    }
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt_state), metrics

  return train_step


def _cut(bundles: Bundles, num_microbatches: int) -> Bundles:
  """`[U, ...]` to `[M, U / M, ...]`, every device keeping its own rows."""

  def cut(x):
    # No -1 here: the images of a text model have no elements.
    rows = x.shape[0] // num_microbatches
    x = x.reshape(rows, num_microbatches, *x.shape[1:])
    return x.swapaxes(0, 1)

  return jax.tree.map(cut, bundles)


def _rows(logps: Array | None, shape: tuple[int, int]) -> Array | None:
  return None if logps is None else logps.reshape(shape)


def _implicit_preference(micro, logps, num_pairs) -> dict[str, Array]:
  """Which of a pair the policy gained on, in parts that add up."""
  gained = logps - micro.ref_per_token_logps
  gained = jnp.where(micro.completion_mask, gained, 0.0).sum(-1)
  zeros = jnp.zeros_like(gained[:, 0])
  metrics = objective.preference_metrics(
    gained[:, 0], gained[:, 1], zeros, zeros, beta=1, valid=micro.is_pair
  )
  share = micro.is_pair.sum() / num_pairs
  return {
    name: metrics[name] * share
    for name in ("implicit_preference_accuracy", "implicit_preference_margin")
  }


def _sampler_weights(micro, logps, config, shape) -> Array | None:
  """Odds of the old policy over the sampler's, where they are to be capped."""
  if config.tis_cap is None or micro.sampler_logps is None:
    return None
  old = micro.old_per_token_logps
  old = jax.lax.stop_gradient(logps) if old is None else old
  gap = jnp.where(micro.completion_mask, old - micro.sampler_logps, 0.0)
  return jnp.exp(gap).reshape(shape)
