"""Chunked log-probabilities against a plain log-softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.distributed import sharding
from grpo_tpu.models import logprobs

SHAPE, WIDTH, VOCAB = (2, 2, 3), 5, 17
TEMPERATURE = 0.7


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  return (
    jnp.asarray(rng.normal(0, 1, (*SHAPE, WIDTH)), jnp.float32),
    jnp.asarray(rng.integers(0, VOCAB, SHAPE), jnp.int32),
    jnp.asarray(rng.normal(0, 1, (VOCAB, WIDTH)), jnp.float32),
  )


def chunked(states, ids, embedding, chunk_size, temperature=TEMPERATURE):
  return logprobs.per_token_logps(
    states, ids, embedding, temperature=temperature, chunk_size=chunk_size
  )


def plain(states, ids, embedding, temperature=TEMPERATURE):
  """The twin: every logit at once."""
  logps = jax.nn.log_softmax(states @ embedding.T / temperature, axis=-1)
  entropies = -(jnp.exp(logps) * logps).sum(axis=-1)
  return jnp.take_along_axis(logps, ids[..., None], axis=-1)[..., 0], entropies


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 12, 100])
def test_values_and_gradients_equal_a_plain_log_softmax(chunk_size):
  """Chunks that divide the twelve tokens, do not, or are larger."""
  states, ids, embedding = inputs()
  weight = jax.random.normal(jax.random.key(1), (2, *SHAPE))

  def scalar(function):
    def weighed(states, embedding):
      outputs = function(states, ids, embedding)
      return sum(jnp.sum(w * x) for w, x in zip(weight, outputs, strict=True))

    return jax.grad(weighed, argnums=(0, 1))(states, embedding)

  def ours(*args):
    return chunked(*args, chunk_size)

  for got, want in zip(
    (*ours(states, ids, embedding), *scalar(ours)),
    (*plain(states, ids, embedding), *scalar(plain)),
    strict=True,
  ):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def assert_equal_with_gradients(ours, twin):
  """Compares values, and gradients of states and embedding."""
  states, _, embedding = inputs()
  weight = jax.random.normal(jax.random.key(1), (2, *SHAPE))

  def weighed(of):
    return jax.value_and_grad(
      lambda *args: sum(
        jnp.sum(w * x) for w, x in zip(weight, of(*args), strict=True)
      ),
      argnums=(0, 1),
    )(states, embedding)

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    weighed(ours),
    weighed(twin),
  )


@pytest.mark.parametrize("chunk_size", [5, 12])
def test_banned_ids_act_as_if_absent_from_the_vocabulary(chunk_size):
  """In values and gradients; their embeddings get no gradient."""
  _, ids, _ = inputs()
  ids = jnp.clip(ids, 1, VOCAB - 2)

  def ours(states, embedding):
    return logprobs.per_token_logps(
      states,
      ids,
      embedding,
      temperature=TEMPERATURE,
      chunk_size=chunk_size,
      banned_ids=(0, VOCAB - 1),
    )

  def without(states, embedding):
    return plain(states, ids - 1, embedding[1:-1])

  assert_equal_with_gradients(ours, without)


@pytest.mark.parametrize("chunk_size", [5, 12])
def test_early_tokens_act_as_if_the_vocabulary_had_no_stop_token(chunk_size):
  """In values and gradients, for the early tokens only."""
  _, ids, _ = inputs()
  stop = GEMMA3.stop_ids[0]
  early = np.arange(SHAPE[-1]) < np.array([[0, 1], [2, 3]])[..., None]
  is_early = jnp.asarray(early)
  ids = jnp.where(is_early & (ids == stop), stop + 1, ids)

  def ours(states, embedding):
    return logprobs.per_token_logps(
      states,
      ids,
      embedding,
      temperature=TEMPERATURE,
      chunk_size=chunk_size,
      is_early=is_early,
    )

  def twin(states, embedding):
    kept = jnp.delete(embedding, stop, axis=0)
    early = plain(states, ids - (ids > stop), kept)
    late = plain(states, ids, embedding)
    return [jnp.where(is_early, x, y) for x, y in zip(early, late, strict=True)]

  assert_equal_with_gradients(ours, twin)


def test_uniform_logits_have_the_log_of_the_vocabulary_for_entropy():
  _, ids, embedding = inputs()
  logps, entropies = chunked(jnp.zeros((*SHAPE, WIDTH)), ids, embedding, 4)
  np.testing.assert_allclose(logps, -np.log(VOCAB), rtol=1e-6)
  np.testing.assert_allclose(entropies, np.log(VOCAB), rtol=1e-6)


def test_temperature_divides_the_logits():
  states, ids, embedding = inputs()
  for got, want in zip(
    chunked(states, ids, embedding, 5, temperature=2.0),
    chunked(states / 2, ids, embedding, 5, temperature=1.0),
    strict=True,
  ):
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_half_precision_states_and_embedding_give_fp32_logits():
  states, ids, embedding = inputs()
  states = states.astype(jnp.bfloat16)
  logps, entropies = chunked(states, ids, embedding, 5)
  expected, _ = plain(
    states.astype(jnp.float32),
    ids,
    embedding.astype(jnp.bfloat16).astype(jnp.float32),
  )
  assert logps.dtype == entropies.dtype == jnp.float32
  np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-5)


def sizes(jaxpr):
  """Sizes of all arrays in a program, inner programs included."""
  for equation in jaxpr.eqns:
    yield from (x.aval.size for x in equation.outvars)
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from sizes(inner)


def test_no_more_than_a_chunk_of_logits_exists_backward_pass_included():
  """Nothing else is larger than the states and the embedding."""
  vocab, tokens, chunk_size = 64, 96, 8
  states = jnp.zeros((tokens, 4))
  ids = jnp.zeros(tokens, jnp.int32)

  def loss(states, embedding):
    logps, entropies = chunked(states, ids, embedding, chunk_size)
    return jnp.sum(logps + entropies)

  program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
    states, jnp.zeros((vocab, 4))
  )
  assert max(sizes(program.jaxpr)) == chunk_size * vocab


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2), (1, 1, 8), (2, 4, 1)])
def test_sharded_scores_and_gradients_equal_those_of_one_device(shape):
  """For any sharding of bundles, width and vocabulary."""
  mesh = sharding.make_mesh(*shape, devices=jax.devices())
  rng = np.random.default_rng(0)
  states = jnp.asarray(rng.standard_normal((4, 2, 5, 8)), jnp.float32)
  table = jnp.asarray(rng.standard_normal((128, 8)), jnp.float32)
  ids = rng.integers(0, 128, (4, 2, 5))
  # None that is banned, or may not stop a row, lest its odds drown the others'.
  ids = jnp.where(jnp.isin(ids, np.array([1, 5, 30, 106])), 7, ids)
  weights = rng.standard_normal((2, *ids.shape)).astype(np.float32)

  def loss(score, states, table):
    logps, entropies = score(
      states,
      ids,
      table,
      temperature=0.7,
      chunk_size=3,
      banned_ids=(5, 30),
      is_early=jnp.arange(ids.size).reshape(ids.shape) % 3 == 0,
    )
    return (weights[0] * logps + weights[1] * entropies).sum()

  both = jax.value_and_grad(loss, argnums=(1, 2))
  plain = both(logprobs.per_token_logps, states, table)
  with jax.set_mesh(mesh):
    cut = jax.jit(both, static_argnums=0)(
      logprobs.sharded_per_token_logps, states, table
    )
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(cut), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [5, 12])
def test_the_kl_to_a_teacher_and_its_gradient_are_those_of_a_plain_twin(
  chunk_size,
):
  """Banned ids and early stop tokens are in neither distribution."""
  states, ids, embedding = inputs()
  rng = np.random.default_rng(2)
  theirs = jnp.asarray(rng.normal(0, 1, (*SHAPE, 3)), jnp.float32)
  their_embedding = jnp.asarray(rng.normal(0, 1, (VOCAB, 3)), jnp.float32)
  early = jnp.asarray(rng.random(SHAPE) < 0.5)
  stops = np.isin(np.arange(VOCAB), GEMMA3.stop_ids)
  assert stops.any()
  out = np.arange(VOCAB) == 3
  out = out | (stops & np.asarray(early)[..., None])
  weight = jax.random.normal(jax.random.key(1), SHAPE)

  def ours(states, embedding):
    *_, kl = logprobs.per_token_logps(
      *(states, ids, embedding),
      temperature=TEMPERATURE,
      chunk_size=chunk_size,
      banned_ids=(3,),
      is_early=early,
      teacher=(theirs, their_embedding),
    )
    return jnp.sum(weight * kl), kl

  def twin(states, embedding):
    both = []
    for x, matrix in ((states, embedding), (theirs, their_embedding)):
      logits = jnp.where(out, -jnp.inf, x @ matrix.T / TEMPERATURE)
      both.append(jax.nn.log_softmax(logits))
    policy, teacher = (jnp.where(out, 0.0, x) for x in both)
    kl = jnp.sum(jnp.where(out, 0, jnp.exp(policy)) * (policy - teacher), -1)
    return jnp.sum(weight * kl), kl

  got, wanted = (
    jax.grad(x, (0, 1), has_aux=True)(states, embedding) for x in (ours, twin)
  )
  for one, other in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
