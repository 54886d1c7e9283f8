"""A Hugging Face `config.json` for Gemma 3, read into our sizes and written.

What a file does not say takes the default of transformers, which released
files rely on; what it says of things that are fixed here is held to what our
arithmetic does. Knows nothing of tensors.

References:
  transformers 5.23, `models/gemma3/configuration_gemma3.py` and
  `models/siglip/configuration_siglip.py`.
"""

import json
import os
import pathlib
from typing import Any

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.models.gemma3 import config as gemma3_config

_TEXT_DEFAULTS = {
  "vocab_size": 262_208,
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}
_VISION_DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 16,
}
_IMAGE_DEFAULTS = {
  "mm_tokens_per_image": 256,
  "boi_token_index": 255_999,
  "eoi_token_index": 256_000,
  "image_token_index": 262_144,
}
# Fields, each with the only values that our arithmetic has; the first is what
# a file without the field means.
_TEXT_RULES = {
  "model_type": ("gemma3_text",),
  "hidden_activation": ("gelu_pytorch_tanh",),
  "rms_norm_eps": (1e-6,),
  "attention_bias": (False,),
  "final_logit_softcapping": (None,),
  "attn_logit_softcapping": (None,),
  "use_bidirectional_attention": (False, None),
  "tie_word_embeddings": (True,),
}
_VISION_RULES = {
  "model_type": ("siglip_vision_model",),
  "hidden_act": ("gelu_pytorch_tanh",),
  "layer_norm_eps": (1e-6,),
  "num_channels": (3,),
}
_TOP_RULES = {"tie_word_embeddings": (True,), "quantization_config": (None,)}
_ARCHITECTURES = ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM")
# Rows after the placeholder's, in the embeddings of the released checkpoints.
_ROWS_FROM_IMAGE_TOKEN = 64


def read(
  directory: str | os.PathLike[str],
) -> gemma3_config.ModelConfig:
  """The sizes that a folder's `config.json` describes.

  Raises:
    ValueError: There is no such file, or it describes a model whose arithmetic
      is not ours; the message names every field at fault.
  """
  path = pathlib.Path(directory) / "config.json"
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror}); give the local folder of a "
      "Hugging Face checkpoint, with config.json and *.safetensors."
    ) from error
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error
  architecture = (values.get("architectures") or [None])[0]
  faults = _faults_of_names(values, architecture)
  if faults:
    raise ValueError(_refusal(path, faults))
  has_vision = architecture == _ARCHITECTURES[0]
  text = values.get("text_config") or {} if has_vision else values
  faults = _broken(text, _TEXT_RULES, "text_config." if has_vision else "")
  faults += _broken(values, _TOP_RULES, "") if has_vision else []
  if has_vision:
    tower = values.get("vision_config") or {}
    faults += _broken(tower, _VISION_RULES, "vision_config.")
  try:
    faults += _faults_of_layers(text) + _faults_of_rope(text)
    if not faults:
      return _model(text, _vision(values) if has_vision else None)
  except (TypeError, ValueError) as error:
    faults.append(str(error))
  raise ValueError(_refusal(path, faults))


def differences(
  directory: str | os.PathLike[str], config: gemma3_config.ModelConfig
) -> list[str]:
  """In words, each size in which a folder's model is not `config`'s.

  The embedding may have more rows than `config` asks for, from the one of the
  image placeholder on, as those of the released checkpoints have.

  Raises:
    ValueError: As `read`.
  """
  found = read(directory)
  theirs, ours = _sizes(found), _sizes(config)
  spare = found.vision is not None and (
    found.vision.image_token == config.vocab_size
  )
  if spare and found.vocab_size > config.vocab_size:
    theirs["vocab_size"] = config.vocab_size
  return [
    f"{name} ({theirs.get(name)}, not {ours.get(name)})"
    for name in sorted(theirs.keys() | ours.keys())
    if theirs.get(name) != ours.get(name)
  ]


def num_rows(config: gemma3_config.ModelConfig) -> int:
  """Rows of the embedding in an export, which holds the placeholder's id too.

  Transformers does without that row, but what serves a model may not.
  """
  if config.vision and config.vision.image_token == config.vocab_size:
    return config.vocab_size + _ROWS_FROM_IMAGE_TOKEN
  return config.vocab_size


