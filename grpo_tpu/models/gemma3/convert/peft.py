"""Reads and writes the adapters of `peft`, for transformers' Gemma 3.

In a model with an image tower the projector is not a linear layer but a
parameter, which peft 0.17 and later can adapt.

References:
  The file format: https://github.com/huggingface/peft
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from absl import logging

from data_pipelines.text import untrusted
from data_pipelines.validation import printable, require
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3 import lora as loras
from grpo_tpu.models.gemma3.convert import assembly, huggingface
from grpo_tpu.models.gemma3.convert import huggingface_names as names
from grpo_tpu.models.settings import LORA_TARGETS, LoraConfig

_TENSORS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_ROOT, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
_MAX_RANK = 2**20
# Fields that say nothing about the product of the factors. Any other must be
# absent, null, false or empty.
_FREE = frozenset(
  "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out "
  "inference_mode init_lora_weights layers_pattern layers_to_transform "
  "lora_alpha lora_dropout megatron_core peft_type peft_version "
  "qalora_group_size r revision runtime_config target_modules "
  "target_parameters task_type".split()
)
# Initial values that change the base model too.
_SPOIL_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class _Module:
  """A matrix with an adapter, which may be a part of one of our leaves."""

  name: str  # As `huggingface_names.common_name` gives it.
  path: str  # The leaf.
  index: tuple[int, ...]  # In the leaf's stacked axes.

  @property
  def is_parameter(self) -> bool:
    """True if peft sees no linear layer but a parameter, `[in, out]`."""
    return self.name.startswith("projector.")

  @property
  def key(self) -> str:
    """The common part of the names of its factors in a file."""
    return "projector" if self.is_parameter else self.name

  def factors(self, leaf: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Views of the leaf's factors with the file's axes, by `_ENDS`."""
    a, b = leaf["lora_a"][self.index], leaf["lora_b"][self.index]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)
    # A parameter is [in, out], as in our tree; a linear layer is [out, in].
    pair = (b, a) if self.is_parameter else (a.T, b.T)
    return dict(zip(_ENDS, pair, strict=True))


def _modules(
  config: gemma3_config.ModelConfig, lora: LoraConfig
) -> Iterator[_Module]:
  adapters = loras.flatten(loras.abstract_adapters(config, lora))
  for path, factors in adapters.items():
    leaf = leaves.LEAVES[path]
    for index in np.ndindex(*factors["lora_a"].shape[: leaf.num_stacked]):
      name = leaf.tensor("huggingface", index).removesuffix(".weight")
      yield _Module(name, path, index)


def save(
  config: gemma3_config.ModelConfig,
  lora: LoraConfig,
  adapters: dict,
  directory: str | pathlib.Path,
  *,
  base_model: str = "",
  files: Mapping[str, Any] | None = None,
) -> None:
  """Writes the adapters to a folder.

  `PeftModel.from_pretrained` loads them onto `Gemma3ForCausalLM` of a text size
  and `Gemma3ForConditionalGeneration` of one with an image tower. This process
  must hold the arrays whole. `base_model` is the name or path of the model that
  the adapters belong to; `files` are those of `huggingface.save`.
  """
  text = "model.language_model" if config.vision else "model"
  prefixes = {"text": text, "projector": "model.multi_modal_projector"}
  arrays, tensors = loras.flatten(jax.device_get(adapters)), {}
  modules = list(_modules(config, lora))
  for module in modules:
    kind, dot, rest = module.key.partition(".")
    for end, values in module.factors(arrays[module.path]).items():
      name = f"{_ROOT}{prefixes[kind]}{dot}{rest}{end}"
      tensors[name] = np.ascontiguousarray(values)
  unfinished = huggingface.make_unfinished(directory)
  safetensors.numpy.save_file(
    tensors, unfinished / _TENSORS, metadata={"format": "pt"}
  )
  settings = _peft_config(lora, base_model, text, modules)
  huggingface.finish(unfinished, {**(files or {}), _SETTINGS: settings})


def _peft_config(
  lora: LoraConfig, base_model: str, text: str, modules: Sequence[_Module]
) -> dict[str, Any]:
  linear = dict.fromkeys(
    x.name.split(".", 3)[3] for x in modules if not x.is_parameter
  )
  # A pattern of whole names, because the image tower has a q_proj too.
  layer, kinds = (
    x.replace(".", r"\.") for x in (f"{text}.layers.", "|".join(linear))
  )
  parameters = [x.name for x in modules if x.is_parameter]
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "inference_mode": True,
    "r": lora.rank,
    "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": rf"{layer}\d+\.({kinds})" if linear else [],
    "target_parameters": [f"multi_modal_{x}" for x in parameters] or None,
  }


