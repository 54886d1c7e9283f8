"""One optimizer update on a batch of bundles, for every kind of data.

A batch is cut into microbatches whose gradients add up. Each is divided by the
denominator of the WHOLE batch, so the cut changes nothing but memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import lora as loras
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.models.settings import LoraConfig
from grpo_tpu.rl import (
  diagnostics,
  masters,
  objective,
  pairs,
  pictures,
  preference_metrics,
  score,
  shaping,
)
from grpo_tpu.rl.settings import ObjectiveConfig, PairLossConfig
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rl.train_state import TrainState


def make_train_step(
  forward: ForwardConfig,
  tx: optax.GradientTransformation,
  *,
  config: ObjectiveConfig | PairLossConfig | None,
  entropy_bonus: float = 0.0,
  sampler_correction: str = "token",
  ratio_bounds: tuple[float, ...] = (),
  off_policy_bound: float | None = None,
  num_microbatches: int,
  lora: LoraConfig | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
  """Makes the jitted update; it donates the state it is given.

  It takes a state, a batch and, for `lora` adapters, the frozen parameters; and
  the output embedding of a teacher whose states are in the batch. It gives the
  new state, whose `step` is the caller's to advance, and metrics named without
  their group. A gradient that is not finite changes neither parameters nor
  optimizer.

  `config` None takes the mean negative log-probability of demonstrations; with
  a `PairLossConfig` the state is a reward model's.
  """
  bounds = {"ratio_bounds": ratio_bounds, "off_policy_bound": off_policy_bound}
  bounds = {k: x for k, x in bounds.items() if x not in ((), None)}
  loss = _Loss(forward, config, entropy_bonus, sampler_correction, lora, bounds)

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, batch, frozen=None, teacher=None):
    totals = _totals(batch, config)
    batch, tower_gradient = pictures.encode(
      forward, state.params, batch, num_microbatches
    )
    ((value, metrics, gradient), maxima), (image_gradient, scores) = _add_up(
      lambda micro: loss.terms(
        *(state.params, frozen, teacher, micro, totals),
        of_images=bool(tower_gradient),
      ),
      batch,
      num_microbatches,
    )
    if tower_gradient:
      gradient |= tower_gradient(*image_gradient)
    if isinstance(config, PairLossConfig):
      assert batch.labels is not None
      metrics |= pairs.metrics(scores, batch.labels, ties=config.ties)
    if "ratio_squared" in metrics:
      squared = metrics.pop("ratio_squared")
      metrics["effective_sample_share"] = jnp.where(
        squared > 0, jnp.square(metrics["ratio"]) / squared, 1.0
      )
    grad_norm = optax.tree.norm(gradient)
    # The norm is of the sum over all devices, so all of them decide alike.
    is_finite = jnp.isfinite(grad_norm)
    metrics |= maxima | {
      "loss": value,
      "grad_norm": grad_norm,
      "tokens": batch.completion_mask.sum(dtype=jnp.float32),
      "skipped_updates": 1.0 - is_finite.astype(jnp.float32),
    }
    return _apply_if(is_finite, tx, gradient, state), metrics

  return train_step


@dataclasses.dataclass(frozen=True)
class _Loss:
  """The loss of a microbatch, as a part of the whole batch's."""

  forward: ForwardConfig
  config: ObjectiveConfig | PairLossConfig | None
  entropy_bonus: float
  sampler_correction: str
  lora: LoraConfig | None
  bounds: dict[str, Any]  # Those that are set, of `shaping.is_outlier`.

  def terms(
    self,
    trained: Any,
    frozen: Any,
    teacher: Array | None,
    micro: TrainBatch,
    totals: dict,
    *,
    of_images: bool = False,
  ):
    """Loss, metrics and fp32 gradient, which add up; and maxima.

    Beside them a list with the gradient of images, and a reward model's scores.
    """

    def loss(trained, images):
      shown = micro.replace(images=images)
      return self(trained, frozen, teacher, shown, totals)

    argnums = (0, 1) if of_images else (0,)
    (value, (metrics, maxima, scores)), (gradient, *image_gradient) = (
      jax.value_and_grad(loss, argnums, has_aux=True)(trained, micro.images)
    )
    # Parts add up in fp32, whatever the type of the parameters.
    gradient = optax.tree.cast(gradient, jnp.float32)
    # Each device adds up its own shard alone.
    gradient = sharding.constrain_params(gradient)
    return ((value, metrics, gradient), maxima), (image_gradient, scores)

  def __call__(self, trained, frozen, teacher, micro, totals):
    forward, lora = self.forward, self.lora
    params = loras.with_adapters(frozen, trained, lora) if lora else trained
    if not forward.train_vision and "vision_encoder" in params:
      tower = jax.lax.stop_gradient(params["vision_encoder"])
      params = params | {"vision_encoder": tower}
    if isinstance(self.config, PairLossConfig):
      scores = score.completion_scores(forward, params, micro)
      loss = pairs.pair_loss(scores, micro.labels, config=self.config)
      return loss / totals["num_pairs"], ({}, {}, scores)
    args = () if teacher is None else (teacher,)
    logps, entropy, *kl = score.token_logps(forward, params, micro, *args)
    mask, num_tokens = micro.completion_mask, totals["num_tokens"]
    entropy = jnp.sum(jnp.where(mask, entropy, 0.0)) / num_tokens
    metrics, maxima = {"entropy": entropy}, {}
    if micro.sampler_logps is not None:
      sums, maxima = _sampler_mismatch(micro, logps)
      metrics |= {name: value / num_tokens for name, value in sums.items()}
    if micro.preferred is not None:
      metrics |= _implicit_preference(micro, logps, totals["num_pairs"])
    if self.config is None:
      loss = -jnp.sum(jnp.where(mask, logps, 0.0)) / num_tokens
      loss_metrics = {"nll": loss}
    else:
      loss, loss_metrics = self._policy_loss(micro, logps, totals, *kl)
    loss -= self.entropy_bonus * entropy
    return loss, (metrics | loss_metrics, maxima, None)

  def _policy_loss(self, micro, logps, totals, kl=None):
    assert isinstance(self.config, ObjectiveConfig)
    mask = micro.completion_mask
    sampler_weights, outliers = None, {}
    if self.bounds and micro.sampler_logps is not None:
      is_outlier = shaping.is_outlier(
        *(jax.lax.stop_gradient(logps), _old_logps(micro, logps)),
        *(micro.sampler_logps, mask, micro.advantages),
        **self.bounds,
      )
      is_outlier &= mask.any(axis=-1)
      outliers = {"outlier_fraction": is_outlier.sum() / totals["num_rows"]}
      mask &= ~is_outlier[..., None]
    if self.config.tis_cap is not None and micro.sampler_logps is not None:
      sampler_weights = shaping.sampler_weights(
        *(_old_logps(micro, logps), micro.sampler_logps, mask),
        correction=self.sampler_correction,
      )
    rows = {
      "per_token_logps": logps,
      "old_per_token_logps": micro.old_per_token_logps,
      "ref_per_token_logps": micro.ref_per_token_logps,
      "completion_mask": mask,
      "sampler_weights": sampler_weights,
      "token_weights": micro.token_weights,
      "kl": kl,
    }
    loss, metrics = objective.policy_loss(
      **jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows),
      advantages=micro.advantages.reshape(-1),
      config=self.config,
      denominator=totals["denominator"],
      num_tokens=totals["num_tokens"],
    )
    return loss, metrics | outliers


