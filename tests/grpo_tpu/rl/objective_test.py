"""Laws of the loss: a slow twin, enumeration, microbatches, extremes."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import objective
from grpo_tpu.rl.settings import PRESETS

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
KL_GRADIENTS = ("estimator", "importance_weighted", "reverse")
DAPO = PRESETS["dapo"]
SURROGATES = PRESETS | {"sapo": dataclasses.replace(DAPO, surrogate="sapo")}


def config_of(**changes):
  return dataclasses.replace(DAPO, max_completion_length=9, **changes)


def random_batch(seed, num_rows=12, num_tokens=6):
  """Arrays of `policy_loss` by name, with holes in the mask; row 1 is empty."""
  rng = np.random.default_rng(seed)
  shape = (num_rows, num_tokens)
  logps = -rng.exponential(1.0, shape)
  mask = rng.random(shape) < 0.7
  mask[0] = True
  mask[1] = False
  return {
    "per_token_logps": np.float32(logps),
    "old_per_token_logps": np.float32(logps + rng.normal(0, 0.4, shape)),
    "ref_per_token_logps": np.float32(logps + rng.normal(0, 0.4, shape)),
    "advantages": np.float32(rng.normal(size=num_rows)),
    "completion_mask": mask,
    "sampler_weights": np.float32(rng.uniform(0.3, 3.0, shape)),
    "token_weights": np.float32(rng.choice([0.0, 1.0, 4.0], shape)),
  }


def loss_and_gradient(batch, **kwargs):
  def loss_of(logps):
    return objective.policy_loss(**batch | {"per_token_logps": logps}, **kwargs)

  logps = jnp.asarray(batch["per_token_logps"])
  (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(logps)
  return loss, grad, metrics


# --- The twin: one token at a time, in float64.


def twin_loss(logps, batch, config):
  """The loss at `logps`; arrays without gradient come from the batch."""
  mask = batch["completion_mask"]
  rows = (twin_row(n, logps, batch, config) for n in range(len(mask)))
  return sum(rows) / twin_divisor(mask, config)


def twin_divisor(mask, config):
  return {
    "token_mean": mask.sum(),
    "sequence_mean": len(mask),
    "constant": len(mask) * 9,
  }[config.aggregation]


def twin_row(n, logps, batch, config):
  at = batch["per_token_logps"].astype(np.float64)
  old = batch["old_per_token_logps"].astype(np.float64)
  reference = batch["ref_per_token_logps"].astype(np.float64)
  tokens = np.flatnonzero(batch["completion_mask"][n])
  if not tokens.size:
    return 0.0
  advantage = float(batch["advantages"][n])
  row_ratio = math.exp(np.mean((logps - old)[n, tokens]))
  total = 0.0
  for t in tokens:
    own_ratio = math.exp(logps[n, t] - old[n, t])
    ratio = own_ratio if config.importance == "token" else row_ratio
    weight = float(batch["sampler_weights"][n, t])
    if config.tis_cap is not None:
      weight = min(weight, config.tis_cap)
    weight *= float(batch["token_weights"][n, t])
    if config.surrogate == "cispo":
      fixed = np.mean((at - old)[n, tokens])
      if config.importance == "token":
        fixed = at[n, t] - old[n, t]
      gain = min(math.exp(fixed), config.epsilon_high)
      gain *= advantage * logps[n, t]
    elif config.surrogate == "sapo":
      steepness = 1.0 if advantage > 0 else 1.05
      # Half of 1 + tanh(x / 2) is the sigmoid of x.
      gate = (1 + math.tanh(steepness * (ratio - 1) / 2)) / 2
      gain = 4 / steepness * gate * advantage
    else:
      low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
      capped = min(ratio, config.dual_clip or math.inf)
      gain = min(capped * advantage, min(max(ratio, low), high) * advantage)
    term = twin_kl(config, logps[n, t], at[n, t], old[n, t], reference[n, t])
    if config.kl_gradient == "importance_weighted":
      term *= ratio
    total += -weight * gain + config.beta * term
  return total / (tokens.size if config.aggregation == "sequence_mean" else 1)


def twin_kl(config, logp, at, old, reference):
  estimators = {
    "k1": lambda x: x - reference,
    "k2": lambda x: (x - reference) ** 2 / 2,
    "k3": lambda x: math.exp(reference - x) - 1 - (reference - x),
  }
  if config.kl_gradient == "reverse":
    slope = math.exp(at - old) * (at - reference)
    return estimators[config.kl_estimator](at) + slope * (logp - at)
  return estimators[config.kl_estimator](logp)


TWIN_CONFIGS = [
  config_of(
    aggregation=aggregation,
    importance=importance,
    surrogate=surrogate,
    epsilon_high=1.3 if surrogate == "cispo" else 0.28,
    dual_clip=1.4 if surrogate == "clip" and i % 2 else None,
    beta=0.3,
    kl_estimator=("k1", "k2", "k3")[i % 3],
    kl_gradient=KL_GRADIENTS[(i + i // 3) % 3],
    tis_cap=2.0 if i % 2 else None,
  )
  for i, (surrogate, importance, aggregation) in enumerate(
    itertools.product(
      ("clip", "cispo", "sapo"), ("token", "sequence"), AGGREGATIONS
    )
  )
] + [
  config_of(beta=0.3, kl_estimator=estimator, kl_gradient=gradient)
  for estimator in ("k1", "k2", "k3")
  for gradient in KL_GRADIENTS
]


@pytest.mark.parametrize("seed", range(len(TWIN_CONFIGS)))
def test_loss_and_gradient_equal_those_of_the_slow_twin(seed):
  config, batch = TWIN_CONFIGS[seed], random_batch(seed)
  loss, grad, _ = loss_and_gradient(batch, config=config)
  logps = batch["per_token_logps"].astype(np.float64)
  np.testing.assert_allclose(
    loss, twin_loss(logps, batch, config), rtol=1e-5, atol=1e-6
  )
  rng = np.random.default_rng([seed, 1])
  for _ in range(3):
    direction = rng.normal(size=logps.shape)
    ahead = twin_loss(logps + 1e-5 * direction, batch, config)
    behind = twin_loss(logps - 1e-5 * direction, batch, config)
    np.testing.assert_allclose(
      np.vdot(grad, direction), (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-6
    )


# --- Cuts, devices, transformations.


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_of_the_batch_gives_the_same_loss_gradient_and_metrics(
  aggregation,
):
  config = config_of(
    aggregation=aggregation, beta=0.1, importance="sequence", tis_cap=2.0
  )
  batch = random_batch(0)
  whole = loss_and_gradient(batch, config=config)
  num_tokens = batch["completion_mask"].sum()
  divisor_of = jax.jit(lambda mask: objective.denominator(mask, config))
  part_of = jax.jit(
    lambda part, divisor: loss_and_gradient(
      part, config=config, denominator=divisor, num_tokens=num_tokens
    )
  )
  rng = np.random.default_rng(0)
  for _ in range(70):
    sizes = rng.choice([2, 4], size=6)
    ends = np.cumsum(sizes)
    rows = np.split(rng.permutation(12), ends[ends < 12])
    parts = [{k: v[index] for k, v in batch.items()} for index in rows]
    divisor = sum(divisor_of(part["completion_mask"]) for part in parts)
    results = jax.device_get([part_of(part, divisor) for part in parts])
    losses, grads, metrics = zip(*results, strict=True)
    grad = np.empty_like(batch["per_token_logps"])
    for index, part_grad in zip(rows, grads, strict=True):
      grad[index] = part_grad
    np.testing.assert_allclose(sum(losses), whole[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad, whole[1], rtol=1e-6, atol=1e-6)
    for name, value in whole[2].items():
      total = sum(part[name] for part in metrics)
      np.testing.assert_allclose(total, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_over_eight_devices_gives_the_same_gradient(aggregation):
  config = config_of(aggregation=aggregation, beta=0.1)
  batch = random_batch(3, num_rows=16)
  run = jax.jit(lambda batch: loss_and_gradient(batch, config=config))
  _, expected, _ = run(batch)
  sharding = jax.NamedSharding(
    jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,)),
    jax.sharding.PartitionSpec("fsdp"),
  )
  _, grad, _ = run(jax.device_put(batch, sharding))
  np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_rows_outside_the_row_mask_change_nothing(aggregation):
  """Row 1, which is empty but counted, stays a row."""
  config = config_of(aggregation=aggregation, beta=0.1)
  counted = np.isin(np.arange(12), [2, 5, 6], invert=True)
  batch = random_batch(1)
  batch["completion_mask"] &= counted[:, None]
  loss, grad, metrics = loss_and_gradient(
    batch,
    config=config,
    denominator=objective.denominator(
      batch["completion_mask"], config, row_mask=counted
    ),
  )
  expected, expected_grad, expected_metrics = loss_and_gradient(
    {k: v[counted] for k, v in batch.items()}, config=config
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(grad[counted], expected_grad, rtol=1e-6)
  np.testing.assert_array_equal(grad[~counted], 0)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6)


def test_scan_over_microbatches_adds_up_to_the_whole():
  batch, config = random_batch(4), config_of(beta=0.1)
  whole, _ = objective.policy_loss(**batch, config=config)
  cut = jax.tree.map(lambda x: x.reshape(4, 3, *x.shape[1:]), batch)
  divisor = objective.denominator(batch["completion_mask"], config)

  def add(total, part):
    loss, metrics = objective.policy_loss(
      **part, config=config, denominator=divisor
    )
    return total + loss, metrics["ratio"]

  total, ratios = jax.jit(lambda cut: jax.lax.scan(add, 0.0, cut))(cut)
  np.testing.assert_allclose(total, whole, rtol=1e-6)
  np.testing.assert_allclose(ratios.sum(), 1.0, atol=0.3)


def test_more_padding_changes_nothing():
  batch, config = random_batch(5), config_of(aggregation="constant", beta=0.1)
  wider = {
    k: np.pad(v, ((0, 0), (0, 3))) if v.ndim == 2 else v
    for k, v in batch.items()
  }
  loss, _, _ = loss_and_gradient(batch, config=config)
  wider_loss, wider_grad, _ = loss_and_gradient(wider, config=config)
  np.testing.assert_allclose(wider_loss, loss, rtol=1e-6)
  np.testing.assert_array_equal(wider_grad[:, 6:], 0)


# --- What each setting does to the gradient.


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_every_surrogate_is_policy_gradient(surrogate):
  """At ratio 1 the gradient is -A per token, over the divisor."""
  config = dataclasses.replace(SURROGATES[surrogate], max_completion_length=9)
  batch = random_batch(6) | {
    "old_per_token_logps": None,
    "ref_per_token_logps": None,
    "sampler_weights": None,
    "token_weights": None,
  }
  mask = batch["completion_mask"]
  _, grad, metrics = loss_and_gradient(batch, config=config)
  expected = -batch["advantages"][:, None] * mask
  if config.aggregation == "sequence_mean":
    expected = expected / np.maximum(mask.sum(axis=1, keepdims=True), 1)
  expected = expected / objective.denominator(mask, config)
  np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=1e-6)
  np.testing.assert_allclose(metrics["ratio_squared"], 1.0, rtol=1e-6)
  assert metrics["clip_fraction"] == metrics["old_kl"] == metrics["kl"] == 0
  assert metrics["sampler_weight"] == 1


@pytest.mark.parametrize("advantage", [1.0, -1.0], ids=["better", "worse"])
def test_clipping_stops_the_gradient_once_the_policy_has_moved(advantage):
  """A token already pushed past epsilon is pushed no further that way."""
  old = jnp.full((1, 3), -1.0)
  moved = old + jnp.array([[0.0, 0.1, 0.3]]) * advantage
  batch = {
    "per_token_logps": moved,
    "old_per_token_logps": old,
    "ref_per_token_logps": None,
    "advantages": jnp.array([advantage]),
    "completion_mask": jnp.ones((1, 3), bool),
  }
  config = config_of(epsilon_high=0.2)
  _, grad, metrics = loss_and_gradient(batch, config=config)
  np.testing.assert_array_equal(grad != 0, [[True, True, False]])
  side = "high" if advantage > 0 else "low"
  np.testing.assert_allclose(metrics["clip_fraction"], 1 / 3)
  np.testing.assert_allclose(metrics[f"clip_fraction_{side}"], 1 / 3)


def test_dual_clip_stops_a_worse_token_that_has_become_likely():
  batch = {
    "per_token_logps": jnp.log(jnp.array([[1.0, 2.0, 4.0]])),
    "old_per_token_logps": jnp.zeros((1, 3)),
    "ref_per_token_logps": None,
    "advantages": jnp.array([-1.0]),
    "completion_mask": jnp.ones((1, 3), bool),
  }
  loss, grad, metrics = loss_and_gradient(batch, config=config_of(dual_clip=3))
  np.testing.assert_allclose(loss, 2.0, rtol=1e-6)  # (1 + 2 + 3) / 3.
  np.testing.assert_allclose(3 * grad, [[1.0, 2.0, 0.0]], rtol=1e-6)
  np.testing.assert_allclose(metrics["clip_fraction_dual"], 1 / 3)


def test_cispo_keeps_the_gradient_of_a_token_past_the_cap():
  batch = {
    "per_token_logps": jnp.log(jnp.array([[1.0, 2.0, 9.0]])),
    "old_per_token_logps": jnp.zeros((1, 3)),
    "ref_per_token_logps": None,
    "advantages": jnp.array([1.0]),
    "completion_mask": jnp.ones((1, 3), bool),
  }
  config = config_of(surrogate="cispo", epsilon_high=5)
  _, grad, metrics = loss_and_gradient(batch, config=config)
  np.testing.assert_allclose(3 * grad, [[-1.0, -2.0, -5.0]], rtol=1e-6)
  np.testing.assert_allclose(metrics["clip_fraction"], 1 / 3)
  np.testing.assert_allclose(metrics["clip_fraction_high"], 1 / 3)


def test_sapo_keeps_a_gradient_wherever_the_clip_would_cut_it_off():
  batch = {
    "per_token_logps": jnp.log(jnp.array([[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]])),
    "old_per_token_logps": jnp.zeros((2, 3)),
    "ref_per_token_logps": None,
    "advantages": jnp.array([1.0, -1.0]),
    "completion_mask": jnp.ones((2, 3), bool),
  }
  _, grad, metrics = loss_and_gradient(batch, config=SURROGATES["sapo"])
  ratio = np.array([0.5, 1.0, 2.0])
  for sign, row, steepness in ((1, 0, 1.0), (-1, 1, 1.05)):
    # 4 s (1 - s) = 1 / cosh^2(x / 2), times the ratio's own derivative.
    slope = ratio / np.cosh(steepness * (ratio - 1) / 2) ** 2
    np.testing.assert_allclose(6 * grad[row], -sign * slope, rtol=1e-5)
  assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("weights", ["sampler_weights", "token_weights"])
def test_weights_scale_the_surrogate_but_not_the_kl(weights):
  batch, config = random_batch(7), config_of(beta=0.5, tis_cap=2.0)
  nothing = batch | {weights: np.zeros_like(batch[weights])}
  loss, grad, metrics = loss_and_gradient(nothing, config=config)
  np.testing.assert_allclose(loss, 0.5 * metrics["kl"], rtol=1e-6)
  _, of_kl, _ = loss_and_gradient(
    batch | {"advantages": np.zeros_like(batch["advantages"])}, config=config
  )
  np.testing.assert_allclose(grad, of_kl, rtol=1e-6)


def test_the_cap_limits_sampler_weights_but_not_token_weights():
  batch = {
    "per_token_logps": jnp.zeros((1, 2)),
    "old_per_token_logps": None,
    "ref_per_token_logps": None,
    "advantages": jnp.ones(1),
    "completion_mask": jnp.ones((1, 2), bool),
    "sampler_weights": jnp.array([[9.0, 0.5]]),
    "token_weights": jnp.array([[5.0, 5.0]]),
  }
  _, grad, metrics = loss_and_gradient(batch, config=config_of(tis_cap=2.0))
  np.testing.assert_allclose(grad, [[-5.0, -1.25]])  # 5 min(w, 2) / 2.
  np.testing.assert_allclose(metrics["sampler_weight"], 1.25)


def test_all_three_estimators_are_logged_and_the_chosen_one_is_kl():
  batch = random_batch(9)
  mask = batch["completion_mask"]
  k1 = (batch["per_token_logps"] - batch["ref_per_token_logps"])[mask]
  expected = {
    "k1": k1.mean(),
    "k2": (k1**2).mean() / 2,
    "k3": (np.exp(-k1) - 1 + k1).mean(),
  }
  for name in expected:
    _, metrics = objective.policy_loss(
      **batch, config=config_of(kl_estimator=name)
    )
    np.testing.assert_allclose(metrics["kl"], expected[name], rtol=1e-5)
    np.testing.assert_allclose(metrics[f"kl_{name}"], expected[name], rtol=1e-5)


def test_old_kl_and_ratio_are_means_over_tokens():
  batch = random_batch(10)
  mask = batch["completion_mask"]
  moved = (batch["per_token_logps"] - batch["old_per_token_logps"])[mask]
  _, metrics = objective.policy_loss(
    **batch, config=config_of(aggregation="sequence_mean")
  )
  ratio = np.exp(moved)
  np.testing.assert_allclose(metrics["ratio"], ratio.mean(), rtol=1e-5)
  np.testing.assert_allclose(
    metrics["ratio_squared"], (ratio**2).mean(), rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics["old_kl"], (ratio - 1 - moved).mean(), rtol=1e-5
  )


# --- What must not break it.


@pytest.mark.parametrize("nats", [50, 500])
@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("preset", ["dapo", "gspo", "cispo", "sapo"])
def test_far_off_policy_loss_and_gradient_are_finite(preset, gradient, nats):
  config = dataclasses.replace(
    SURROGATES[preset],
    beta=0.1,
    kl_gradient=gradient,
    max_completion_length=9,
  )
  row_signs = np.array(list(itertools.product((-1, 0, 1), repeat=2)) * 2)
  shape = (len(row_signs), 6)
  batch = {
    "per_token_logps": np.full(shape, -600.0, np.float32),
    "old_per_token_logps": np.float32(
      -600 + nats * row_signs[:, :1] + np.zeros(shape)
    ),
    "ref_per_token_logps": np.float32(
      -600 + nats * np.resize([-1, 0, 1], shape)
    ),
    "advantages": np.float32(row_signs[:, 1]),
    "completion_mask": np.ones(shape, bool),
  }
  loss, grad, metrics = loss_and_gradient(batch, config=config)
  assert np.isfinite(loss)
  assert np.isfinite(grad).all()
  assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize(
  ("estimator", "gradient"), [("k3", "estimator"), ("k1", "reverse")]
)
@pytest.mark.parametrize(("size", "num_tokens"), [(1, 1), (3, 7), (16, 4)])
@pytest.mark.parametrize("preset", ["dapo", "gspo", "cispo", "sapo"])
def test_fifty_nats_off_the_loss_and_gradient_are_the_twins(
  preset, size, num_tokens, estimator, gradient
):
  """Groups of any size, some without a reward, on masks with holes."""
  config = dataclasses.replace(
    SURROGATES[preset],
    beta=0.1,
    kl_estimator=estimator,
    kl_gradient=gradient,
    tis_cap=2.0,
  )
  batch = random_batch(size, num_rows=3 * size, num_tokens=num_tokens)
  rng = np.random.default_rng([size, 1])
  rewards = np.float32(rng.normal(size=3 * size))
  rewards[: size + 1] = np.nan
  batch["advantages"] = np.asarray(
    objective.group_advantages(rewards, num_generations=size)
  )
  for which in ("old", "ref"):
    gap = rng.choice([-50.0, 0.5, 50.0], 3 * size).astype(np.float32)
    batch[f"{which}_per_token_logps"] += gap[:, None]
  loss, grad, _ = loss_and_gradient(batch, config=config)
  logps = batch["per_token_logps"].astype(np.float64)
  expected = twin_loss(logps, batch, config)
  np.testing.assert_allclose(loss, expected, rtol=2e-5)
  step = 1e-5 * rng.normal(size=logps.shape)
  for n in range(3 * size):
    # Row by row, or the largest gap would hide the others.
    ahead, behind = (
      twin_row(n, logps + sign * step, batch, config) for sign in (1, -1)
    )
    expected = (
      (ahead - behind) / 2 / twin_divisor(batch["completion_mask"], config)
    )
    np.testing.assert_allclose(
      np.vdot(grad[n], step[n]), expected, rtol=1e-4, atol=1e-11
    )


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("preset", SURROGATES)
def test_values_on_padding_change_nothing(preset, junk):
  config = dataclasses.replace(
    SURROGATES[preset], beta=0.1, max_completion_length=9, tis_cap=2.0
  )
  clean = random_batch(11)
  soiled = {
    k: np.where(clean["completion_mask"], v, junk).astype(v.dtype)
    if k.endswith(("logps", "weights"))
    else v
    for k, v in clean.items()
  }
  jax.tree.map(
    np.testing.assert_array_equal,
    loss_and_gradient(soiled, config=config),
    loss_and_gradient(clean, config=config),
  )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_without_tokens_has_zero_loss_and_gradient(aggregation):
  batch = random_batch(12)
  batch["completion_mask"] = np.zeros_like(batch["completion_mask"])
  config = config_of(aggregation=aggregation, beta=0.1)
  loss, grad, metrics = loss_and_gradient(batch, config=config)
  assert loss == 0
  np.testing.assert_array_equal(grad, 0)
  assert all(value == 0 for value in metrics.values())


def test_constant_needs_a_length():
  batch = random_batch(13)
  with pytest.raises(ValueError, match="objective.max_completion_length"):
    objective.policy_loss(**batch, config=PRESETS["dr_grpo"])


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("aggregation", "mean"),
    ("importance", "row"),
    ("surrogate", "ppo"),
    ("epsilon_low", 0.0),
    ("epsilon_low", 1.5),
    ("epsilon_high", -0.1),
    ("epsilon_high", math.nan),
    ("dual_clip", 0.9),
    ("beta", -0.01),
    ("beta", math.nan),
    ("kl_estimator", "k4"),
    ("kl_gradient", "forward"),
    ("tis_cap", 0.0),
    ("max_completion_length", 0),
  ],
)
def test_a_wrong_setting_is_refused_by_name_value_and_remedy(field, value):
  remedy = "(; set|one of .*)"
  with pytest.raises(
    ValueError, match=rf"objective\.{field} \(.*must .*{remedy}"
  ) as e:
    dataclasses.replace(DAPO, **{field: value})
  assert str(value) in str(e.value)


@pytest.mark.parametrize("surrogate", ["cispo", "sapo"])
def test_a_dual_clip_without_a_clip_is_refused(surrogate):
  with pytest.raises(ValueError, match=r"objective\.dual_clip \(3\.0\) .*None"):
    config_of(surrogate=surrogate, epsilon_high=5.0, dual_clip=3.0)


def test_cispo_refuses_a_cap_below_one():
  with pytest.raises(ValueError, match=r"objective\.epsilon_high .* cispo"):
    config_of(surrogate="cispo", epsilon_high=0.28)
