"""Log-probabilities of given tokens, without ever holding all their logits.

One code path serves the policy, the old policy and the reference. With two,
rounding alone would move their ratio away from one.
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

# Finite, because the entropy multiplies it by a probability of 0.
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
  vocab_axis: str | None = None,
  teacher: tuple[Float[Array, "*batch E"], Float[Array, "V E"]] | None = None,
) -> tuple[Float[Array, "*batch"], ...]:
  """Log-probability of each id and entropy of its distribution, in fp32 nats.

  With a teacher also KL(distribution || teacher's), over the whole vocabulary.
  The logits of `chunk_size` tokens exist at a time, in the backward pass too.

  Args:
    states: Final states that predict `ids`; carry the gradient.
    ids: Tokens whose log-probability is wanted.
    embedding: Output embedding; carries the gradient too.
    temperature: Divisor of the logits, the same as in sampling.
    chunk_size: Tokens per chunk; a chunk costs `chunk_size * V * 4` bytes.
    banned_ids: As in `output_logits`, the same as in sampling.
    is_early: As in `mask_stop_tokens`; None where no token is early.
    vocab_axis: In a `shard_map`, the mesh axis whose shards hold parts of the
      embedding's rows, in order; None if it is whole.
    teacher: Another model's states and output embedding, without gradient.
  """
  num_tokens = math.prod(ids.shape)
  chunk_size = min(chunk_size, num_tokens)
  padding = -num_tokens % chunk_size

  def chunks(x):
    width = x.shape[ids.ndim :]
    flat = x.reshape(num_tokens, *width)
    flat = jnp.pad(flat, ((0, padding), *[(0, 0)] * len(width)))
    return flat.reshape(-1, chunk_size, *width)

  theirs, their_embedding = teacher or (None, None)
  args = jax.tree.map(chunks, (states, ids, is_early, theirs))
  # The backward pass of several chunks recomputes their logits. With one chunk
  # the logits may stay: only the loss stands between forward and backward.
  keeps_logits = num_tokens == chunk_size
  spec = _LogitsSpec(temperature, banned_ids, keeps_logits, vocab_axis)

  def score_chunk(args):
    states, ids, is_early, theirs = args
    pair = None if theirs is None else (theirs, their_embedding)
    return _score(spec, states, embedding, ids, is_early, pair)

  if keeps_logits:
    # A loop of one would add the embedding's gradient to zeros.
    found = score_chunk(jax.tree.map(lambda x: x[0], args))
  else:
    found = jax.lax.map(score_chunk, args)
  return tuple(x.reshape(-1)[:num_tokens].reshape(ids.shape) for x in found)


def sharded_per_token_logps(
  states: Float[Array, "U C T D"],
  ids: Int[Array, "U C T"],
  embedding: Float[Array, "V D"],
  *,
  is_early: Bool[Array, "U C T"] | None = None,
  teacher: tuple[Float[Array, "U C T E"], Float[Array, "V E"]] | None = None,
  **kwargs: Any,
) -> tuple[Float[Array, "U C T"], ...]:
  """`per_token_logps`, with each data shard scoring its own bundles.

  The compiler alone would sum every chunk's logits over the devices. Here the
  embedding is gathered once, and its gradient scattered once; `chunk_size`
  counts tokens of a shard. Tensor shards hold the logits of their part of the
  vocabulary. Without the mesh of `jax.set_mesh`, or if it does not divide the
  bundles, it is plain `per_token_logps`, whose arguments it takes.
  """
  mesh, (batch,) = jax.sharding.get_abstract_mesh(), sharding.BATCH
  shards = 1 if mesh.empty else math.prod(mesh.shape[name] for name in batch)

  def score(rows, embeddings, vocab_axis=None):
    states, ids, is_early, theirs = rows
    return per_token_logps(
      *(states, ids, embeddings[0]),
      is_early=is_early,
      teacher=None if theirs is None else (theirs, embeddings[1]),
      vocab_axis=vocab_axis,
      **kwargs,
    )

  def score_shard(rows, embeddings):
    # Gradients of chunks add up in the type of the parameter.
    whole = [
      _gather_columns(x.astype(states.dtype)).astype(x.dtype)
      for x in embeddings
    ]
    return score(rows, whole, vocab_axis="tensor")

  theirs, their_embedding = teacher or (None, None)
  rows = (states, ids, is_early, theirs)
  embeddings = (embedding, their_embedding)[: 2 if teacher else 1]
  if mesh.empty or mesh.size == 1 or states.shape[0] % shards:
    return score(rows, embeddings)
  return jax.shard_map(
    score_shard,
    in_specs=(sharding.BATCH, P("tensor", "fsdp")),
    out_specs=sharding.BATCH,
    check_vma=False,
  )(rows, embeddings)


@jax.custom_vjp
def _gather_columns(part: Float[Array, "V part"]) -> Float[Array, "V D"]:
  """Gathers an embedding whose columns are split over `fsdp`."""
  return jax.lax.all_gather(part, "fsdp", axis=1, tiled=True)


def _gather_columns_backward(_, gradient):
  """Sums this shard's columns over all shards.

  Parts along the last axis would not fill a TPU's lanes; the compiler would sum
  everything everywhere and slice the result.
  """
  num_rows, num_columns = gradient.shape
  shards = jax.lax.axis_size("fsdp")
  parts = gradient.reshape(num_rows, shards, num_columns // shards)
  parts = parts.swapaxes(0, 1)
  return (jax.lax.psum_scatter(parts, "fsdp", scatter_dimension=0),)


_gather_columns.defvjp(
  lambda part: (_gather_columns(part), None), _gather_columns_backward
)


class _LogitsSpec(NamedTuple):
  """Static choices for the logits of a chunk."""

  temperature: float
  banned_ids: tuple[int, ...]
  keeps_logits: bool
  vocab_axis: str | None

  def logits(self, is_early, states, embedding) -> Array:
    """Logits of this shard's part of the vocabulary."""
    how = {"temperature": self.temperature, "banned_ids": self.banned_ids}
    first = self.first_id(len(embedding))
    logits = output_logits(states, embedding, first_id=first, **how)
    if is_early is None:
      return logits
    return mask_stop_tokens(logits, is_early, first_id=first)

  def first_id(self, num_ids: int) -> Array | int:
    """The id of the first logit."""
    axis = self.vocab_axis
    return jax.lax.axis_index(axis) * num_ids if axis else 0

  def total(self, x: Array) -> Array:
    """The sum over all parts of the vocabulary."""
    return jax.lax.psum(x, self.vocab_axis) if self.vocab_axis else x

  def largest(self, x: Array) -> Array:
    """The maximum over all parts of the vocabulary."""
    return jax.lax.pmax(x, self.vocab_axis) if self.vocab_axis else x

  def log_ratio(self, logps: Array, is_early, teacher) -> Array:
    """Log-probabilities of all ids less those of the teacher."""
    logits = self.logits(is_early, *teacher)
    below = logits - self.largest(logits.max(axis=-1, keepdims=True))
    total = self.total(jnp.exp(below).sum(axis=-1, keepdims=True))
    return logps - (below - jnp.log(total))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(spec: _LogitsSpec, states, embedding, ids, is_early, teacher):
  """Log-probabilities, entropies and KLs to a teacher, if any, of a chunk.

  Automatic differentiation would scatter the chosen logits into zeros.
  """
  outputs, _ = _score_forward(spec, states, embedding, ids, is_early, teacher)
  return outputs


def _score_forward(spec, states, embedding, ids, is_early, teacher):
  logits = spec.logits(is_early, states, embedding)
  peak = spec.largest(logits.max(axis=-1, keepdims=True))
  # Logits relative to the peak are small numbers, which round least.
  total = spec.total(jnp.exp(logits - peak).sum(axis=-1))
  weighted = jnp.sum(jnp.exp(logits - peak) * (logits - peak), axis=-1)
  mean = spec.total(weighted) / total
  num_ids = logits.shape[-1]
  column = ids - spec.first_id(num_ids)
  is_own = (column >= 0) & (column < num_ids)
  column = jnp.where(is_own, column, 0)
  chosen = jnp.take_along_axis(logits, column[:, None], axis=1) - peak
  chosen = spec.total(jnp.where(is_own, chosen[:, 0], 0.0))
  kept = logits if spec.keeps_logits else None
  outputs = chosen - jnp.log(total), jnp.log(total) - mean
  kl = None
  if teacher is not None:
    logps = logits - peak - jnp.log(total)[:, None]
    log_ratio = spec.log_ratio(logps, is_early, teacher)
    kl = spec.total(jnp.sum(jnp.exp(logps) * log_ratio, axis=-1))
    outputs += (kl,)
  given = states, embedding, ids, is_early, teacher
  return outputs, (*given, peak, total, mean, kept, kl)


def _score_backward(spec, residuals, gradients):
  states, embedding, ids, is_early, teacher, peak, *found = residuals
  total, mean, kept, kl = found
  # The gradient of a result that shards share arrives in parts, one per shard.
  d_logps, d_entropies, *d_kl = (spec.total(x)[:, None] for x in gradients)
  logits, pull = jax.vjp(
    functools.partial(spec.logits, is_early), states, embedding
  )
  below = (logits if kept is None else kept) - peak
  # d logp / d logit = chosen - p; d entropy / d logit = -p (logit - mean).
  probabilities = jnp.exp(below) / total[:, None]
  slope = d_logps + d_entropies * (below - mean[:, None])
  if teacher is not None:
    # d KL / d logit = p (log p / teacher's p - KL).
    log_ratio = spec.log_ratio(
      below - jnp.log(total)[:, None], is_early, teacher
    )
    slope -= d_kl[0] * (log_ratio - kl[:, None])
  num_ids = below.shape[-1]
  column = ids[:, None] - spec.first_id(num_ids)
  is_chosen = jnp.arange(num_ids)[None] == column
  gradient = jnp.where(is_chosen, d_logps, 0.0) - probabilities * slope
  return *pull(gradient), None, None, None


_score.defvjp(_score_forward, _score_backward)


def output_logits(
  states: Float[Array, "*batch D"],
  embedding: Float[Array, "V D"],
  *,
  temperature: float,
  banned_ids: tuple[int, ...] = (),
  first_id: Int[Array, ""] | int = 0,
) -> Float[Array, "*batch V"]:
  """Logits in fp32, whatever the type of states and embedding.

  Sampler and trainer both use it: a banned id is in neither's softmax, or the
  ratio would start off 1. `first_id` is the id of the embedding's first row.
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
  banned = _is_one_of(banned_ids, embedding.shape[0], first_id)
  banned = jnp.expand_dims(banned, range(logits.ndim - 1))
  return jnp.where(banned, _IMPOSSIBLE, logits)


def mask_stop_tokens(
  logits: Float[Array, "*batch V"],
  is_early: Bool[Array, "*batch"],
  first_id: Int[Array, ""] | int = 0,
) -> Float[Array, "*batch V"]:
  """Makes stop tokens impossible where a row is too short to end.

  Like banned ids, they are then in neither softmax, the sampler's or the
  trainer's.
  """
  stops = _is_one_of(GEMMA3.stop_ids, logits.shape[-1], first_id)
  stops = jnp.expand_dims(stops, range(logits.ndim - 1))
  return jnp.where(stops & is_early[..., None], _IMPOSSIBLE, logits)


def _is_one_of(wanted, num_ids, first_id) -> Bool[Array, " V"]:
  """True for the ids, of the `num_ids` from `first_id` on, that are wanted."""
  ids = first_id + jnp.arange(num_ids)
  return functools.reduce(operator.or_, (ids == i for i in wanted))
