"""The loss against the numbers of TRL and Tunix, case by case.

The fixtures' folder golden_losses holds the results of each peer's own code on
one set of arrays, with the settings of each case.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import objective, shaping
from grpo_tpu.rl.settings import ObjectiveConfig

TRL_CASES = (
  "bnpo_beta0",
  "bnpo_beta0.04",
  "cispo",
  "dapo_beta0",
  "dapo_beta0.04",
  "dapo_empty_row",
  "dapo_holes",
  "dapo_tis",
  "dr_grpo_beta0",
  "dr_grpo_beta0.04",
  "grpo_batch_scaled",
  "grpo_beta0",
  "grpo_beta0.04",
  "grpo_clip_higher",
  "grpo_delta1.5",
  "grpo_delta3_beta",
  "grpo_empty_row_beta",
  "grpo_entropy_bonus",
  "grpo_holes_beta",
  "grpo_kl_bias_corrected",
  "grpo_on_policy_beta",
  "grpo_top_entropy0.2",
  "gspo_beta0",
  "gspo_beta0.04",
  "gspo_wide_beta0",
  "gspo_wide_beta0.04",
  "luspo",
  "sapo",
)
TUNIX_CASES = (
  "dapo",
  "dapo_empty_row",
  "dapo_holes",
  "dapo_tis",
  "drgrpo",
  "grpo_clip_higher",
  "grpo_dual_clip1.5",
  "grpo_dual_clip3_beta",
  "grpo_empty_row_beta",
  "grpo_holes_beta",
  "grpo_kl_k1",
  "grpo_kl_mse",
  "grpo_on_policy_beta",
  "grpo_seq-mean-token-sum_beta0",
  "grpo_seq-mean-token-sum_beta0.04",
  "grpo_sequence-mean-token-mean_beta0",
  "grpo_sequence-mean-token-mean_beta0.04",
  "grpo_sequence-mean-token-scale_beta0",
  "grpo_sequence-mean-token-scale_beta0.04",
  "grpo_sequence-mean-token-sum-norm_beta0",
  "grpo_sequence-mean-token-sum-norm_beta0.04",
  "grpo_token-mean_beta0",
  "grpo_token-mean_beta0.04",
  "gspo-token_beta0",
  "gspo-token_beta0.04",
  "gspo-token_wide_beta0",
  "gspo-token_wide_beta0.04",
)
# Why, stands in docs/objective.md.
NOT_REPRODUCED = {"trl": set(), "tunix": {"grpo_kl_clamped"}}

# TRL's names of losses, and Tunix's of aggregations: ours, and the length that
# "constant" divides each row's sum by.
AGGREGATIONS = {
  "grpo": ("sequence_mean", None),
  "bnpo": ("token_mean", None),
  "dapo": ("token_mean", None),
  "cispo": ("token_mean", None),
  "dr_grpo": ("constant", 16),
  "luspo": ("constant", 1),
  "sapo": ("sequence_mean", None),
  "sequence-mean-token-mean": ("sequence_mean", None),
  "token-mean": ("token_mean", None),
  "sequence-mean-token-scale": ("constant", 12),  # The padded width.
  "seq-mean-token-sum": ("constant", 1),
  "sequence-mean-token-sum-norm": ("constant", 1),
}
WITHOUT_CLIP = ("cispo", "sapo")  # TRL has no clip metric of these.
KL_ESTIMATORS = {"kl": "k1", "mse_kl": "k2", "low_var_kl": "k3"}


class Golden:
  """One peer's results, and the arrays behind them."""

  def __init__(self, folder: pathlib.Path, peer: str):
    self.inputs = dict(np.load(folder / "inputs.npz"))
    self.numbers = dict(np.load(folder / f"{peer}.npz"))
    self.cases = json.loads((folder / f"{peer}.json").read_text())["cases"]

  def settings(self, case):
    return self.cases[f"loss/{case}"]

  def expected(self, case):
    prefix = f"loss/{case}/"
    return {
      name.removeprefix(prefix): value
      for name, value in self.numbers.items()
      if name.startswith(prefix)
    }

  def mask(self, case):
    return self.inputs[self.settings(case)["mask"]] > 0

  def loss(self, case, config, **kwargs):
    """Our loss, metrics and gradient on the arrays of a case."""
    settings = self.settings(case)
    old = settings["old"] and self.inputs[settings["old"]]
    reference = self.inputs["ref_per_token_logps"] if config.beta else None
    if settings["tis"]:
      kwargs["sampler_weights"] = self.inputs["tis_weights"]

    def loss_of(logps):
      return objective.policy_loss(
        logps,
        old,
        reference,
        self.numbers[f"adv/{settings['advantages']}"],
        self.mask(case),
        config=config,
        **kwargs,
      )

    logps = jnp.asarray(self.inputs["per_token_logps"])
    (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(logps)
    return loss, metrics, grad


@pytest.fixture(scope="module")
def trl(fixtures):
  return Golden(fixtures / "golden_losses", "trl")


@pytest.fixture(scope="module")
def tunix(fixtures):
  return Golden(fixtures / "golden_losses", "tunix")


def assert_close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def trl_config(settings):
  loss_type = settings["loss_type"]
  aggregation, length = AGGREGATIONS[loss_type]
  is_corrected = settings["use_bias_correction_kl"]
  return ObjectiveConfig(
    aggregation=aggregation,
    importance=settings.get("importance_sampling_level", "token"),
    surrogate=loss_type if loss_type in WITHOUT_CLIP else "clip",
    epsilon_low=settings["epsilon"],
    epsilon_high=settings.get("epsilon_high", settings["epsilon"]),
    dual_clip=settings.get("delta"),
    beta=settings["beta"],
    kl_estimator="k3",
    kl_gradient="importance_weighted" if is_corrected else "estimator",
    tis_cap=2.0,
    max_completion_length=length,
  )


def tunix_config(settings):
  is_gspo = settings.get("loss_algo") == "gspo-token"
  aggregation, length = AGGREGATIONS[settings["loss_agg_mode"]]
  return ObjectiveConfig(
    aggregation=aggregation,
    importance="sequence" if is_gspo else "token",
    surrogate="clip",
    epsilon_low=settings["epsilon"],
    epsilon_high=settings["epsilon_high"],
    dual_clip=settings.get("epsilon_c"),
    beta=settings["beta"] or 0.0,
    kl_estimator=KL_ESTIMATORS[settings["kl_loss_mode"]],
    kl_gradient="estimator",
    tis_cap=2.0,
    max_completion_length=length,
  )


@pytest.mark.parametrize("case", TRL_CASES)
def test_loss_and_gradient_are_those_of_trl(trl, case):
  settings, expected = trl.settings(case), trl.expected(case)
  entropy, mask = trl.inputs["entropy"], trl.mask(case)
  kwargs = {}
  if share := settings.get("top_entropy_quantile"):
    chosen = shaping.top_entropy(entropy, mask, share=share)
    kwargs["token_weights"] = chosen.astype(jnp.float32)
  loss, metrics, grad = trl.loss(case, trl_config(settings), **kwargs)
  bonus = settings.get("entropy_coef", 0.0) * entropy[mask].mean()
  assert_close(loss - bonus, expected["loss"])
  assert_close(grad, expected["grad"])
  if "kl" in expected:
    assert_close(metrics["kl"], expected["kl"])


@pytest.mark.parametrize(
  "case", [c for c in TRL_CASES if c not in WITHOUT_CLIP]
)
def test_clip_fractions_are_those_of_trl(trl, case):
  """TRL counts rows instead of tokens where a row has one ratio."""
  config, expected = trl_config(trl.settings(case)), trl.expected(case)
  if config.importance == "token":
    _, metrics, _ = trl.loss(case, config)
  else:
    metrics = fractions_of_rows(trl, case, config)
  for ours, theirs in {
    "clip_fraction": "clip_ratio_region_mean",
    "clip_fraction_low": "clip_ratio_low_mean",
    "clip_fraction_high": "clip_ratio_high_mean",
  }.items():
    assert_close(metrics[ours], expected[theirs])


def fractions_of_rows(golden, case, config):
  def row_metrics(logps, old, advantage, mask):
    _, metrics = objective.policy_loss(
      logps[None], old[None], None, advantage[None], mask[None], config=config
    )
    return metrics

  metrics = jax.vmap(row_metrics)(
    golden.inputs["per_token_logps"],
    golden.inputs["old_per_token_logps"],
    golden.numbers[f"adv/{golden.settings(case)['advantages']}"],
    golden.mask(case),
  )
  return {name: values.mean() for name, values in metrics.items()}


@pytest.mark.parametrize("case", TUNIX_CASES)
def test_loss_gradient_and_metrics_are_those_of_tunix(tunix, case):
  config, expected = tunix_config(tunix.settings(case)), tunix.expected(case)
  mask = tunix.mask(case)
  kwargs = {}
  if config.aggregation == "sequence_mean":
    # Tunix leaves empty rows out of the number of rows.
    kwargs["denominator"] = mask.any(axis=1).sum()
  loss, metrics, grad = tunix.loss(case, config, **kwargs)
  assert_close(loss, expected["loss"])
  assert_close(grad, expected["grad"])
  assert_close(metrics["kl"], expected["kl"])
  assert_close(metrics["clip_fraction"], expected["pg_clipfrac"])
  # Tunix averages this one over padding as well.
  assert_close(
    metrics["clip_fraction_dual"] * mask.mean(), expected["pg_clipfrac_lower"]
  )
  alone = dataclasses.replace(config, beta=0.0)
  policy_loss, _, _ = tunix.loss(case, alone, **kwargs)
  assert_close(policy_loss, expected["pg_loss"])


ADVANTAGES = {
  "trl": {
    "scale_group": {},
    "scale_batch": {"scale": "batch"},
    "scale_none": {"scale": "none"},
  },
  "tunix": {
    "grpo": {"epsilon": 1e-6},
    "rloo": {"scale": "none", "baseline": "leave_one_out"},
    "drgrpo": {"scale": "none"},
  },
}


@pytest.mark.parametrize(
  ("peer", "name"),
  [(peer, name) for peer, names in ADVANTAGES.items() for name in names],
)
def test_advantages_are_those_of_the_peer(request, peer, name):
  golden = request.getfixturevalue(peer)
  advantages = objective.group_advantages(
    golden.inputs["rewards"], num_generations=4, **ADVANTAGES[peer][name]
  )
  assert_close(advantages, golden.numbers[f"adv/{name}"])


def test_two_rewards_combine_as_in_trl(trl):
  first, second = trl.inputs["rewards"], 0.5 * trl.inputs["rewards2"]
  summed = objective.group_advantages(first + second, num_generations=4)
  assert_close(summed, trl.numbers["adv/two_sum_then_normalize"])
  apart = objective.group_advantages(first, num_generations=4)
  # Weighted after the scaling, then scaled once more over the whole batch.
  other = 0.5 * objective.group_advantages(2 * second, num_generations=4)
  apart = objective.normalized_sum([apart, other], valid=apart < np.inf)
  assert_close(apart, trl.numbers["adv/two_normalize_then_sum"])


@pytest.mark.parametrize(
  ("peer", "reproduced"), [("trl", TRL_CASES), ("tunix", TUNIX_CASES)]
)
def test_every_case_is_reproduced_or_its_reason_is_documented(
  request, peer, reproduced
):
  cases = request.getfixturevalue(peer).cases
  losses = {c.removeprefix("loss/") for c in cases if c.startswith("loss/")}
  assert losses - set(reproduced) == NOT_REPRODUCED[peer]
  root = pathlib.Path(objective.__file__).resolve().parents[2]
  text = (root / "docs" / "objective.md").read_text()
  assert all(f"`{case}`" in text for case in NOT_REPRODUCED[peer])
