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
from jaxtyping import Array, Bool, Float, Int

from grpo_tpu.distributed import sharding
from grpo_tpu.models import logprobs
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import lora as loras
from grpo_tpu.models.gemma3 import text
from grpo_tpu.rl import objective, shaping, train_state


class Bundles(flax.struct.PyTreeNode):
  """Prompts, each with its completions; every array has the prompts first.

  Attributes:
    prompt_ids: Right-padded ids.
    prompt_length: Ids before the padding.
    images: Of each prompt, in the order of their placeholders: pixels, or what
      a frozen tower made of them.
    completion_ids: Right-padded ids.
    completion_mask: True on the tokens that count; none of a row that is void.
    advantages: One per completion; zeros for demonstrations.
    old_per_token_logps: Under the policy that sampled; None means the current.
    ref_per_token_logps: Under the frozen reference; None means the current.
    sampler_logps: As the sampler saw them, to be compared with ours; None
      compares nothing.
    token_weights: What a token's surrogate is multiplied by; None means 1.
    counted: Which completions are part of the batch, masked ones too; None
      means all are.
    preferred: [u, i, j]: whether completion i is labelled better than j, to be
      measured against the reference; None measures nothing.
  """

  prompt_ids: Int[Array, "U P"]
  prompt_length: Int[Array, " U"]
  images: text.Images
  completion_ids: Int[Array, "U C T"]
  completion_mask: Bool[Array, "U C T"]
  advantages: Float[Array, "U C"] | None = None
  old_per_token_logps: Float[Array, "U C T"] | None = None
  ref_per_token_logps: Float[Array, "U C T"] | None = None
  sampler_logps: Float[Array, "U C T"] | None = None
  token_weights: Float[Array, "U C T"] | None = None
  counted: Bool[Array, "U C"] | None = None
  preferred: Bool[Array, "U C C"] | None = None


class Model(flax.struct.PyTreeNode):
  """How the network is run; static under jit.

  Attributes:
    config: Its sizes.
    dtype: Of the matrix products.
    remat: What layers keep for the backward pass, of `remat.POLICIES`.
    temperature: Of the policy.
    chunk_size: Tokens whose logits exist at a time.
    train_vision: Whether gradients reach the image tower.
    vision_remat: What its blocks keep for the backward pass.
    attention: From `gemma3.attention.choose_implementation`.
    banned_ids: Of probability 0, as in the rollout.
    min_new_tokens: Tokens before which stop tokens are so too.
  """

  config: gemma3_config.ModelConfig = flax.struct.field(pytree_node=False)
  dtype: jnp.dtype = flax.struct.field(pytree_node=False)
  remat: str = flax.struct.field(pytree_node=False)
  temperature: float = flax.struct.field(pytree_node=False)
  chunk_size: int = flax.struct.field(pytree_node=False)
  train_vision: bool = flax.struct.field(pytree_node=False)
  vision_remat: str = flax.struct.field(pytree_node=False, default="full")
  attention: str = flax.struct.field(pytree_node=False, default="einsum")
  banned_ids: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
  min_new_tokens: int = flax.struct.field(pytree_node=False, default=0)


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
    vision_remat=model.vision_remat,
    implementation=model.attention,
  )
  return logprobs.sharded_per_token_logps(
    states,
    bundles.completion_ids,
    params["embedder"]["input_embedding"],
    temperature=model.temperature,
    chunk_size=model.chunk_size,
    banned_ids=model.banned_ids,
    is_early=_is_early(model, bundles.completion_ids.shape),
  )


def _is_early(
  model: Model, shape: tuple[int, ...]
) -> Bool[Array, "U C T"] | None:
  """Which tokens no stop token could have stood in the place of."""
  if not model.min_new_tokens:
    return None
  is_early = jnp.arange(shape[-1]) < model.min_new_tokens
  return jnp.broadcast_to(is_early[None, None], shape)