def to_json(config: gemma3_config.ModelConfig, dtype: str) -> dict[str, Any]:
  """The `config.json` of a model, in the words of the released checkpoints.

  Args:
    config: The model's sizes.
    dtype: In which whoever loads it should hold it.

  Raises:
    ValueError: The query scale is not that of any `query_pre_attn_scalar`.
  """
  scalar = round(config.query_scale**-2)
  if abs(scalar**-0.5 - config.query_scale) > 1e-6 * config.query_scale:
    raise ValueError(
      f"query_scale ({config.query_scale}) must be one over the root of an "
      "integer, which is how config.json says it."
    )
  text = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": GEMMA3.bos,
    "eos_token_id": list(GEMMA3.stop_ids),
    "final_logit_softcapping": None,
    "head_dim": config.head_dim,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": config.embed_dim,
    "intermediate_size": config.hidden_dim,
    "max_position_embeddings": 131_072 if config.vision else 32_768,
    "model_type": "gemma3_text",
    "num_attention_heads": config.num_heads,
    "num_hidden_layers": config.num_layers,
    "num_key_value_heads": config.num_kv_heads,
    "pad_token_id": GEMMA3.pad,
    "query_pre_attn_scalar": scalar,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": config.local_rope_base,
    "rope_scaling": None
    if config.global_rope_factor == 1.0
    else {"factor": config.global_rope_factor, "rope_type": "linear"},
    "rope_theta": config.global_rope_base,
    "sliding_window": config.sliding_window,
    "sliding_window_pattern": gemma3_config.PERIOD,
    "tie_word_embeddings": True,
    "vocab_size": num_rows(config),
  }
  if not config.vision:
    return text | {
      "architectures": ["Gemma3ForCausalLM"],
      "torch_dtype": dtype,
    }
  tower = config.vision
  return {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": tower.start_of_image,
    "eoi_token_index": tower.end_of_image,
    "image_token_index": tower.image_token,
    "mm_tokens_per_image": tower.soft_tokens,
    "model_type": "gemma3",
    "text_config": text,
    "tie_word_embeddings": True,
    "torch_dtype": dtype,
    "vision_config": {
      "attention_dropout": 0.0,
      "hidden_act": "gelu_pytorch_tanh",
      "hidden_size": tower.width,
      "image_size": tower.image_size,
      "intermediate_size": tower.mlp_dim,
      "layer_norm_eps": 1e-6,
      "model_type": "siglip_vision_model",
      "num_attention_heads": tower.num_heads,
      "num_channels": 3,
      "num_hidden_layers": tower.depth,
      "patch_size": tower.patch_size,
      "vision_use_head": False,
    },
  }


def _refusal(path: pathlib.Path, faults: list[str]) -> str:
  return (
    f"{path} describes a model that this is not: {'; '.join(faults)}. Give a "
    "checkpoint of Gemma 3."
  )


def _faults_of_names(values: dict, architecture: str | None) -> list[str]:
  if architecture not in _ARCHITECTURES:
    return [
      f"architectures ({values.get('architectures')!r}) must be one of "
      f"{', '.join(_ARCHITECTURES)}"
    ]
  wanted = ("gemma3", "gemma3_text")[_ARCHITECTURES.index(architecture)]
  if values.get("model_type", wanted) == wanted:
    return []
  return [f"model_type ({values['model_type']!r}) must be {wanted!r}"]


def _broken(values: dict, rules: dict[str, tuple], where: str) -> list[str]:
  return [
    f"{where}{name} ({values[name]!r}) must be {allowed[0]!r}"
    for name, allowed in rules.items()
    if values.get(name, allowed[0]) not in allowed
  ]


def _faults_of_layers(text: dict) -> list[str]:
  """Which layers are global, by list or by period."""
  period = gemma3_config.PERIOD
  for name in ("sliding_window_pattern", "_sliding_window_pattern"):
    if not text.get("layer_types") and text.get(name, period) != period:
      return [f"{name} ({text[name]!r}) must be {period}"]
  kinds = text.get("layer_types")
  expected = [
    "sliding_attention" if (i + 1) % period else "full_attention"
    for i in range(_of(text, _TEXT_DEFAULTS, "num_hidden_layers"))
  ]
  if kinds and kinds != expected:
    return [
      f"layer_types must be full_attention at every {period}th layer and "
      "sliding_attention at all others"
    ]
  return []


