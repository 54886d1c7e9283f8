"""Attention by JAX's splash kernel for TPUs, which never holds the scores.

When it is compiled, the kernel needs to know which blocks of keys each query
may see. The rest of the mask is a function of a key's index and of an integer
code that each query brings. The rows of a batch differ in the lengths of their
prompts and the positions of their images: the codes hold those, and the blocks
are all that some row may need. The backward pass is the kernel's own.

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

_LANES = 128  # The kernel takes sequences in multiples of this.
_BLOCKS = (512, 256, 128)
_BITS = 15  # Two lengths and a sign fit in 32 bits.
_LONGEST = 2**_BITS


class _RowMask(masks.NumpyMask):
  """A mask that is complete only together with the codes of a row's queries.

  The kernel skips blocks in which the array has no True, and applies the
  function in all others.

  Attributes:
    mask_function: Maps a query's code and a key's index to True if it sees it.
    q_sequence: Placeholder for the codes, which differ from row to row.
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
  """`attention.attend` by the kernel, or off TPUs by its interpreter.

  The arguments are those of `attention.attend` and `attention.AttentionSpec`,
  whose `local_window` is `window` here. `image_block` is needed without
  `prompt`.
  """
  length = q.shape[2]
  q, k, v = (_pad(x) for x in (q, k, v))
  index = jnp.arange(q.shape[2])[None]
  num_prompt = 0
  if prompt is None:
    assert image_block is not None
    code = _prompt_codes(index, image_block)
  else:
    k, v, num_prompt = _prepend_prompt(k, v, prompt)
    code = _pack(index, prompt_length[:, None])
  longest = max(q.shape[2], num_prompt)
  if longest > _LONGEST:
    raise ValueError(
      f"prompts and completions ({longest} tokens) must have at most "
      f"{_LONGEST} tokens for splash attention; set model.attention=einsum."
    )
  code = jnp.broadcast_to(code[:, None], q.shape[:3])

  def layer(window: int):
    if prompt is None:
      mask = _prompt_mask(q.shape[2], soft_tokens, window)
    else:
      mask = _completion_mask(num_prompt, q.shape[2], window)
    return _on_mesh(
      lambda *parts: _run_kernel(mask, *parts, interpret=interpret)
    )

  # Two kernels, of which one runs: blocks beyond the window are skipped.
  out = jax.lax.cond(
    is_global, layer(_LONGEST * 2), layer(window), q, k, v, code
  )
  return out[:, :, :length]


def _prompt_codes(index: Array, image_block: Array) -> Array:
  """Codes of prompt tokens: their index and that of the last key they see."""
  padding = index.shape[1] - image_block.shape[1]
  last = jnp.pad(_last_of_block(image_block), ((0, 0), (0, padding)))
  # Padding sees itself, because a query must see something.
  return _pack(index, jnp.maximum(last, index))


def _prepend_prompt(k, v, prompt) -> tuple[Array, Array, int]:
  """Keys and values with the prompt's in front, and its padded length."""
  prompt_k, prompt_v = (
    jnp.broadcast_to(
      _pad(x[:, None]),
      (*k.shape[:2], _round_up(x.shape[1]), *x.shape[2:]),
    )
    for x in prompt
  )
  k = jnp.concatenate([prompt_k, k], axis=2)
  v = jnp.concatenate([prompt_v, v], axis=2)
  return k, v, prompt_k.shape[2]


def _prompt_mask(num_prompt: int, soft_tokens: int, window: int) -> _RowMask:
  """Mask of prompts; codes are those of `_prompt_codes`."""

  def sees(code, key):
    query, last = _unpack(code)
    return (key <= last) & (query - key < window)

  distance = np.subtract.outer(np.arange(num_prompt), np.arange(num_prompt))
  return _RowMask((distance > -max(soft_tokens, 1)) & (distance < window), sees)


def _completion_mask(num_prompt: int, num_own: int, window: int) -> _RowMask:
  """Mask of completions; codes hold a query's index and its prompt's length.

  Keys are those of the prompt with their padding, then those of the row.
  """

  def sees(code, key):
    query, prompt_length = _unpack(code)
    to_prompt = (key < prompt_length) & (query + prompt_length - key < window)
    distance = query + num_prompt - key
    own = (key >= num_prompt) & (distance >= 0) & (distance < window)
    return to_prompt | own

  query = np.arange(num_own)[:, None]
  distance = query - np.arange(num_own)[None, :]
  # The nearest prompt token is the last one, at a distance of query + 1.
  to_prompt = np.broadcast_to(query + 1 < window, (num_own, num_prompt))
  own = (distance >= 0) & (distance < window)
  return _RowMask(np.concatenate([to_prompt, own], axis=1), sees)


def _run_kernel(
  mask: _RowMask,
  q: Float[Array, "U C t Q H"],
  k: Float[Array, "U C s K H"],
  v: Float[Array, "U C s K H"],
  code: Int[Array, "U C t"],
  *,
  interpret: bool,
) -> Float[Array, "U C t Q H"]:
  """Runs the kernel on each row, with the heads of one device."""
  block_q, block_kv = (_block(n) for n in mask.shape)
  kernel = kernels.make_splash_mha(
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

  def attend_row(q, k, v, code):
    infos, kwargs = kernel.tree_flatten()
    coded = kernels.SplashAttentionKernel(
      *(info._replace(q_sequence=code) for info in infos if info), **kwargs
    )
    heads_first = (x.swapaxes(0, 1) for x in (q, k, v))
    out = coded(*heads_first)
    assert not isinstance(out, tuple)  # It would be with `save_residuals`.
    return out.swapaxes(0, 1)

  return jax.vmap(jax.vmap(attend_row))(q, k, v, code)


def _on_mesh(function: Callable) -> Callable:
  """Lets each device compute its own bundles and heads, if there is a mesh.

  The compiler cannot partition a kernel by itself.
  """

  def per_device(q, k, v, code):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
      return function(q, k, v, code)
    tensor, kv_heads = mesh.shape["tensor"], k.shape[3]
    # Heads that cannot be split together with their keys run on all devices.
    kv_axis = "tensor" if kv_heads % tensor == 0 else None
    is_shared = kv_heads == 1 and q.shape[3] % tensor == 0
    q_axis = "tensor" if is_shared else kv_axis
    batch = sharding.BATCH[0]
    q_spec = P(batch, None, None, q_axis)
    kv_spec = P(batch, None, None, kv_axis)
    return jax.shard_map(
      function,
      in_specs=(q_spec, kv_spec, kv_spec, P(batch)),
      out_specs=q_spec,
      check_vma=False,
    )(q, k, v, code)

  return per_device


def _last_of_block(image_block: Int[Array, "U P"]) -> Int[Array, "U P"]:
  """Index of the last token of each token's image; its own index for text."""
  index = jnp.arange(image_block.shape[1])[None]
  following = jnp.pad(image_block[:, 1:], ((0, 0), (0, 1)))
  ends = (image_block != following) | (image_block == 0)
  return jax.lax.cummin(
    jnp.where(ends, index, image_block.shape[1]), axis=1, reverse=True
  )


def _pack(a: Array, b: Array) -> Array:
  return (a << _BITS + 1) | b


def _unpack(code):
  return code >> _BITS + 1, code & (2 ** (_BITS + 1) - 1)


def _round_up(length: int) -> int:
  return -(-length // _LANES) * _LANES


def _pad(x: Float[Array, "U C n heads H"]) -> Array:
  padding = _round_up(x.shape[2]) - x.shape[2]
  return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))


def _block(length: int) -> int:
  return next(block for block in _BLOCKS if length % block == 0)
