"""Reads and writes the `config.json` of Gemma 3 in the Hugging Face format.

A missing field means the default of transformers, which released files rely on.
A field that asks for arithmetic other than ours is an error. Knows nothing of
tensors.

References:
  transformers 5.23, `models/gemma3/configuration_gemma3.py` and
  `models/siglip/configuration_siglip.py`.
"""

import dataclasses
import os
from typing import Any

from etils import epath

from data_pipelines.text import tables, untrusted
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3.convert import assembly

_TABLES = tables.read(__package__, "huggingface_config.toml")
# Fields with the only value that our arithmetic has; also their defaults.
_CONSTANTS: dict[str, dict[str, Any]] = _TABLES["constants"]
_CONSTANTS["text"] |= {
  "final_logit_softcapping": None,
  "attn_logit_softcapping": None,
}
# Whether they have an image tower, and a score in place of logits.
_ARCHITECTURES = {
  "Gemma3ForConditionalGeneration": (True, False),
  "Gemma3ForCausalLM": (False, False),
  "Gemma3ForSequenceClassification": (True, True),
  "Gemma3TextForSequenceClassification": (False, True),
}
# Larger than any model, and small enough to list the tensors of each layer.
_MAX_SIZE, _MAX_LAYERS = 2**31 - 1, 1000
# Rows from the placeholder's on, in the embeddings of released checkpoints.
_ROWS_FROM_IMAGE_TOKEN = 64


def read(
  directory: str | os.PathLike[str],
) -> gemma3_config.ModelConfig:
  """The sizes in the `config.json` of a folder.

  Raises:
    ValueError: If there is no such file, or if its arithmetic is not ours; the
      message names every field at fault.
  """
  path = epath.Path(directory) / "config.json"
  try:
    values = untrusted.read_json(path)
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror or error}); give the folder of "
      "a Hugging Face checkpoint, with config.json and *.safetensors."
    ) from error
  try:
    return _parse(values)
  except ValueError as error:
    reason = str(error).removesuffix(".")
    raise ValueError(
      f"{path} describes a model that cannot be run here: {reason}. Give a "
      "checkpoint of Gemma 3."
    ) from error


def _parse(values: dict) -> gemma3_config.ModelConfig:
  architectures = values.get("architectures")
  names = untrusted.check_kind(architectures or [], list, "architectures")
  architecture = names[0] if names else None
  if architecture not in list(_ARCHITECTURES):  # It may be of any type.
    raise ValueError(
      f"architectures ({untrusted.shorten(architectures)}) must be one of "
      f"{', '.join(_ARCHITECTURES)}"
    )
  has_tower, has_score = _ARCHITECTURES[architecture]
  if not has_tower:
    text, tower = values, None
    faults = _faults(text, _CONSTANTS["text"])
  else:
    text = _section(values, "text_config")
    tower = _section(values, "vision_config")
    faults = _faults(values, _CONSTANTS["top"])
    faults += _faults(text, _CONSTANTS["text"], "text_config.")
    faults += _faults(tower, _CONSTANTS["vision"], "vision_config.")
  for each in (values, text):
    faults += _faults(each, {"quantization_config": None})
  faults += _layer_faults(text) + _rope_faults(text)
  if faults:
    raise ValueError("; ".join(faults))
  vision = None
  if tower is not None:
    vision = gemma3_config.VisionConfig(
      **_sizes(tower, "vision"), **_sizes(values, "images")
    )
  local, far = _rope(text)
  has_factor = far["rope_type"] == "linear"
  scalar = _positive_integer(text, "query_pre_attn_scalar", 256)
  return gemma3_config.ModelConfig(
    **_sizes(text, "text"),
    query_scale=scalar**-0.5,
    local_rope_base=_positive_number(local, "rope_theta"),
    global_rope_base=_positive_number(far, "rope_theta"),
    global_rope_factor=_positive_number(far, "factor") if has_factor else 1.0,
    vision=vision,
    has_score=has_score,
  )


def _sizes(values: dict, section: str) -> dict[str, int]:
  """The sizes of a section by our names."""
  return {
    ours: _positive_integer(values, name, default)
    for name, (ours, default) in _TABLES["sizes"][section].items()
  }


def _sizes_to_json(config: Any, section: str) -> dict[str, int]:
  sizes = _TABLES["sizes"][section]
  return {name: getattr(config, ours) for name, (ours, _) in sizes.items()}


def _section(values: dict, name: str) -> dict:
  """An object of the file; empty if it is absent or null."""
  value = values.get(name)
  return {} if value is None else untrusted.check_kind(value, dict, name)


def _positive_integer(values: dict, name: str, default: int) -> int:
  value = values.get(name, default)
  most = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
  if type(value) is not int or not 1 <= value <= most:
    raise ValueError(
      f"{name} ({untrusted.shorten(value)}) must be an integer of 1 to {most}"
    )
  return value


def _positive_number(values: dict, name: str) -> float:
  value = untrusted.check_kind(values[name], float, name)
  if value <= 0:
    raise ValueError(f"{name} ({untrusted.shorten(value)}) must be above 0")
  return float(value)


def _faults(values: dict, constants: dict, prefix: str = "") -> list[str]:
  """The fields with a value other than the only one that is supported."""
  return [
    f"{prefix}{name} ({untrusted.shorten(values[name])}) must be {only!r}"
    for name, only in constants.items()
    if values.get(name, only) != only
  ]