def check(
  config: gemma3_config.ModelConfig, lora: LoraConfig
) -> dict[str, huggingface.Tensor]:
  """The tensors of the adapter that `model.lora.init` names, by our names.

  Raises:
    ValueError: The folder holds no adapter that can be trained, or one of other
      settings; the message has the settings to use.
  """
  folder = pathlib.Path(lora.init.removeprefix("peft:"))
  try:
    rank, alpha = _read_settings(folder / _SETTINGS)
    found = {
      names.common_name(x.name.removeprefix(_ROOT)): x
      for x in huggingface.read_headers(folder / _TENSORS)
    }
    targets = _check_tensors(
      config, LoraConfig(rank, alpha, LORA_TARGETS, ""), found
    )
  except (OSError, ValueError) as error:
    raise ValueError(
      f"model.lora.init ({lora.init!r}) must be a folder with a LoRA adapter "
      f"of peft for this model, {_SETTINGS} and {_TENSORS}: {error}"
    ) from error
  wanted = {"rank": rank, "alpha": alpha, "targets": targets}
  given = dataclasses.asdict(lora)
  given["targets"] = tuple(x for x in LORA_TARGETS if x in lora.targets)
  changes = [
    f"model.lora.{name}={value}"
    for name, value in wanted.items()
    if given[name] != value
  ]
  require(
    not changes,
    "model.lora.init",
    lora.init,
    "have the settings of model.lora",
    f"set {' and '.join(changes)}",
  )
  return found


def load(
  config: gemma3_config.ModelConfig, lora: LoraConfig, initial: dict
) -> dict:
  """The adapters that `model.lora.init` names, as NumPy arrays in fp32.

  A matrix that the folder lacks, as keys where peft adapted queries and values
  alone, keeps the factors of `initial`, which is filled in place.

  Raises:
    ValueError: As in `check`, or a factor is not finite.
  """
  found, arrays = check(config, lora), loras.flatten(initial)
  modules, missing = list(_modules(config, lora)), 0
  for module in modules:
    tensors = {end: found.get(module.key + end) for end in _ENDS}
    missing += None in tensors.values()
    for end, values in module.factors(arrays[module.path]).items():
      if tensor := tensors[end]:
        values[...] = tensor.read((slice(None), slice(None)))
        require(
          bool(np.isfinite(values).all()),
          "model.lora.init",
          lora.init,
          f"hold finite numbers, but {printable(tensor.name)} does not",
          "give another adapter",
        )
  logging.info(
    "Read the adapters of %s; %d of %d matrices have none there and get new "
    "ones.",
    *(lora.init, missing, len(modules)),
  )
  return initial


def _read_settings(path: pathlib.Path) -> tuple[int, float]:
  """Rank and alpha, if the rest asks for nothing but the factors' product."""
  settings = untrusted.read_json(path)
  only = {"peft_type": "LORA", "bias": "none"}
  faults = [
    f"{printable(name)} ({untrusted.shorten(value)}) must be "
    f"{only.get(name, 'absent or off')!r}"
    for name, value in settings.items()
    if (value != only[name] if name in only else value and name not in _FREE)
  ]
  initial = settings.get("init_lora_weights")
  if isinstance(initial, str) and initial.startswith(_SPOIL_BASE):
    faults.append(
      f"init_lora_weights ({untrusted.shorten(initial)}) has changed the base "
      "model too; save it in peft with path_initial_model_for_weight_conversion"
    )
  rank = untrusted.get_field(settings, "r", int, str(path))
  alpha = untrusted.get_field(settings, "lora_alpha", float, str(path))
  if not 1 <= rank <= _MAX_RANK or alpha <= 0:
    shown = untrusted.shorten((rank, alpha))
    faults.append(f"r and lora_alpha {shown} must be above 0")
  if faults:
    raise ValueError(f"{path.name}: {'; '.join(faults)}.")
  return rank, float(alpha)


def _check_tensors(
  config: gemma3_config.ModelConfig,
  everything: LoraConfig,
  found: Mapping[str, huggingface.Tensor],
) -> tuple[str, ...]:
  """Checks names and shapes; returns the targets that have an adapter."""
  shapes = {
    path: {x: np.broadcast_to(np.float32(0), y.shape) for x, y in each.items()}
    for path, each in loras.flatten(
      loras.abstract_adapters(config, everything)
    ).items()
  }
  wanted, paths = {}, set()
  for module in _modules(config, everything):
    if any(module.key + end in found for end in _ENDS):
      paths.add(module.path)
      for end, values in module.factors(shapes[module.path]).items():
        wanted[module.key + end] = values.shape
  assembly.check_tensors(
    {name: x.shape for name, x in found.items()},
    wanted or {"text.layers.0.self_attn.q_proj.lora_A.weight": ()},
    _TENSORS,
    faults=huggingface.type_faults(found),
    remedy="Give an adapter of the decoder's linear layers and the projector.",
  )
  return tuple(x for x in LORA_TARGETS if loras.TARGETS[x] in paths)