def _rope(text: dict) -> tuple[dict, dict]:
  """The settings of local and of global layers, in the words of 5.x."""
  both = text.get("rope_parameters") or {}
  local = {"rope_type": "default"} | (both.get("sliding_attention") or {})
  far = {"rope_type": "default"} | (both.get("full_attention") or {})
  scaling = text.get("rope_scaling") or {}
  if "type" in scaling:  # The word of 4.x before 4.43.
    scaling = {"rope_type": scaling["type"]} | scaling
  far |= scaling
  local.setdefault("rope_theta", text.get("rope_local_base_freq", 10_000.0))
  far.setdefault("rope_theta", text.get("rope_theta", 1_000_000.0))
  return local, far


def _faults_of_rope(text: dict) -> list[str]:
  both = text.get("rope_parameters") or {}
  if not both.keys() <= {"sliding_attention", "full_attention"}:
    return [
      "rope_parameters must have sliding_attention and full_attention, not "
      f"{', '.join(sorted(both))}"
    ]
  local, far = _rope(text)
  faults = []
  if local["rope_type"] != "default":
    faults.append(
      f"rope_type of local layers ({local['rope_type']!r}) must be 'default'"
    )
  if far["rope_type"] not in ("default", "linear"):
    faults.append(
      f"rope_type of global layers ({far['rope_type']!r}) must be 'default' "
      "or 'linear'"
    )
  if far["rope_type"] == "linear" and "factor" not in far:
    faults.append("the linear rope_type of global layers must have a factor")
  for name, settings in (("local", local), ("global", far)):
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
      faults.append(
        f"partial_rotary_factor of {name} layers "
        f"({settings['partial_rotary_factor']!r}) must be 1.0"
      )
  return faults


def _of(values: dict, defaults: dict[str, int], name: str) -> int:
  value = values.get(name, defaults[name])
  if type(value) is not int or value < 1:
    raise ValueError(f"{name} ({value!r}) must be a positive integer")
  return value


def _model(
  text: dict, vision: gemma3_config.VisionConfig | None
) -> gemma3_config.ModelConfig:
  size = {name: _of(text, _TEXT_DEFAULTS, name) for name in _TEXT_DEFAULTS}
  local, far = _rope(text)
  is_linear = far["rope_type"] == "linear"
  return gemma3_config.ModelConfig(
    vocab_size=size["vocab_size"],
    num_layers=size["num_hidden_layers"],
    embed_dim=size["hidden_size"],
    hidden_dim=size["intermediate_size"],
    num_heads=size["num_attention_heads"],
    num_kv_heads=size["num_key_value_heads"],
    head_dim=size["head_dim"],
    sliding_window=size["sliding_window"],
    query_scale=size["query_pre_attn_scalar"] ** -0.5,
    local_rope_base=float(local["rope_theta"]),
    global_rope_base=float(far["rope_theta"]),
    global_rope_factor=float(far["factor"]) if is_linear else 1.0,
    vision=vision,
  )


def _vision(values: dict) -> gemma3_config.VisionConfig:
  tower = values.get("vision_config") or {}
  size = {name: _of(tower, _VISION_DEFAULTS, name) for name in _VISION_DEFAULTS}
  image = {name: _of(values, _IMAGE_DEFAULTS, name) for name in _IMAGE_DEFAULTS}
  return gemma3_config.VisionConfig(
    image_size=size["image_size"],
    patch_size=size["patch_size"],
    width=size["hidden_size"],
    depth=size["num_hidden_layers"],
    mlp_dim=size["intermediate_size"],
    num_heads=size["num_attention_heads"],
    soft_tokens=image["mm_tokens_per_image"],
    start_of_image=image["boi_token_index"],
    end_of_image=image["eoi_token_index"],
    image_token=image["image_token_index"],
  )


def _sizes(config: gemma3_config.ModelConfig) -> dict[str, Any]:
  """All that two models must share to have the same parameters and logits."""
  tower = config.vision
  sizes = {k: v for k, v in vars(config).items() if k != "vision"}
  # 168**-0.5 and (5376 / 32)**-0.5 may differ in the last bit.
  sizes["query_scale"] = round(sizes["query_scale"], 9)
  if tower:
    # Ids are a matter of the tokenizer and of Hugging Face's inputs, and what
    # it is shown is one of the run.
    others = ("start_of_image", "end_of_image", "image_token", "input_size")
    sizes |= {
      f"vision.{k}": v for k, v in vars(tower).items() if k not in others
    }
  return sizes