def _layer_faults(text: dict) -> list[str]:
  """Faults of the attention pattern, which is a list or a period."""
  period = gemma3_config.PERIOD
  kinds = text.get("layer_types")
  names = ("sliding_window_pattern", "_sliding_window_pattern")
  faults = [] if kinds else _faults(text, dict.fromkeys(names, period))
  if text.get("use_bidirectional_attention"):
    faults.append("use_bidirectional_attention (True) must be False")
  num_layers = _positive_integer(text, "num_hidden_layers", 26)
  pattern = ["sliding_attention"] * (period - 1) + ["full_attention"]
  if kinds and kinds != (pattern * num_layers)[:num_layers]:
    faults.append(
      f"layer_types must be full_attention at every {period}th layer and "
      "sliding_attention at all others"
    )
  return faults


def _rope(text: dict) -> tuple[dict, dict]:
  """RoPE of local and of global layers, in the terms of transformers 5."""
  both = _section(text, "rope_parameters")
  local = {"rope_type": "default"} | _section(both, "sliding_attention")
  far = {"rope_type": "default"} | _section(both, "full_attention")
  scaling = _section(text, "rope_scaling")
  if "type" in scaling:  # Before transformers 4.43.
    scaling = {"rope_type": scaling["type"]} | scaling
  far |= scaling
  local.setdefault("rope_theta", text.get("rope_local_base_freq", 10_000.0))
  far.setdefault("rope_theta", text.get("rope_theta", 1_000_000.0))
  return local, far


def _rope_faults(text: dict) -> list[str]:
  both = _section(text, "rope_parameters")
  if not both.keys() <= {"sliding_attention", "full_attention"}:
    return [
      "rope_parameters must have sliding_attention and full_attention, not "
      f"{untrusted.shorten(sorted(both))}"
    ]
  local, far = _rope(text)
  faults, kind = [], far["rope_type"]
  if kind not in ("default", "linear"):
    faults.append(
      f"global layers' rope_type ({untrusted.shorten(kind)}) must be 'default' "
      "or 'linear'"
    )
  if kind == "linear" and "factor" not in far:
    faults.append("the linear rope_type of global layers must have a factor")
  faults += _faults(local, {"rope_type": "default"}, "local layers' ")
  for name, rope in (("local", local), ("global", far)):
    faults += _faults(rope, {"partial_rotary_factor": 1.0}, f"{name} layers' ")
  return faults


def check(
  directory: str | os.PathLike[str], config: gemma3_config.ModelConfig
) -> None:
  """Checks that a folder's model has the sizes of `config`.

  The embedding may have more rows than `config`, from that of the image
  placeholder on, as in the released checkpoints.

  Raises:
    ValueError: As in `read`, or lists the sizes that differ.
  """
  found = read(directory)
  has_spare_rows = found.vision is not None and (
    found.vision.image_token == config.vocab_size < found.vocab_size
  )
  if has_spare_rows:
    found = dataclasses.replace(found, vocab_size=config.vocab_size)
  assembly.check_sizes(found, config, f"checkpoint {os.fspath(directory)}")


def num_rows(config: gemma3_config.ModelConfig) -> int:
  """Rows of the embedding in an export, with that of the image placeholder.

  Transformers does not need the placeholder's row, but some servers do.
  """
  if config.vision and config.vision.image_token == config.vocab_size:
    return config.vocab_size + _ROWS_FROM_IMAGE_TOKEN
  return config.vocab_size


def to_json(config: gemma3_config.ModelConfig, dtype: str) -> dict[str, Any]:
  """The `config.json` of a model that should be loaded in `dtype`.

  Raises:
    ValueError: If no `query_pre_attn_scalar` gives the query scale.
  """
  scalar = round(config.query_scale**-2)
  if abs(scalar**-0.5 - config.query_scale) > 1e-6 * config.query_scale:
    raise ValueError(
      f"query_scale ({config.query_scale}) must be one over the root of an "
      "integer, which is how config.json stores it."
    )
  tower, factor = config.vision, config.global_rope_factor
  scaling = {"factor": factor, "rope_type": "linear"} if factor != 1.0 else None
  text = (
    _sizes_to_json(config, "text")
    | _CONSTANTS["text"]
    | _TABLES["written"]["text"]
    | {
      "max_position_embeddings": 131_072 if tower else 32_768,
      "query_pre_attn_scalar": scalar,
      "rope_local_base_freq": config.local_rope_base,
      "rope_scaling": scaling,
      "rope_theta": config.global_rope_base,
      "vocab_size": num_rows(config),
    }
  )
  kind = bool(tower), config.has_score
  names = [name for name, each in _ARCHITECTURES.items() if each == kind]
  top = {"architectures": names, "torch_dtype": dtype}
  top |= _TABLES["written"]["score"] if config.has_score else {}
  if not tower:
    return text | top
  vision = _sizes_to_json(tower, "vision") | _TABLES["written"]["vision"]
  return (
    _sizes_to_json(tower, "images")
    | _CONSTANTS["top"]
    | top
    | {"text_config": text, "vision_config": vision | _CONSTANTS["vision"]}
  )
