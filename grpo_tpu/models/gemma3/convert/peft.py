"""Reads and writes the adapters of `peft`, for transformers' Gemma 3.

In a model with an image tower the projector is not a linear layer but a
parameter, which peft 0.17 and later can adapt.

References:
  The file format: https://github.com/huggingface/peft
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from data_pipelines.text import tables, untrusted
from data_pipelines.validation import printable, require
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves
from grpo_tpu.models.gemma3 import lora as loras
from grpo_tpu.models.gemma3.convert import assembly, huggingface
from grpo_tpu.models.gemma3.convert import huggingface_names as names
from grpo_tpu.models.settings import LORA_TARGETS, LoraConfig

_FIELDS = tables.read(__package__, "peft.toml")
_TENSORS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_ROOT, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
_HEAD, _MAX_RANK = "score.weight", 2**20


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
  directory: epath.PathLike,
  *,
  base_model: str = "",
  files: Mapping[str, Any] | None = None,
) -> None:
  """Writes the adapters to a folder; every process takes part.

  `PeftModel.from_pretrained` loads them onto `Gemma3ForCausalLM` of a text size
  and `Gemma3ForConditionalGeneration` of one with an image tower; those of a
  reward model, with its head, onto the classes for sequence classification.
  `base_model` is the name or path of the model that the adapters belong to;
  `files` are those of `huggingface.save`.
  """
  text = "model.language_model" if config.vision else "model"
  prefixes = {"text": text, "projector": "model.multi_modal_projector"}
  host = jax.tree.map(huggingface.on_host, adapters)
  arrays, tensors = loras.flatten(host), {}
  if jax.process_index():
    return
  modules = list(_modules(config, lora))
  for module in modules:
    kind, dot, rest = module.key.partition(".")
    for end, values in module.factors(arrays[module.path]).items():
      name = f"{_ROOT}{prefixes[kind]}{dot}{rest}{end}"
      tensors[name] = np.ascontiguousarray(values)
  if config.has_score:
    tensors[_ROOT + _HEAD] = host["score"]["w"]
  unfinished = huggingface.make_unfinished(directory)
  huggingface.write_tensors(tensors, unfinished / _TENSORS)
  alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
  settings = _FIELDS["written"] | _targets(text, modules)
  settings |= {"r": lora.rank, "lora_alpha": alpha}
  settings |= _FIELDS["score"] if config.has_score else {}
  settings["base_model_name_or_path"] = base_model
  huggingface.finish(unfinished, {**(files or {}), _SETTINGS: settings})


def _targets(text: str, modules: Sequence[_Module]) -> dict[str, Any]:
  """The fields that name the matrices."""
  linear = dict.fromkeys(
    x.name.split(".", 3)[3] for x in modules if not x.is_parameter
  )
  # A pattern of whole names, because the image tower has a q_proj too.
  layers, kinds = (
    x.replace(".", r"\.") for x in (f"{text}.layers.", "|".join(linear))
  )
  parameters = [f"multi_modal_{x.name}" for x in modules if x.is_parameter]
  return {
    "target_modules": rf"{layers}\d+\.({kinds})" if linear else [],
    "target_parameters": parameters or None,
  }


def check(
  config: gemma3_config.ModelConfig, lora: LoraConfig
) -> dict[str, huggingface.Tensor]:
  """The tensors of the adapter that `model.lora.init` names, by our names.

  Raises:
    ValueError: The folder holds no adapter that can be trained, or one of other
      settings; the message has the settings to use.
  """
  folder = epath.Path(lora.init.removeprefix("peft:"))
  try:
    rank, alpha = _read_settings(folder / _SETTINGS)
    found = {
      names.common_name(x.name.removeprefix(_ROOT)): x
      for x in huggingface.read_headers(folder / _TENSORS)
    }
    targets = _check_tensors(config, rank, found)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"model.lora.init ({lora.init!r}) must be a folder with a LoRA adapter "
      f"of peft for this model, {_SETTINGS} and {_TENSORS}: {error}"
    ) from error
  given = tuple(x for x in LORA_TARGETS if x in lora.targets)
  settings = {"rank": lora.rank, "alpha": lora.alpha, "targets": given}
  wanted = {"rank": rank, "alpha": alpha, "targets": targets}
  changes = [
    f"model.lora.{k}={x}" for k, x in wanted.items() if x != settings[k]
  ]
  rule, remedy = "have the settings of model.lora", " and ".join(changes)
  require(not changes, "model.lora.init", lora.init, rule, f"set {remedy}")
  return found


def load(
  config: gemma3_config.ModelConfig, lora: LoraConfig, initial: dict
) -> dict:
  """Fills `initial`, NumPy arrays, with the adapters of `model.lora.init`.

  Matrices that the folder lacks, as keys where peft adapted queries and values
  alone, keep theirs, and so does a head.

  Raises:
    ValueError: As in `check`, or a factor is not finite.
  """
  found, arrays = check(config, lora), loras.flatten(initial)
  modules = list(_modules(config, lora))
  known = [x for x in modules if x.key + _ENDS[0] in found]
  filled = {
    module.key + end: values
    for module in known
    for end, values in module.factors(arrays[module.path]).items()
  }
  if _HEAD in found:
    filled[_HEAD] = initial["score"]["w"]
  for name, values in filled.items():
    values[...] = found[name].start_read()()
    rule = f"hold finite numbers, and {printable(found[name].name)} does not"
    is_finite = bool(np.isfinite(values).all())
    require(is_finite, "model.lora.init", lora.init, rule, "")
  logging.info(
    "Read %s, which has adapters of %d of the %d matrices; the others are new.",
    *(lora.init, len(known), len(modules)),
  )
  return initial


def _read_settings(path: epath.Path) -> tuple[int, float]:
  """Rank and alpha, if the rest asks for nothing but the factors' product."""
  settings, fields = untrusted.read_json(path), _FIELDS["read"]
  whole = settings.get("modules_to_save")
  if isinstance(whole, list) and all(x in fields["heads"] for x in whole):
    del settings["modules_to_save"]  # Peft names them all for a reward model.
  others = (x for x in settings if settings[x] and x not in fields["free"])
  only = dict.fromkeys(others, "absent or off") | fields["only"]
  faults = [
    f"{printable(name)} ({untrusted.shorten(settings[name])}) must be {rule}"
    for name, rule in only.items()
    if settings.get(name, rule) != rule
  ]
  initial = str(settings.get("init_lora_weights"))
  if initial.startswith(tuple(fields["spoil_base"])):
    faults.append(
      f"init_lora_weights ({untrusted.shorten(initial)}) has changed the base "
      "model too; save it in peft with path_initial_model_for_weight_conversion"
    )
  rank = untrusted.get_field(settings, "r", int, path.name)
  alpha = untrusted.get_field(settings, "lora_alpha", float, path.name)
  if not 1 <= rank <= _MAX_RANK or alpha <= 0:
    faults.append(f"r ({rank}) and lora_alpha ({alpha}) must be above 0")
  if faults:
    raise ValueError(f"{path.name}: {'; '.join(faults)}.")
  return rank, float(alpha)


