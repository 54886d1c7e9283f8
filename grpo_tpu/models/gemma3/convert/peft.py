"""Writes adapters as `peft` reads them, for transformers' Gemma 3.

References:
  The file format: https://github.com/huggingface/peft
"""

import json
import pathlib

import jax
import numpy as np
from safetensors import numpy as safetensors

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3 import lora as loras
from grpo_tpu.models.settings import LoraConfig

_PROJECTOR = "multi_modal_projector.mm_input_projection_weight"


def save(
  config: gemma3_config.ModelConfig,
  lora: LoraConfig,
  adapters: dict,
  directory: str | pathlib.Path,
  *,
  base_model: str = "",
) -> None:
  """Writes the adapters to a folder.

  `PeftModel.from_pretrained` loads them onto `Gemma3ForCausalLM` of a text size
  and `Gemma3ForConditionalGeneration` of one with an image tower. There the
  projector is not a linear layer but a parameter, which peft 0.17 and later can
  adapt. This process must hold the arrays whole. `base_model` is the name or
  path of the model that the adapters belong to.
  """
  prefix = "model.language_model." if config.vision else "model."
  tensors, modules, parameters = {}, [], []
  factors = loras.flatten(jax.device_get(adapters))
  for path in loras.model_targets(config, lora):
    a, b = factors[path]["lora_a"], factors[path]["lora_b"]
    if path.startswith("layers/"):
      names = [
        name.removeprefix("text.layers.{}.").removesuffix(".weight")
        for name in leaves.LEAVES[path].huggingface
      ]
      modules += names
      tensors |= _layer_tensors(f"{prefix}layers", names, lora.rank, a, b)
    else:
      parameters.append(_PROJECTOR)
      module, _, _ = f"model.{_PROJECTOR}".rpartition(".")
      # A parameter is [in, out], as in our tree; a linear layer is [out, in].
      tensors |= _tensors(module, b.T, a.T)
  folder = pathlib.Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.save_file(
    tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
  )
  settings = _peft_config(lora, base_model, prefix, modules, parameters)
  (folder / "adapter_config.json").write_text(
    json.dumps(settings, indent=2) + "\n"
  )


def _layer_tensors(
  prefix: str, names: list[str], rank: int, a: np.ndarray, b: np.ndarray
) -> dict[str, np.ndarray]:
  """Tensors of a weight, which may be several modules, in all layers."""
  tensors = {}
  for layer, (a_layer, b_layer) in enumerate(zip(a, b, strict=True)):
    if len(names) == 1:
      a_layer, b_layer = a_layer[None], b_layer[None]
    for name, x, y in zip(names, a_layer, b_layer, strict=True):
      module = f"{prefix}.{layer}.{name}"
      tensors |= _tensors(module, x.reshape(-1, rank), y.reshape(rank, -1))
  return tensors


def _tensors(
  module: str, a: np.ndarray, b: np.ndarray
) -> dict[str, np.ndarray]:
  """Factors `[in, rank]` and `[rank, out]` with peft's names and axes."""
  name = f"base_model.model.{module}"
  return {
    f"{name}.lora_A.weight": np.ascontiguousarray(a.T),
    f"{name}.lora_B.weight": np.ascontiguousarray(b.T),
  }


def _peft_config(
  lora: LoraConfig,
  base_model: str,
  prefix: str,
  modules: list[str],
  parameters: list[str],
) -> dict:
  names = "|".join(modules).replace(".", r"\.")
  layers = prefix.replace(".", r"\.") + r"layers\.\d+"
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
    # A pattern of whole names, because the image tower has a q_proj too.
    "target_modules": rf"{layers}\.({names})" if modules else [],
    "target_parameters": parameters or None,
  }
