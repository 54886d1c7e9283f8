"""Log-probabilities of given tokens, without ever holding all their logits.

One code path serves the policy, the old policy and the reference: taken any
other way, rounding alone would move their ratio away from one.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from data_pipelines import tokenizer

# Finite, for the entropy multiplies it by a probability of 0.
_IMPOSSIBLE = -1.0e30


def per_token_logps(
  states: Float[Array, "*batch D"],
  ids: Int[Array, "*batch"],
  embedding: Float[Array, "V D"],
  *,
  temperature: float,
  chunk_size: int,
  banned_ids: tuple[int, ...] = (),
  is_early: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
  """Log-probability of each id, and the entropy of its distribution, in fp32.

  Logits of `chunk_size` tokens exist at a time, in the backward pass too,
  where they are recomputed.

  Args:
    states: Final states that predict `ids`; carries the gradient.
    ids: The tokens whose log-probability is wanted.
    embedding: The tied output embedding; carries the gradient.
    temperature: Logits are divided by it, as they were when sampling.
    chunk_size: Tokens per chunk; a chunk costs `chunk_size * V * 4` bytes.
    banned_ids: As in `logits_of`, and as they were when sampling.
    is_early: As in `unstoppable`, likewise; None where no token is.

  Returns:
    Log-probabilities and entropies, in nats.
  """
  num_tokens = math.prod(ids.shape)
  chunk_size = min(chunk_size, num_tokens)
  padding = -num_tokens % chunk_size
  flat_states = jnp.pad(
    states.reshape(num_tokens, -1), ((0, padding), (0, 0))
  ).reshape(-1, chunk_size, states.shape[-1])
  flat_ids = jnp.pad(ids.reshape(-1), (0, padding)).reshape(-1, chunk_size)
  flat_early = None
  if is_early is not None:
    flat_early = jnp.pad(is_early.reshape(-1), (0, padding))
    flat_early = flat_early.reshape(-1, chunk_size)

  @jax.checkpoint
  def chunk(states, ids, is_early):
    logits = logits_of(
      states, embedding, temperature=temperature, banned_ids=banned_ids
    )
    if is_early is not None:
      logits = unstoppable(logits, is_early)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
    mean_logit = jnp.sum(
      jnp.exp(logits - log_normalizer[:, None]) * logits, axis=-1
    )
    return chosen - log_normalizer, log_normalizer - mean_logit

  logps, entropies = jax.lax.map(
    lambda x: chunk(*x), (flat_states, flat_ids, flat_early)
  )
  return (
    logps.reshape(-1)[:num_tokens].reshape(ids.shape),
    entropies.reshape(-1)[:num_tokens].reshape(ids.shape),
  )


def logits_of(
  states: Float[Array, "*batch D"],
  embedding: Float[Array, "V D"],
  *,
  temperature: float,
  banned_ids: tuple[int, ...] = (),
) -> Float[Array, "*batch V"]:
  """Logits in fp32, whatever the type of states and embedding.

  Sampler and trainer both make theirs here, so a banned id is in neither's
  softmax: what is drawn has the probability that is trained. In one of the two
  alone, the ratio would start off 1 by the banned probability.

  Args:
    states: Final states.
    embedding: The tied output embedding.
    temperature: Logits are divided by it.
    banned_ids: Ids of probability 0.
  """
  logits = jnp.einsum(
    "...d,vd->...v",
    states,
    embedding.astype(states.dtype),
    preferred_element_type=jnp.float32,
  )
  logits = logits / temperature
  if not banned_ids:
    return logits
  ids = jnp.arange(embedding.shape[0])
  banned = functools.reduce(operator.or_, (ids == i for i in banned_ids))
  banned = jnp.expand_dims(banned, range(logits.ndim - 1))
  return jnp.where(banned, _IMPOSSIBLE, logits)


def unstoppable(
  logits: Float[Array, "*batch V"], is_early: Bool[Array, "*batch"]
) -> Float[Array, "*batch V"]:
  """Logits without the stop tokens, where a row is too short to end.

  Like banned ids, they are in neither softmax, the sampler's or the trainer's.
  """
  ids = jnp.arange(logits.shape[-1])
  stops = functools.reduce(operator.or_, (ids == i for i in tokenizer.STOP_IDS))
  stops = jnp.expand_dims(stops, range(logits.ndim - 1))
  return jnp.where(stops & is_early[..., None], _IMPOSSIBLE, logits)