@functools.partial(jax.jit, static_argnames=("num_microbatches",))
def score(
  model: Model, params: dict, bundles: Bundles, *, num_microbatches: int
) -> tuple[Float[Array, "U C T"], Float[Array, "U C T"]]:
  """`token_logps` of a whole batch under given parameters, without gradient."""

  def scored(_, micro):
    return None, token_logps(model, params, micro)

  _, parts = jax.lax.scan(scored, None, _cut(bundles, num_microbatches))
  shape = bundles.completion_ids.shape
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(shape), parts)


def make_train_step(
  model: Model,
  tx: optax.GradientTransformation,
  *,
  config: objective.ObjectiveConfig | None,
  entropy_bonus: float = 0.0,
  sampler_correction: str = "token",
  num_microbatches: int,
  lora: loras.LoraConfig | None = None,
) -> Callable[
  ...,
  tuple[train_state.TrainState, dict[str, Float[Array, ""]]],
]:
  """An update, jitted, that donates the state it is given.

  Args:
    model: How the network is run.
    tx: The optimizer.
    config: The GRPO objective; None for the mean negative log-probability of
      demonstrations.
    entropy_bonus: As in `shaping.ShapingConfig`.
    sampler_correction: As in `shaping.ShapingConfig`.
    num_microbatches: Parts that a batch is cut into; divides its prompts.
    lora: Of the adapters that a state holds; None where it holds the whole
      model.

  Returns:
    The update of a state on bundles; where the state holds adapters, the frozen
    parameters are its third argument. It leaves `state.step` to its caller,
    which may call it several times on one batch. A gradient that is not finite
    changes nothing of the state. Its metrics have the names of `metrics`,
    without group.
  """

  def loss(trained, frozen, micro, totals):
    params = loras.with_adapters(frozen, trained, lora) if lora else trained
    if not model.train_vision and "vision_encoder" in params:
      tower = jax.lax.stop_gradient(params["vision_encoder"])
      params = params | {"vision_encoder": tower}
    logps, entropy = token_logps(model, params, micro)
    shape = (-1, logps.shape[-1])
    mask, num_tokens = micro.completion_mask, totals["num_tokens"]
    entropy = jnp.sum(jnp.where(mask, entropy, 0.0)) / num_tokens
    metrics, maxima = {"entropy": entropy}, {}
    if micro.sampler_logps is not None:
      sums, maxima = _sampler_mismatch(micro, logps)
      metrics |= {name: value / num_tokens for name, value in sums.items()}
    if micro.preferred is not None:
      metrics |= _implicit_preference(micro, logps, totals["num_pairs"])
    if config is None:
      nll = -jnp.sum(jnp.where(mask, logps, 0.0)) / num_tokens
      return nll - entropy_bonus * entropy, (metrics | {"nll": nll}, maxima)
    weights = None
    if config.tis_cap is not None and micro.sampler_logps is not None:
      weights = shaping.sampler_weights(
        _old_logps(micro, logps),
        micro.sampler_logps,
        mask,
        correction=sampler_correction,
      )
    loss, loss_metrics = objective.policy_loss(
      logps.reshape(shape),
      _rows(micro.old_per_token_logps, shape),
      _rows(micro.ref_per_token_logps, shape),
      micro.advantages.reshape(-1),
      mask.reshape(shape),
      config=config,
      denominator=totals["denominator"],
      num_tokens=num_tokens,
      sampler_weights=_rows(weights, shape),
      token_weights=_rows(micro.token_weights, shape),
    )
    loss -= entropy_bonus * entropy
    return loss, (metrics | loss_metrics, maxima)

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, bundles, frozen=None):
    mask = bundles.completion_mask
    num_tokens = jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
    totals = {"num_tokens": num_tokens}
    if bundles.preferred is not None:
      totals["num_pairs"] = jnp.maximum(bundles.preferred.sum(), 1)
    if config is not None:
      divisor = objective.denominator(
        mask.reshape(-1, mask.shape[-1]),
        config,
        counted=None if bundles.counted is None else bundles.counted.ravel(),
      )
      totals["denominator"] = jnp.maximum(divisor, 1.0)

    def terms(micro):
      (value, (metrics, maxima)), gradient = jax.value_and_grad(
        loss, has_aux=True
      )(state.params, frozen, micro, totals)
      # Parts add up in fp32, whatever the parameters' type.
      gradient = optax.tree.cast(gradient, jnp.float32)
      # Each device adds up its own shard alone.
      gradient = sharding.constrain_params(gradient)
      return (value, metrics, gradient), maxima

    def accumulate(carry, micro):
      (sums, maxima), (new_sums, new_maxima) = carry, terms(micro)
      sums = jax.tree.map(jnp.add, sums, new_sums)
      return (sums, jax.tree.map(jnp.maximum, maxima, new_maxima)), None

    if num_microbatches == 1:
      # No second gradient to add this one to.
      sums, maxima = terms(bundles)
    else:
      parts = _cut(bundles, num_microbatches)
      shapes = jax.eval_shape(terms, jax.tree.map(lambda x: x[0], parts))
      # None of the maxima is ever below 0.
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      (sums, maxima), _ = jax.lax.scan(accumulate, zeros, parts)
    value, metrics, gradient = sums
    if "ratio_squared" in metrics:
      squared = metrics.pop("ratio_squared")
      metrics["effective_sample_share"] = jnp.where(
        squared > 0, jnp.square(metrics["ratio"]) / squared, 1.0
      )
    grad_norm = optax.tree.norm(gradient)
    # Of the sum over all devices, so that all of them decide alike.
    is_finite = jnp.isfinite(grad_norm)
    metrics |= maxima | {
      "loss": value,
      "grad_norm": grad_norm,
      "tokens": mask.sum(dtype=jnp.float32),
      "skipped_updates": 1.0 - is_finite.astype(jnp.float32),
    }

    def updated(params, opt_state):
      updates, opt_state = tx.update(gradient, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    # A branch can write in place. A choice between old and new, element by
    # element, has XLA on a CPU hold both: two more copies of the moments.
    params, opt_state = jax.lax.cond(
      is_finite,
      updated,
      lambda *unchanged: unchanged,
      state.params,
      state.opt_state,
    )
    # As they came, or the next update would be another program.
    params, opt_state = sharding.constrain_params((params, opt_state))
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


def _old_logps(micro, logps) -> Array:
  """Under the policy that sampled, as training computes them."""
  old = micro.old_per_token_logps
  return jax.lax.stop_gradient(logps if old is None else old)


def _sampler_mismatch(micro, logps) -> tuple[dict[str, Array], dict]:
  """How far the sampler is from the old policy: sums over tokens, maxima."""
  gap = _old_logps(micro, logps) - micro.sampler_logps
  gap = jnp.where(micro.completion_mask, gap, 0.0)
  sums = {
    "sampler_logp_difference_mean": jnp.abs(gap).sum(),
    # KL(sampler, old) by k3.
    "sampler_kl": (jnp.expm1(jnp.minimum(gap, 60.0)) - gap).sum(),
  }
  return sums, {"sampler_logp_difference_max": jnp.abs(gap).max()}


def _implicit_preference(micro, logps, num_pairs) -> dict[str, Array]:
  """Which of a pair the policy gained on, in parts that add up."""
  gained = logps - micro.ref_per_token_logps
  gained = jnp.where(micro.completion_mask, gained, 0.0).sum(-1)
  chosen, rejected, valid = objective.preference_pairs(gained, micro.preferred)
  zeros = jnp.zeros_like(chosen)
  metrics = objective.preference_metrics(
    chosen, rejected, zeros, zeros, beta=1, valid=valid
  )
  share = valid.sum() / num_pairs
  return {
    name: metrics[name] * share
    for name in ("implicit_preference_accuracy", "implicit_preference_margin")
  }
