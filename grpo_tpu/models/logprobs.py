"""Log-probabilities of given tokens, without ever holding all their logits.

One code path serves the policy, the old policy and the reference: taken any
other way, rounding alone would move their ratio away from one.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.distributed import sharding

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
  cut_by: str | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
  """Log-probability of each id, and the entropy of its distribution, in fp32.

  Logits of `chunk_size` tokens exist at a time, in the backward pass too,
  where they are recomputed if there is more than one chunk.

  Args:
    states: Final states that predict `ids`; carries the gradient.
    ids: The tokens whose log-probability is wanted.
    embedding: The tied output embedding; carries the gradient.
    temperature: Logits are divided by it, as they were when sampling.
    chunk_size: Tokens per chunk; a chunk costs `chunk_size * V * 4` bytes.
    banned_ids: As in `output_logits`, and as they were when sampling.
    is_early: As in `mask_stop_tokens`, likewise; None where no token is.
    cut_by: In a `shard_map`, the mesh axis of whose shards each has a part of
      the embedding's rows, in order; None where it is whole.

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

  # Chunk by chunk the backward pass makes logits anew. Where one chunk is all,
  # they may as well stay: the loss is next, and then that pass.
  keeps_logits = num_tokens == chunk_size
  how = LogitsSpec(temperature, banned_ids, keeps_logits, cut_by)

  def chunk(args):
    states, ids, is_early = args
    return _scored(how, states, embedding, ids, is_early)

  if how.keeps_logits:
    # A loop of one would add the embedding's gradient to zeros.
    args = jax.tree.map(lambda x: x[0], (flat_states, flat_ids, flat_early))
    logps, entropies = chunk(args)
  else:
    logps, entropies = jax.lax.map(chunk, (flat_states, flat_ids, flat_early))
  return (
    logps.reshape(-1)[:num_tokens].reshape(ids.shape),
    entropies.reshape(-1)[:num_tokens].reshape(ids.shape),
  )


def sharded_per_token_logps(
  states: Float[Array, "U C T D"],
  ids: Int[Array, "U C T"],
  embedding: Float[Array, "V D"],
  *,
  is_early: Bool[Array, "U C T"] | None = None,
  **how: Any,
) -> tuple[Float[Array, "U C T"], Float[Array, "U C T"]]:
  """`per_token_logps` in which each data shard scores its own bundles.

  Left to itself, the compiler cuts every chunk's logits along `D` and adds them
  up over the devices. Here the embedding is gathered once, and its gradient
  scattered once, whatever the number of chunks; `chunk_size` is of a shard.
  Tensor shards have the logits of their own part of the vocabulary. On
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

  def scored(states, ids, embedding, *early, cut_by=None):
    early = {"is_early": early[0]} if early else {}
    return per_token_logps(
      states, ids, embedding, **how, **early, cut_by=cut_by
    )

  def gathered(states, ids, embedding, *early):
    whole = _whole(embedding.astype(states.dtype))
    # Chunks' gradients add up in the type of the parameter.
    return scored(states, ids, whole.astype(dtype), *early, cut_by="tensor")

  arrays = (states, ids, embedding, *(() if is_early is None else (is_early,)))
  if mesh.empty or mesh.size == 1 or states.shape[0] % shards:
    return scored(*arrays)
  rows = sharding.BATCH
  return jax.shard_map(
    gathered,
    in_specs=(rows, rows, P("tensor", "fsdp"), *[rows] * (len(arrays) - 3)),
    out_specs=(rows, rows),
    check_vma=False,
  )(*arrays)


@jax.custom_vjp
def _whole(part: Float[Array, "V part"]) -> Float[Array, "V D"]:
  """All columns of an embedding of which each fsdp shard has some."""
  return jax.lax.all_gather(part, "fsdp", axis=1, tiled=True)


def _whole_backward(_, gradient):
  """The sum of this shard's columns.

  Cut along its last axis, a part would not fill a TPU's lanes; the compiler
  would add up all of it everywhere, and then cut.
  """
  num_rows, num_columns = gradient.shape
  shards = jax.lax.axis_size("fsdp")
  parts = gradient.reshape(num_rows, shards, num_columns // shards)
  parts = parts.swapaxes(0, 1)
  return (jax.lax.psum_scatter(parts, "fsdp", scatter_dimension=0),)


_whole.defvjp(lambda part: (_whole(part), None), _whole_backward)


class LogitsSpec(NamedTuple):
  """What a chunk's logits are, and whether the backward pass finds them."""

  temperature: float
  banned_ids: tuple[int, ...]
  keeps_logits: bool
  cut_by: str | None

  def logits(self, is_early, states, embedding) -> Array:
    """Of this shard's part of the vocabulary."""
    first = self.first(len(embedding))
    logits = output_logits(
      states,
      embedding,
      temperature=self.temperature,
      banned_ids=self.banned_ids,
      first_id=first,
    )
    if is_early is None:
      return logits
    return mask_stop_tokens(logits, is_early, first_id=first)

  def first(self, num_ids: int) -> Array | int:
    """The id of the first logit."""
    return jax.lax.axis_index(self.cut_by) * num_ids if self.cut_by else 0

  def total(self, x: Array) -> Array:
    """The sum over all parts of the vocabulary."""
    return jax.lax.psum(x, self.cut_by) if self.cut_by else x

  def largest(self, x: Array) -> Array:
    """Likewise."""
    return jax.lax.pmax(x, self.cut_by) if self.cut_by else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(how: LogitsSpec, states, embedding, ids, is_early):
  """Log-probabilities and entropies of a chunk.

  Its backward pass is one exponential and one select for each logit; left to
  itself, the gather of what was chosen would go back as a scatter into zeros.
  """
  outputs, _ = _scored_forward(how, states, embedding, ids, is_early)
  return outputs