def _totals(
  batch: TrainBatch, config: ObjectiveConfig | PairLossConfig | None
) -> dict[str, Array]:
  """Denominators of the whole batch, at least 1 each."""
  if isinstance(config, PairLossConfig):
    assert batch.labels is not None
    found = pairs.find_pairs(batch.labels, ties=config.ties)
    return {"num_pairs": jnp.maximum(found.sum(dtype=jnp.float32), 1.0)}
  mask = batch.completion_mask
  num_tokens = jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
  num_rows = jnp.maximum(mask.any(axis=-1).sum(), 1)
  totals = {"num_tokens": num_tokens, "num_rows": num_rows}
  if batch.preferred is not None:
    totals["num_pairs"] = jnp.maximum(batch.preferred.sum(), 1)
  if config is not None:
    denominator = objective.denominator(
      mask.reshape(-1, mask.shape[-1]),
      config,
      row_mask=None if batch.counted is None else batch.counted.ravel(),
    )
    totals["denominator"] = jnp.maximum(denominator, 1.0)
  return totals


def _add_up(
  terms: Callable[[TrainBatch], tuple], batch: TrainBatch, num_parts: int
) -> tuple:
  """Sums and maxima of `terms` over microbatches; all rows of the rest."""
  if num_parts == 1:
    # No second gradient to add this one to.
    return terms(batch)
  terms = jax.jit(terms, inline=True)  # Traced once, for shapes and the scan.

  def accumulate(carry, micro):
    (sums, maxima), ((new_sums, new_maxima), rows) = carry, terms(micro)
    sums = jax.tree.map(jnp.add, sums, new_sums)
    return (sums, jax.tree.map(jnp.maximum, maxima, new_maxima)), rows

  parts = sharding.microbatches(batch, num_parts)
  shapes, _ = jax.eval_shape(terms, jax.tree.map(lambda x: x[0], parts))
  # None of the maxima is ever below 0.
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  totals, rows = jax.lax.scan(accumulate, zeros, parts)
  return totals, jax.tree.map(sharding.whole_batch, rows)


