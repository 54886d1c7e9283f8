"""Operations counted from a jaxpr equal formulas worked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import splash, text, weights
from grpo_tpu.planning import flops

A, B, C = 3, 5, 7
LEFT, RIGHT = jnp.ones((A, B)), jnp.ones((B, C))
PRODUCT = 2 * A * B * C


def count(fun, *args):
  return flops.count_jaxpr(jax.make_jaxpr(fun)(*args))


def test_a_product_counts_two_for_each_multiply_add():
  assert count(jnp.matmul, LEFT, RIGHT) == PRODUCT


def test_a_batch_of_products_counts_each():
  batch = jnp.ones((11, A, B)), jnp.ones((11, B, C))
  assert count(jnp.matmul, *batch) == 11 * PRODUCT


def test_the_gradient_costs_two_products_more():
  def loss(left, right):
    return jnp.sum(jnp.square(left @ right))

  counted = count(jax.grad(loss, argnums=(0, 1)), LEFT, RIGHT)
  assert counted == 3 * PRODUCT


def test_dead_code_counts_nothing():
  def dead(left, right):
    _ = left @ right
    return left

  assert count(dead, LEFT, RIGHT) == 0
  assert count(jax.jit(dead), LEFT, RIGHT) == 0


def test_a_loop_counts_each_of_its_trips():
  def loop(left, square):
    return jax.lax.scan(lambda x, _: (x @ square, None), left, length=13)[0]

  square = jnp.ones((B, B))
  assert count(loop, LEFT, square) == 13 * 2 * A * B * B


def test_a_loop_of_unknown_length_counts_the_given_trips():
  def loop(left, square):
    return jax.lax.while_loop(
      lambda x: jnp.all(x < 9), lambda x: x @ square, left
    )

  jaxpr = jax.make_jaxpr(loop)(LEFT, jnp.ones((B, B)))
  assert flops.count_jaxpr(jaxpr, while_trips=(4,)) == 4 * 2 * A * B * B
  with pytest.raises(NotImplementedError, match="trips"):
    flops.count_jaxpr(jaxpr)


def test_recomputing_counts_again():
  def loss(left, right):
    return jnp.sum(jnp.sin(jnp.sin(left @ right) @ right.T))

  plain = count(jax.value_and_grad(loss), LEFT, RIGHT)
  again = count(jax.value_and_grad(jax.checkpoint(loss)), LEFT, RIGHT)
  assert plain == 4 * PRODUCT
  # Both products; what the backward pass alone would need is not counted twice.
  assert again == 6 * PRODUCT


def test_each_device_of_a_shard_map_counts():
  mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
  product = jax.shard_map(
    jnp.matmul, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x")
  )
  assert count(product, jnp.ones((4 * A, B)), RIGHT) == 4 * PRODUCT


def test_an_automatic_axis_is_not_counted_again():
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
  product = jax.shard_map(
    jnp.matmul,
    mesh=mesh,
    in_specs=(P("x"), P()),
    out_specs=P("x"),
    axis_names={"x"},
    check_vma=False,
  )
  assert count(product, jnp.ones((2 * A, B)), RIGHT) == 2 * PRODUCT


def test_a_convolution_counts_its_kernel_at_each_output():
  counted = count(
    lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID"),
    jnp.ones((2, 3, 8, 8)),
    jnp.ones((4, 3, 5, 5)),
  )
  assert counted == 2 * (2 * 4 * 4 * 4) * (3 * 5 * 5)


def test_splash_attention_counts_the_tiles_of_its_grid():
  """One global layer of 256 prompt tokens: 2, 3 and 4 products of all pairs."""
  shape = jax.ShapeDtypeStruct
  q = shape((2, 1, 256, 4, 128), jnp.float32)
  k = shape((2, 1, 256, 2, 128), jnp.float32)

  def loss(q, k, v, length, block):
    return jnp.sum(
      splash.attend(
        q,
        k,
        v,
        length,
        block,
        window=256,
        soft_tokens=0,
        is_global=jnp.array(True),
        prompt=None,
        interpret=False,
      )
    )

  rest = shape((2,), jnp.int32), shape((2, 256), jnp.int32)
  product = 2 * (2 * 4) * 256 * 256 * 128
  assert count(loss, q, k, k, *rest) == 2 * product
  backward = jax.grad(loss, argnums=(0, 1, 2))
  # For each query also the output times its gradient.
  scalars = 2 * (2 * 4) * 256 * 128
  assert count(backward, q, k, k, *rest) == (2 + 3 + 4) * product + scalars


def test_a_bundle_costs_what_the_formula_says():
  """Weights times all tokens of prompt and completions, and attention."""
  config = dataclasses.replace(gemma3_config.CONFIGS["tiny"], vision=None)
  params = weights.abstract_params(config, jnp.dtype(jnp.float32))
  u, c, p, t = 2, 3, 16, 8
  counted = count(
    lambda params, *batch: text.bundle_states(
      config, params, *batch, dtype=jnp.dtype(jnp.float32), remat="none"
    ),
    params,
    jnp.zeros((u, p), jnp.int32),
    jnp.zeros((u,), jnp.int32),
    jnp.zeros((u, 0, 1, 1, 3), jnp.uint8),
    jnp.zeros((u, c, t), jnp.int32),
  )
  names = ("q_einsum", "kv_einsum", "attn_vec_einsum")
  matrices = [params["layers"]["attn"][name] for name in names]
  matrices += [
    params["layers"]["mlp"][name] for name in params["layers"]["mlp"]
  ]
  size = sum(int(np.prod(x.shape)) for x in matrices)
  pairs = p * p + c * t * (p + t)
  heads = config.num_layers * config.num_heads * config.head_dim
  assert counted == 2 * size * u * (p + c * t) + 4 * heads * u * pairs