def _scored_forward(how, states, embedding, ids, is_early):
  logits = how.logits(is_early, states, embedding)
  peak = how.largest(logits.max(axis=-1, keepdims=True))
  # Below the peak: numbers of the size of their differences round least.
  total = how.total(jnp.exp(logits - peak).sum(axis=-1))
  weighed = jnp.sum(jnp.exp(logits - peak) * (logits - peak), axis=-1)
  mean = how.total(weighed) / total
  num_ids = logits.shape[-1]
  place = ids - how.first(num_ids)
  is_own = (place >= 0) & (place < num_ids)
  place = jnp.where(is_own, place, 0)
  chosen = jnp.take_along_axis(logits, place[:, None], axis=1) - peak
  chosen = how.total(jnp.where(is_own, chosen[:, 0], 0.0))
  kept = logits if how.keeps_logits else None
  residuals = states, embedding, ids, is_early, peak, total, mean, kept
  return (chosen - jnp.log(total), jnp.log(total) - mean), residuals


def _scored_backward(how, residuals, gradients):
  states, embedding, ids, is_early, peak, total, mean, kept = residuals
  # A result that shards share comes back to each as its share of a gradient.
  of_logps, of_entropies = (how.total(x)[:, None] for x in gradients)
  logits, pull = jax.vjp(
    functools.partial(how.logits, is_early), states, embedding
  )
  below = (logits if kept is None else kept) - peak
  # d logp / d logit = chosen - p; d entropy / d logit = -p (logit - mean).
  probabilities = jnp.exp(below) / total[:, None]
  slope = of_logps + of_entropies * (below - mean[:, None])
  num_ids = below.shape[-1]
  is_chosen = jnp.arange(num_ids)[None] == ids[:, None] - how.first(num_ids)
  gradient = jnp.where(is_chosen, of_logps, 0.0) - probabilities * slope
  return *pull(gradient), None, None


_scored.defvjp(_scored_forward, _scored_backward)


def output_logits(
  states: Float[Array, "*batch D"],
  embedding: Float[Array, "V D"],
  *,
  temperature: float,
  banned_ids: tuple[int, ...] = (),
  first_id: Int[Array, ""] | int = 0,
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
    first_id: Of the embedding's first row, where it is a part.
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
  ids = first_id + jnp.arange(embedding.shape[0])
  banned = functools.reduce(operator.or_, (ids == i for i in banned_ids))
  banned = jnp.expand_dims(banned, range(logits.ndim - 1))
  return jnp.where(banned, _IMPOSSIBLE, logits)


def mask_stop_tokens(
  logits: Float[Array, "*batch V"],
  is_early: Bool[Array, "*batch"],
  first_id: Int[Array, ""] | int = 0,
) -> Float[Array, "*batch V"]:
  """Logits without the stop tokens, where a row is too short to end.

  Like banned ids, they are in neither softmax, the sampler's or the trainer's.
  """
  ids = first_id + jnp.arange(logits.shape[-1])
  stops = functools.reduce(operator.or_, (ids == i for i in GEMMA3.stop_ids))
  stops = jnp.expand_dims(stops, range(logits.ndim - 1))
  return jnp.where(stops & is_early[..., None], _IMPOSSIBLE, logits)
