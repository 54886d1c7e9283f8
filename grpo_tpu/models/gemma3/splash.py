"""Attention by JAX's splash kernel for TPUs, which never holds the scores.

The kernel wants to know when it is compiled which blocks of keys can matter to
which queries, and takes the rest of a mask as a function of a number that each
query brings and of a key's index. The rows of a batch differ in the lengths of
their prompts and the places of their images: the number says those, and the
blocks are all that some row might need. The backward pass is the kernel's own.

References:
  `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_tpu.distributed import sharding

_LANES = 128  # Sequences come to the kernel in multiples of this.
_BLOCKS = (512, 256, 128)
_BITS = 15  # Two lengths and a sign fit in a number of 32 bits.
_LONGEST = 2**_BITS


class _RowMask(masks.NumpyMask):
  """A mask that is known in full when a row brings its numbers.

  The kernel skips blocks where the array has no True, and applies the function
  wherever it has one.

  Attributes:
    mask_function: Whether a query of a given number sees a key at an index.
    q_sequence: Stands for the numbers, which differ from row to row.
  """

  def __init__(self, possible: np.ndarray, sees: Callable):
    super().__init__(possible)
    self.mask_function = sees
    self.q_sequence = np.zeros(possible.shape[0], np.int32)

  __hash__ = object.__hash__

  def __eq__(self, other: object) -> bool:
    return self is other


def attend(
  q: Float[Array, "U C t Q H"],
  k: Float[Array, "U C t K H"],
  v: Float[Array, "U C t K H"],
  prompt_length: Int[Array, " U"],
  image_block: Int[Array, "U P"] | None,
  *,
  window: int,
  soft_tokens: int,
  is_global: Array,
  prompt: tuple[Array, Array] | None,
  interpret: bool,
) -> Float[Array, "U C t Q H"]:
  """`attention.attend` of whole rows.

  Args:
    q: Queries, scaled and rotated.
    k: Keys of the row itself.
    v: Values of the row itself.
    prompt_length: Tokens of each prompt before its padding.
    image_block: Number of the image of each prompt token; needed without
      `prompt`.
    window: Reach of local layers.
    soft_tokens: Longest block of an image; at most `window`.
    is_global: Whether this layer has no window.
    prompt: Keys and values of the prompt, which every completion reads.
    interpret: Run the kernel in an interpreter, off TPUs.

  Raises:
    ValueError: Rows too long for a query's number.
  """
  length = q.shape[2]
  q, k, v = (_padded(x) for x in (q, k, v))
  index = jnp.arange(q.shape[2])[None]
  if prompt is None:
    assert image_block is not None
    num_prompt = 0
    last = jnp.pad(
      _last_of_block(image_block), ((0, 0), (0, q.shape[2] - length))
    )
    # Padding sees itself, for a query must see something.
    number = _packed(index, jnp.maximum(last, index))
  else:
    prompt_k, prompt_v = (
      jnp.broadcast_to(
        _padded(x[:, None]),
        (*q.shape[:2], _rounded(x.shape[1]), *x.shape[2:]),
      )
      for x in prompt
    )
    num_prompt = prompt_k.shape[2]
    k = jnp.concatenate([prompt_k, k], axis=2)
    v = jnp.concatenate([prompt_v, v], axis=2)
    number = _packed(index, prompt_length[:, None])
  if max(q.shape[2], num_prompt) > _LONGEST:
    raise ValueError(
      f"prompts and completions ({max(q.shape[2], num_prompt)} tokens) must "
      f"be of at most {_LONGEST} tokens for splash attention; set "
      "model.attention=einsum."
    )
  number = jnp.broadcast_to(number[:, None], q.shape[:3])

  def layer(window: int):
    if prompt is None:
      mask = _prompt_mask(q.shape[2], soft_tokens, window)
    else:
      mask = _completion_mask(num_prompt, q.shape[2], window)
    return _on_the_mesh(
      lambda *row_parts: _rows(mask, *row_parts, interpret=interpret)
    )

  # Two kernels, of which one runs: blocks beyond the window are skipped.
  out = jax.lax.cond(
    is_global, layer(_LONGEST * 2), layer(window), q, k, v, number
  )
  return out[:, :, :length]


def _prompt_mask(num_prompt: int, soft_tokens: int, window: int) -> _RowMask:
  """Numbers carry the index of the query and the last that it sees."""

  def sees(number, key):
    query, last = _unpacked(number)
    return (key <= last) & (query - key < window)

  distance = np.subtract.outer(np.arange(num_prompt), np.arange(num_prompt))
  return _RowMask((distance > -max(soft_tokens, 1)) & (distance < window), sees)


def _completion_mask(num_prompt: int, num_own: int, window: int) -> _RowMask:
  """Numbers carry the index of the query and the length of its prompt.

  Keys are those of the prompt with their padding, then those of the row.
  """

  def sees(number, key):
    query, prompt_length = _unpacked(number)
    to_prompt = (key < prompt_length) & (query + prompt_length - key < window)
    distance = query + num_prompt - key
    own = (key >= num_prompt) & (distance >= 0) & (distance < window)
    return to_prompt | own

  query = np.arange(num_own)[:, None]
  distance = query - np.arange(num_own)[None, :]
  # The prompt's last token is at a distance of query + 1, the nearest.
  to_prompt = np.broadcast_to(query + 1 < window, (num_own, num_prompt))
  own = (distance >= 0) & (distance < window)
  return _RowMask(np.concatenate([to_prompt, own], axis=1), sees)


def _rows(
  mask: _RowMask,
  q: Float[Array, "U C t Q H"],
  k: Float[Array, "U C s K H"],
  v: Float[Array, "U C s K H"],
  number: Int[Array, "U C t"],
  *,
  interpret: bool,
) -> Float[Array, "U C t Q H"]:
  """The kernel on each row, of one device's heads."""
  block_q, block_kv = (_block(n) for n in mask.shape)
  made = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * q.shape[3]),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=kernels.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
    interpret=interpret,
  )

  def row(q, k, v, number):
    infos, kwargs = made.tree_flatten()
    numbered = kernels.SplashAttentionKernel(
      *(info._replace(q_sequence=number) for info in infos if info), **kwargs
    )
    heads_first = (x.swapaxes(0, 1) for x in (q, k, v))
    out = numbered(*heads_first)
    assert not isinstance(out, tuple)  # As with `save_residuals`.
    return out.swapaxes(0, 1)

  return jax.vmap(jax.vmap(row))(q, k, v, number)


