"""Low-rank adapters: a small tree that is trained beside a frozen one.

A weight `W` acts as `W + alpha / rank * A B`, by two thin products beside the
frozen one. The sum itself is only made where one tree must hold the whole
model: in bf16 it would lose a small change of a large weight. Without its
adapters the policy is what it started from, so the reference is the frozen tree
and no copy. That tree may have adapters of its own, from an earlier run.

Stacked matrices that share an input (keys and values, gate and up) have an
adapter each, as the separate matrices of other implementations do.

References:
  Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models"
  (arXiv:2106.09685)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from data_pipelines.validation import require
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves, weights
from grpo_tpu.models.settings import LoraConfig

# Axes of stacked weights: layers, and matrices side by side within a layer.
_STACKED = "ln"
# Paths of the weights that may have an adapter, by `settings.LORA_TARGETS`.
TARGETS = {
  "q": "layers/attn/q_einsum",
  "kv": "layers/attn/kv_einsum",
  "output": "layers/attn/attn_vec_einsum",
  "gating": "layers/mlp/gating_einsum",
  "linear": "layers/mlp/linear",
  "projector": "embedder/mm_input_projection",
}
# The head of a reward model is not adapted but trained whole, beside them.
HEAD = "score/w"


class AdaptedWeight(NamedTuple):
  """A frozen weight with its adapter, in a tree in place of the weight."""

  weight: "Array | AdaptedWeight"  # It may have an adapter already.
  a: Array  # The stacked and summed axes, then the rank.
  b: Array  # The stacked axes, the rank, then the others; includes the scale.


def einsum(equation: str, x: Array, weight: Array | AdaptedWeight) -> Array:
  """`jnp.einsum` of activations and a weight that may have an adapter.

  The products have the type of `x`. In the equation of two terms, `n` is the
  axis of stacked matrices.
  """
  if not isinstance(weight, AdaptedWeight):
    return jnp.einsum(equation, x, weight.astype(x.dtype))
  y = einsum(equation, x, weight.weight)
  terms, result = equation.split("->")
  x_axes, axes = terms.split(",")
  summed = "".join(axis for axis in axes if axis not in result)
  a_axes, b_axes = _factor_axes(axes, summed)
  new = set(axes) - set(summed) - set(_STACKED)
  thin = "".join(axis for axis in result if axis not in new) + "r"
  low = jnp.einsum(f"{x_axes},{a_axes}->{thin}", x, weight.a.astype(x.dtype))
  return y + jnp.einsum(
    f"{thin},{b_axes}->{result}", low, weight.b.astype(x.dtype)
  )


def abstract_adapters(
  config: gemma3_config.ModelConfig, lora: LoraConfig
) -> dict:
  """Shapes of the adapters: `lora_a` and `lora_b` under each weight's path.

  A reward model's head stands beside them, whole.

  Raises:
    ValueError: If the model has none of the targets.
  """
  params = leaves.by_path(
    weights.abstract_params(config, jnp.dtype(jnp.float32))
  )
  tree, given = {}, [TARGETS[x] for x in TARGETS if x in lora.targets]
  paths = [path for path in given if path in params]
  require(
    bool(paths),
    "model.lora.targets",
    lora.targets,
    "name a weight of the model; one without a tower has no projector",
    "set model.lora.targets=('q', 'kv', 'output', 'gating', 'linear')",
  )
  for path in paths:
    leaf = leaves.LEAVES[path]
    sizes = leaf.sizes(params[path].shape) | {"r": lora.rank}
    factors = _factor_axes(leaf.axes, leaf.summed)
    for name, axes in zip(("lora_a", "lora_b"), factors, strict=True):
      shape = tuple(sizes[axis] for axis in axes)
      tree[f"{path}/{name}"] = jax.ShapeDtypeStruct(shape, jnp.float32)
  if HEAD in params:
    tree[HEAD] = params[HEAD]
  return traverse_util.unflatten_dict(tree, sep="/")


def initial_adapters(
  config: gemma3_config.ModelConfig, lora: LoraConfig, seed: int
) -> dict:
  """Adapters that change nothing yet, as NumPy arrays in fp32.

  `A` is normal, drawn from its path and the seed; its variance is one over the
  number of terms that a product with it sums. `B` is zero, and so is a head.
  """
  tree, abstract = {}, abstract_adapters(config, lora)
  for path, factors in flatten(abstract).items():
    leaf, shape = leaves.LEAVES[path], factors["lora_a"].shape
    a_axes, _ = _factor_axes(leaf.axes, leaf.summed)
    std = leaf.fan_in(dict(zip(a_axes, shape, strict=True))) ** -0.5
    rng = np.random.default_rng([seed, *f"{path}/lora_a".encode()])
    a = rng.standard_normal(shape, np.float32) * np.float32(std)
    b = np.zeros(factors["lora_b"].shape, np.float32)
    tree[path] = {"lora_a": a, "lora_b": b}
  if config.has_score:
    tree[HEAD] = np.zeros(abstract["score"]["w"].shape, np.float32)
  return traverse_util.unflatten_dict(tree, sep="/")


def with_adapters(params: dict, adapters: dict, lora: LoraConfig) -> dict:
  """The parameters with `AdaptedWeight`s in them, as the network runs them.

  A head among the adapters takes the place of that of the parameters, if any.
  Only the second factors are copied, to include the scale. The gradient flows
  to the adapters, and to `params` if asked for.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
  for path, factors in flatten(adapters).items():
    flat[path] = AdaptedWeight(
      flat[path], factors["lora_a"], factors["lora_b"] * lora.scale
    )
  if "score" in adapters:
    flat[HEAD] = adapters["score"]["w"]
  return traverse_util.unflatten_dict(flat, sep="/")


def merge_adapters(params: dict) -> dict:
  """Merges the adapters of a tree into its weights; see `with_adapters`.

  Sums are made in fp32 and rounded once, to the frozen weight's own type: in
  bf16 a small change of a large weight may be lost.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
  for path, weight in flat.items():
    flat[path] = _sum(weight, leaves.LEAVES[path])
  return traverse_util.unflatten_dict(flat, sep="/")


def _sum(weight: Array | AdaptedWeight, leaf: leaves.Leaf) -> Array:
  """A weight with the products of all its adapters, in its own type."""
  adapters = []
  while isinstance(weight, AdaptedWeight):
    adapters.append((weight.a, weight.b))
    weight = weight.weight
  a_axes, b_axes = _factor_axes(leaf.axes, leaf.summed)
  equation = f"{a_axes},{b_axes}->{leaf.axes}"
  total = weight.astype(jnp.float32)
  for a, b in reversed(adapters):
    total += jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
  return total.astype(weight.dtype)


def _factor_axes(axes: str, summed: str) -> tuple[str, str]:
  """The axes of `A` and `B`, with `r` for the rank."""
  stacked = "".join(axis for axis in axes if axis in _STACKED)
  others = "".join(axis for axis in axes if axis not in _STACKED + summed)
  return f"{stacked}{summed}r", f"{stacked}r{others}"


def flatten(adapters: dict) -> dict[str, Any]:
  """The two factors `lora_a` and `lora_b` by the path of their weight."""
  flat = traverse_util.flatten_dict(
    adapters, sep="/", is_leaf=lambda _, node: "lora_a" in node
  )
  return {path: factors for path, factors in flat.items() if path != HEAD}
