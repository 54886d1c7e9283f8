"""The effect of the KL term on the policy, by enumerating every token."""

import dataclasses
import math

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


# --- Far from the reference, where values are limited to exp(60).

FAR = [sign * nats for nats in (59.0, 61.0, 80.0, 200.0) for sign in (-1, 1)]


def gradient_of(logps, old, ref, *, advantage=0.0, **changes):
  """The gradient of one row's loss in its log-probabilities."""
  config = dataclasses.replace(PRESETS["dapo"], **changes)
  rows = [jnp.float32(x)[None] for x in (old, ref)]

  def loss_of(logps):
    mask = jnp.ones(logps.shape, bool)
    advantages = jnp.full(1, advantage)
    return objective.policy_loss(logps, *rows, advantages, mask, config=config)

  return jax.grad(loss_of, has_aux=True)(jnp.float32(logps)[None])[0][0]


@pytest.mark.parametrize("x", FAR)
@pytest.mark.parametrize("gradient", ["estimator", "importance_weighted"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_far_from_the_reference_the_gradient_is_the_derivative(
  estimator, gradient, x
):
  """A token that is `x` nats more likely than under the reference.

  On policy the ratio r is 1 and its derivative too, so r k has k + dk:
    k1 = x                 dk = 1
    k2 = x^2 / 2           dk = x
    k3 = exp(-x) - 1 + x   dk = 1 - exp(-x), no larger than exp(60)
  """
  expected = {
    ("estimator", "k1"): 1.0,
    ("estimator", "k2"): x,
    ("estimator", "k3"): 1 - math.exp(min(-x, 60)),  # -1.1e26 at -61.
    ("importance_weighted", "k1"): x + 1,
    ("importance_weighted", "k2"): x**2 / 2 + x,
    ("importance_weighted", "k3"): x,  # exp(-x) cancels out: -61 at -61.
  }[gradient, estimator]
  for importance in ("token", "sequence"):  # Equal for a row of one token.
    grad = gradient_of(
      *([-300.0], [-300.0], [-300.0 - x]),
      **{"beta": 1.0, "importance": importance},
      **{"kl_estimator": estimator, "kl_gradient": gradient},
    )
    np.testing.assert_allclose(grad, [expected], rtol=1e-5)


@pytest.mark.parametrize("x", FAR)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reverse_gradient_is_the_log_ratio_however_far(estimator, x):
  grad = gradient_of(
    *([-300.0], [-300.0], [-300.0 - x]),
    **{"beta": 1.0, "kl_gradient": "reverse", "kl_estimator": estimator},
  )
  np.testing.assert_allclose(grad, [x], rtol=1e-5)


@pytest.mark.parametrize("x", FAR)
def test_a_row_returns_to_the_reference_where_one_token_is_far(x):
  """With a row's ratio, for a far token beside one at the reference.

  By hand, with r = 1 and a mean over two tokens: the row's ratio gives each
  token half of (k3 + dk) + 0, and k3's own slope the far one half of dk, the
  other minus half of dk.
  """
  grad = gradient_of(
    *([-300.0, -1.0], [-300.0, -1.0], [-300.0 - x, -1.0]),
    **{"beta": 1.0, "importance": "sequence"},
    **{"kl_estimator": "k3", "kl_gradient": "importance_weighted"},
  )
  slope = 1 - math.exp(min(-x, 60))
  expected = np.array([x + slope, x - slope]) / 2 / 2  # Over two tokens.
  np.testing.assert_allclose(grad, expected, rtol=1e-5)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("nats", [59.0, 61.0, 80.0, 200.0])
def test_a_worse_token_that_has_become_likely_is_pushed_down(nats, importance):
  """The gradient of the ratio is the ratio, which ends growing at exp(60)."""
  grad = gradient_of(
    *([-300.0 + nats], [-300.0], [-300.0]),
    **{"advantage": -1.0, "dual_clip": None, "importance": importance},
    **{"beta": 0.0},
  )
  np.testing.assert_allclose(grad, [math.exp(min(nats, 60))], rtol=1e-5)