def _on_the_mesh(rows: Callable) -> Callable:
  """Each device computes its own bundles and heads, if there is a mesh.

  The compiler cannot divide a kernel by itself.
  """

  def divided(q, k, v, number):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
      return rows(q, k, v, number)
    tensor, kv_heads = mesh.shape["tensor"], k.shape[3]
    # Heads that a device could not keep with their keys are computed by all.
    of_kv = "tensor" if kv_heads % tensor == 0 else None
    of_q = "tensor" if kv_heads == 1 and q.shape[3] % tensor == 0 else of_kv
    batch = sharding.BATCH[0]
    q_spec = P(batch, None, None, of_q)
    kv_spec = P(batch, None, None, of_kv)
    return jax.shard_map(
      rows,
      in_specs=(q_spec, kv_spec, kv_spec, P(batch)),
      out_specs=q_spec,
      check_vma=False,
    )(q, k, v, number)

  return divided


def _last_of_block(image_block: Int[Array, "U P"]) -> Int[Array, "U P"]:
  """The last index of each soft token's image; of text, its own."""
  index = jnp.arange(image_block.shape[1])[None]
  following = jnp.pad(image_block[:, 1:], ((0, 0), (0, 1)))
  ends = (image_block != following) | (image_block == 0)
  return jax.lax.cummin(
    jnp.where(ends, index, image_block.shape[1]), axis=1, reverse=True
  )


def _packed(a: Array, b: Array) -> Array:
  return (a << _BITS + 1) | b


def _unpacked(number):
  return number >> _BITS + 1, number & (2 ** (_BITS + 1) - 1)


def _rounded(length: int) -> int:
  return -(-length // _LANES) * _LANES


def _padded(x: Float[Array, "U C n heads H"]) -> Array:
  padding = _rounded(x.shape[2]) - x.shape[2]
  return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))


def _block(length: int) -> int:
  return next(block for block in _BLOCKS if length % block == 0)
