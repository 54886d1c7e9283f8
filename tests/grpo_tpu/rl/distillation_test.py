"""What a teacher teaches, by enumerating every completion of three tokens."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from grpo_tpu.models import logprobs
from grpo_tpu.rl import objective
from grpo_tpu.rl.settings import PRESETS

VOCAB, LENGTH = 4, 3
EVERY = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))


def table_logps(table, completions, teacher=None):
  """Of a model whose next token depends on the token before alone."""
  start = jnp.full((len(completions), 1), VOCAB)
  previous = jnp.concatenate([start, completions[:, :-1]], axis=1)
  eye = jnp.eye(VOCAB)
  if teacher is not None:
    teacher = teacher[previous], eye
  return logprobs.per_token_logps(
    *(table[previous], completions, eye),
    temperature=1.0,
    chunk_size=64,
    teacher=teacher,
  )


def sequence_kl(table, theirs):
  """KL(policy || teacher) of whole completions, term by term."""
  ours, _ = table_logps(table, jnp.asarray(EVERY))
  others, _ = table_logps(theirs, jnp.asarray(EVERY))
  return jnp.sum(jnp.exp(ours.sum(1)) * (ours - others).sum(1))


def test_the_kl_is_exact_and_each_position_teaches_its_own():
  """The mean over the policy's own completions, each with its probability.

  The chain rule makes the KL of completions of the sum over their positions.
  The gradient is that of each position's KL, where the prefixes are as they
  were sampled: autodiff of the same sum whose probabilities are constants.
  """
  rng = np.random.default_rng(0)
  table, theirs = jnp.asarray(rng.normal(size=(2, VOCAB + 1, VOCAB)), "float32")
  completions = jnp.asarray(EVERY)
  start, _ = table_logps(table, completions)
  probability = jnp.exp(start.sum(axis=1))
  config = dataclasses.replace(PRESETS["distill"], aggregation="constant")
  config = dataclasses.replace(config, max_completion_length=1)

  def mean_loss(table):
    logps, _, kl = table_logps(table, completions, theirs)

    def of_row(logps, kl):
      loss, _ = objective.policy_loss(
        *(logps[None], None, None, jnp.zeros(1), jnp.ones((1, LENGTH), bool)),
        config=config,
        kl=kl[None],
      )
      return loss

    return probability @ jax.vmap(of_row)(logps, kl)

  def twin(table):
    ours, others = (jax.nn.log_softmax(x) for x in (table, theirs))
    kl = (jnp.exp(ours) * (ours - others)).sum(axis=1)
    first = np.full((len(EVERY), 1), VOCAB)
    previous = np.concatenate([first, EVERY[:, :-1]], axis=1)
    return probability @ kl[previous].sum(axis=1)

  value, gradient = jax.value_and_grad(mean_loss)(table)
  np.testing.assert_allclose(value, sequence_kl(table, theirs), rtol=1e-5)
  wanted = jax.grad(twin)(table)
  np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)
  # The sampled token's KL has the same mean, but differs from row to row.
  logps, _ = table_logps(table, completions)
  ref, _ = table_logps(theirs, completions)

  def mean_of_samples(table):
    logps, _ = table_logps(table, completions)

    def of_row(logps, ref):
      return objective.policy_loss(
        *(logps[None], None, ref[None], jnp.zeros(1)),
        jnp.ones((1, LENGTH), bool),
        config=config,
      )[0]

    return probability @ jax.vmap(of_row)(logps, ref)

  sampled = jax.grad(mean_of_samples)(table)
  np.testing.assert_allclose(sampled, wanted, rtol=1e-4, atol=1e-6)