def _apply_if(is_finite: Array, tx, gradient, state: TrainState) -> TrainState:
  """The state after the update, or as it was if the gradient is not finite."""

  def apply(params, opt_state):
    updates, opt_state = tx.update(gradient, opt_state, params)
    return masters.apply_updates(params, updates, opt_state), opt_state

  # A branch can write in place. A choice between old and new, element by
  # element, has XLA on a CPU hold both: two more copies of the moments.
  old = state.params, state.opt_state
  new = jax.lax.cond(is_finite, apply, lambda *unchanged: unchanged, *old)
  # Sharded as they came, or the next update would be another program.
  params, opt_state = sharding.constrain_params(new)
  return state.replace(params=params, opt_state=opt_state)


def _old_logps(micro: TrainBatch, logps: Array) -> Array:
  """Log-probabilities under the old policy, as training computes them."""
  old = micro.old_per_token_logps
  return jax.lax.stop_gradient(logps if old is None else old)


def _sampler_mismatch(
  micro: TrainBatch, logps: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Distance of the sampler from the old policy: sums over tokens, maxima."""
  assert micro.sampler_logps is not None
  gap = _old_logps(micro, logps) - micro.sampler_logps
  gap = jnp.where(micro.completion_mask, gap, 0.0)
  sums = {
    "sampler_logp_difference_mean": jnp.abs(gap).sum(),
    # KL(sampler, old) by k3.
    "sampler_kl": (jnp.expm1(jnp.minimum(gap, 60.0)) - gap).sum(),
  }
  return sums, {"sampler_logp_difference_max": jnp.abs(gap).max()}


def _implicit_preference(
  micro: TrainBatch, logps: Array, num_pairs: Array
) -> dict[str, Array]:
  """Accuracy and margin of the policy's gain over the reference, per pair."""
  assert micro.ref_per_token_logps is not None and micro.preferred is not None
  gain = logps - micro.ref_per_token_logps
  gain = jnp.where(micro.completion_mask, gain, 0.0).sum(-1)
  chosen, rejected, valid = preference_metrics.all_pairs(gain, micro.preferred)
  accuracy = preference_metrics.accuracy(chosen, rejected, valid=valid)
  margin = diagnostics.valid_mean(chosen - rejected, valid)
  share = valid.sum() / num_pairs
  return {
    "implicit_preference_accuracy": accuracy * share,
    "implicit_preference_margin": margin * share,
  }
