"""The effect of the KL term on the policy, by enumerating every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import objective
from grpo_tpu.rl.settings import PRESETS


def kl_gradient(logits, old_logits, ref_logits, config):
  """The exact mean over all tokens of the KL term's gradient in the logits."""
  reference = jax.nn.log_softmax(ref_logits)
  old = jax.nn.log_softmax(old_logits)

  def loss_of_token(logits, token):
    loss, _ = objective.policy_loss(
      jax.nn.log_softmax(logits)[token][None, None],
      old[token][None, None],
      reference[token][None, None],
      jnp.zeros(1),
      jnp.ones((1, 1), bool),
      config=config,
    )
    return loss

  tokens = jnp.arange(logits.size)
  grads = jax.vmap(jax.grad(loss_of_token), in_axes=(None, 0))(logits, tokens)
  return jnp.exp(old) @ grads


def mean_under(logits, of):
  return jnp.exp(jax.nn.log_softmax(logits)) @ of(jax.nn.log_softmax(logits))


@pytest.mark.parametrize(
  ("gradient", "policy"),
  [
    ("estimator", "on"),  # Nothing is promised of it off-policy.
    ("importance_weighted", "on"),
    ("importance_weighted", "off"),
    ("reverse", "on"),
    ("reverse", "off"),
  ],
)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_kl_gradient_is_the_documented_one(
  estimator, gradient, policy
):
  """The table of docs/objective.md, over a vocabulary of six."""
  rng = np.random.default_rng(8)
  logits, old, ref = jnp.float32(rng.normal(size=(3, 6)))
  if policy == "on":
    old = logits
  log_ref = jax.nn.log_softmax(ref)

  def reverse_kl(x):
    return mean_under(x, lambda logps: logps - log_ref)

  def forward_kl(x):
    return jnp.exp(log_ref) @ (log_ref - jax.nn.log_softmax(x))

  def mean_k2(x):
    return mean_under(x, lambda logps: (logps - log_ref) ** 2 / 2)

  expected = {
    ("estimator", "k1"): lambda x: 0.0 * x.sum(),
    ("estimator", "k3"): forward_kl,
    ("importance_weighted", "k2"): mean_k2,
  }.get((gradient, estimator), reverse_kl)
  config = dataclasses.replace(
    PRESETS["dapo"],
    beta=1.0,
    kl_estimator=estimator,
    kl_gradient=gradient,
  )
  np.testing.assert_allclose(
    kl_gradient(logits, old, ref, config),
    jax.grad(expected)(logits),
    rtol=1e-4,
    atol=1e-6,
  )