def _check_tensors(
  config: gemma3_config.ModelConfig,
  rank: int,
  found: Mapping[str, huggingface.Tensor],
) -> tuple[str, ...]:
  """Checks names and shapes; returns the targets that have an adapter."""
  everything = LoraConfig(rank, 1.0, LORA_TARGETS, init="")
  adapters = loras.flatten(loras.abstract_adapters(config, everything))
  wanted, paths = {}, set()
  for module in _modules(config, everything):
    if any(module.key + end in found for end in _ENDS):
      paths.add(module.path)
      shapes = {
        name: np.broadcast_to(np.float32(0), x.shape)
        for name, x in adapters[module.path].items()
      }
      for end, values in module.factors(shapes).items():
        wanted[module.key + end] = values.shape
  wanted = wanted or {f"text.layers.0.self_attn.q_proj{_ENDS[0]}": ()}
  if config.has_score and _HEAD in found:
    wanted[_HEAD] = (1, config.embed_dim)
  assembly.check_tensors(
    {name: x.shape for name, x in found.items()},
    wanted,
    _TENSORS,
    faults=huggingface.type_faults(found),
    remedy="Give an adapter of the decoder's linear layers and the projector, "
    f"with {_HEAD} for objective.preset=bradley_terry alone.",
  )
  return tuple(x for x in LORA_TARGETS if loras.TARGETS[x] in paths)
