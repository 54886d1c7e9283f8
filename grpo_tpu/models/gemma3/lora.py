"""Low-rank adapters: a small tree that is trained beside a frozen one.

A weight `W` runs as `W + alpha / rank * A B`, as two thin products beside the
frozen one, so that the sum is made for export alone. Switched off, the policy
is what it started from: the reference is the frozen tree and no copy of it.

Stacked matrices that share an input (keys and values, gate and up) have an
adapter each, as the separate matrices of other implementations do.

References:
  Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models"
  (arXiv:2106.09685); the file format of https://github.com/huggingface/peft
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.models.settings import LoraConfig

# Axes of stacked weights: layers, and matrices side by side within a layer.
_STACKED = "ln"


class _Target(NamedTuple):
  """A weight that may have an adapter.

  Attributes:
    path: Where it stands in the tree of `weights`.
    axes: A letter for each of its axes.
    summed: Those that a product with it sums.
    modules: Its names in transformers, within a layer; one for each matrix
      side by side.
  """

  path: tuple[str, ...]
  axes: str
  summed: str
  modules: tuple[str, ...]


_PROJECTOR = "multi_modal_projector.mm_input_projection_weight"
# The keys are `settings.LORA_TARGETS`.
_TARGETS = {
  "q": _Target(
    ("layers", "attn", "q_einsum"), "lqdh", "d", ("self_attn.q_proj",)
  ),
  "kv": _Target(
    ("layers", "attn", "kv_einsum"),
    "lnkdh",
    "d",
    ("self_attn.k_proj", "self_attn.v_proj"),
  ),
  "output": _Target(
    ("layers", "attn", "attn_vec_einsum"), "lqhd", "qh", ("self_attn.o_proj",)
  ),
  "gating": _Target(
    ("layers", "mlp", "gating_einsum"),
    "lnfd",
    "d",
    ("mlp.gate_proj", "mlp.up_proj"),
  ),
  "linear": _Target(
    ("layers", "mlp", "linear"), "lfd", "f", ("mlp.down_proj",)
  ),
  "projector": _Target(("embedder", "mm_input_projection"), "wd", "w", ()),
}


class AdaptedWeight(NamedTuple):
  """A frozen weight and its factors, in the place of the weight.

  Attributes:
    weight: As in the tree of `weights`.
    a: Its stacked and summed axes, then the rank.
    b: Its stacked axes, the rank, then the others; the scale is in it.
  """

  weight: Array
  a: Array
  b: Array


def einsum(equation: str, x: Array, weight: Array | AdaptedWeight) -> Array:
  """`jnp.einsum` of activations and a weight that may have an adapter.

  Args:
    equation: Of two terms. The letter `n` is for matrices side by side.
    x: Activations; their type is that of the products.
    weight: Cast to the type of `x`.
  """
  if not isinstance(weight, AdaptedWeight):
    return jnp.einsum(equation, x, weight.astype(x.dtype))
  y = jnp.einsum(equation, x, weight.weight.astype(x.dtype))
  terms, result = equation.split("->")
  x_axes, axes = terms.split(",")
  summed = "".join(axis for axis in axes if axis not in result)
  a_axes, b_axes = _factor_axes(axes, summed)
  made = set(axes) - set(summed) - set(_STACKED)
  thin = "".join(axis for axis in result if axis not in made) + "r"
  low = jnp.einsum(f"{x_axes},{a_axes}->{thin}", x, weight.a.astype(x.dtype))
  return y + jnp.einsum(
    f"{thin},{b_axes}->{result}", low, weight.b.astype(x.dtype)
  )


def abstract_adapters(
  config: gemma3_config.ModelConfig, lora: LoraConfig
) -> dict:
  """The adapters' tree as shapes: `lora_a` and `lora_b` under a weight's path.

  Raises:
    ValueError: None of the targets is part of the model.
  """
  params = weights.abstract_params(config, jnp.dtype(jnp.float32))
  tree: dict[str, Any] = {}
  for target in _targets(config, lora):
    shape = _at(params, target.path).shape
    sizes = dict(zip(target.axes, shape, strict=True)) | {"r": lora.rank}
    *parents, name = target.path
    parent = tree
    for part in parents:
      parent = parent.setdefault(part, {})
    parent[name] = {
      key: jax.ShapeDtypeStruct(
        tuple(sizes[axis] for axis in axes), jnp.float32
      )
      for key, axes in zip(
        ("lora_a", "lora_b"),
        _factor_axes(target.axes, target.summed),
        strict=True,
      )
    }
  return tree


def initial_adapters(
  config: gemma3_config.ModelConfig, lora: LoraConfig, seed: int
) -> dict:
  """Adapters that change nothing yet, as NumPy arrays in fp32.

  `A` is normal with variance one over what a product with it sums, drawn from
  its path and the seed; `B` is zero.
  """
  summed_of = {
    "/".join(target.path): (target.axes, target.summed)
    for target in _TARGETS.values()
  }

  def draw(path, shape):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    weight, _, factor = name.rpartition("/")
    if factor == "lora_b":
      return np.zeros(shape.shape, np.float32)
    axes, summed = summed_of[weight]
    a_axes, _ = _factor_axes(axes, summed)
    sizes = dict(zip(a_axes, shape.shape, strict=True))
    std = math.prod(sizes[axis] for axis in summed) ** -0.5
    rng = np.random.default_rng([seed, *name.encode()])
    return rng.standard_normal(shape.shape, np.float32) * np.float32(std)

  return jax.tree_util.tree_map_with_path(draw, abstract_adapters(config, lora))


def with_adapters(params: dict, adapters: dict, lora: LoraConfig) -> dict:
  """The tree with `AdaptedWeight` weights, for all that runs the network.

  Nothing is copied but the second factors, which take the scale in. The
  gradient flows to the adapters, and to `params` if asked for.
  """
  return _over_adapters(
    params,
    adapters,
    lambda weight, factors, _: AdaptedWeight(
      weight, factors["lora_a"], factors["lora_b"] * lora.scale
    ),
  )


def merge_adapters(params: dict, adapters: dict, lora: LoraConfig) -> dict:
  """The plain tree that runs as the adapted one does.

  Sums are made in fp32 and rounded once, to the weight's own type: in bf16 a
  small change of a large weight may be lost.
  """

  def total(weight, factors, target):
    a_axes, b_axes = _factor_axes(target.axes, target.summed)
    change = jnp.einsum(
      f"{a_axes},{b_axes}->{target.axes}",
      factors["lora_a"],
      factors["lora_b"] * lora.scale,
      precision=jax.lax.Precision.HIGHEST,
    )
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)

  return _over_adapters(params, adapters, total)


def to_peft(
  config: gemma3_config.ModelConfig,
  lora: LoraConfig,
  adapters: dict,
  directory: str | pathlib.Path,
  *,
  base_model: str = "",
) -> None:
  """Writes the adapters as `peft` reads them, for transformers' Gemma 3.

  `PeftModel.from_pretrained` loads them onto `Gemma3ForCausalLM` of a text size
  and `Gemma3ForConditionalGeneration` of one with a tower. The projector is no
  linear layer there, but a parameter that peft 0.17 and later can adapt.

  Args:
    config: The model's sizes.
    lora: What the adapters were made with.
    adapters: Of all layers; arrays that this process holds whole.
    directory: Made if missing.
    base_model: Name or path of what the adapters belong to.
  """
  # Of the "export" extra, which training does without.
  from safetensors import numpy as safetensors

  prefix = "model.language_model." if config.vision else "model."
  tensors, modules, parameters = {}, [], []
  for target in _targets(config, lora):
    factors = jax.device_get(_at(adapters, target.path))
    if target.path[0] != "layers":
      parameters.append(_PROJECTOR)
      module, _, _ = f"model.{_PROJECTOR}".rpartition(".")
      # A parameter is [in, out], as ours, where a linear layer's is [out, in].
      tensors |= _peft_tensors(module, factors["lora_b"].T, factors["lora_a"].T)
      continue
    modules += target.modules
    for layer in range(config.num_layers):
      a, b = factors["lora_a"][layer], factors["lora_b"][layer]
      if len(target.modules) == 1:
        a, b = a[None], b[None]
      for name, a_matrix, b_matrix in zip(target.modules, a, b, strict=True):
        tensors |= _peft_tensors(
          f"{prefix}layers.{layer}.{name}",
          a_matrix.reshape(-1, lora.rank),
          b_matrix.reshape(lora.rank, -1),
        )
  names = "|".join(modules).replace(".", r"\.")
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "inference_mode": True,
    "r": lora.rank,
    "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    # A pattern of whole names, for the tower has a q_proj too.
    "target_modules": rf"{prefix.replace('.', r'\.')}layers\.\d+\.({names})"
    if modules
    else [],
    "target_parameters": parameters or None,
  }
  folder = pathlib.Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.save_file(
    tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
  )
  (folder / "adapter_config.json").write_text(
    json.dumps(settings, indent=2) + "\n"
  )


def _peft_tensors(
  module: str, a: np.ndarray, b: np.ndarray
) -> dict[str, np.ndarray]:
  """Factors `[in, rank]` and `[rank, out]` as peft names and turns them."""
  name = f"base_model.model.{module}"
  return {
    f"{name}.lora_A.weight": np.ascontiguousarray(a.T),
    f"{name}.lora_B.weight": np.ascontiguousarray(b.T),
  }


def _targets(
  config: gemma3_config.ModelConfig, lora: LoraConfig
) -> list[_Target]:
  """The targets that the model has, in the order of the table."""
  found = [
    target
    for name, target in _TARGETS.items()
    if name in lora.targets and (config.vision or name != "projector")
  ]
  if not found:
    raise ValueError(
      f"model.lora.targets ({lora.targets!r}) must name a weight that the "
      "model has, and one without a tower has no projector; set "
      "model.lora.targets=('q', 'kv', 'output', 'gating', 'linear')."
    )
  return found


def _factor_axes(axes: str, summed: str) -> tuple[str, str]:
  """The axes of `A` and `B`, with `r` for the rank."""
  stacked = "".join(axis for axis in axes if axis in _STACKED)
  made = "".join(axis for axis in axes if axis not in _STACKED + summed)
  return f"{stacked}{summed}r", f"{stacked}r{made}"


def _at(tree: dict, path: tuple[str, ...]) -> Any:
  for part in path:
    tree = tree[part]
  return tree


def _over_adapters(params: dict, adapters: dict, change) -> dict:
  """A tree like `params` with `change(weight, factors, target)` in places."""

  def replaced(params, adapters, path):
    tree = dict(params)
    for name, below in adapters.items():
      here = (*path, name)
      tree[name] = (
        change(params[name], below, by_path[here])
        if here in by_path
        else replaced(params[name], below, here)
      )
    return tree

  by_path = {target.path: target for target in _TARGETS.values()}
  return replaced(params, adapters, ())
