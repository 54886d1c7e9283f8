"""Log-probabilities of given tokens, without ever holding all their logits.

One code path serves the policy, the old policy and the reference: taken any
other way, rounding alone would move their ratio away from one.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_tpu import sharding

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

  @jax.checkpoint
  def chunk(states, ids):
    logits = logits_of(
      states, embedding, temperature=temperature, banned_ids=banned_ids
    )
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
    mean_logit = jnp.sum(
      jnp.exp(logits - log_normalizer[:, None]) * logits, axis=-1
    )
    return chosen - log_normalizer, log_normalizer - mean_logit

  logps, entropies = jax.lax.map(lambda x: chunk(*x), (flat_states, flat_ids))
  return (
    logps.reshape(-1)[:num_tokens].reshape(ids.shape),
    entropies.reshape(-1)[:num_tokens].reshape(ids.shape),
  )


def on_shards(
  states: Float[Array, "U C T D"],
  ids: Int[Array, "U C T"],
  embedding: Float[Array, "V D"],
  *,
  is_early: Any = None,
  **how: Any,
) -> tuple[Float[Array, "U C T"], Float[Array, "U C T"]]:
  """`per_token_logps` in which each data shard scores its own bundles.

  Left to itself, the compiler cuts every chunk's logits along `D` and adds them
  up over the devices. Here the embedding is gathered once, and its gradient
  scattered once, whatever the number of chunks; `chunk_size` is of a shard. On
  the mesh of `jax.set_mesh`, and as it is where there is none or where it does
  not divide the bundles.

  Args:
    states: As in `per_token_logps`.
    ids: Likewise.
    embedding: Likewise.
    is_early: Likewise.
    **how: The rest, likewise.
  """
  mesh, (batch,) = jax.sharding.get_abstract_mesh(), sharding.BATCH
  shards = 1 if mesh.empty else math.prod(mesh.shape[name] for name in batch)
  dtype = embedding.dtype

  def scored(states, ids, embedding, *early):
    early = {"is_early": early[0]} if early else {}
    return per_token_logps(states, ids, embedding, **how, **early)

  def gathered(states, ids, embedding, *early):
    whole = jax.lax.all_gather(
      embedding.astype(states.dtype), "fsdp", axis=1, tiled=True
    )
    # Still cut along the vocabulary, as its logits are.
    whole = jax.lax.with_sharding_constraint(whole, P("tensor"))
    # Chunks' gradients add up in the type of the parameter.
    return scored(states, ids, whole.astype(dtype), *early)

  arrays = (states, ids, embedding, *(() if is_early is None else (is_early,)))
  if shards == 1 or states.shape[0] % shards:
    return scored(*arrays)
  rows = sharding.BATCH
  return jax.shard_map(
    gathered,
    in_specs=(rows, rows, P(None, "fsdp"), *[rows] * (len(arrays) - 3)),
    out_specs=(rows, rows),
    axis_names=set(batch),
    check_vma=False,
  )(*arrays)


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
