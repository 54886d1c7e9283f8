"""Finds out from its files which Gemma 3 a name of weights stands for.

For networks beside the policy: teachers, reward models and judges.
"""

import dataclasses
import hashlib
import json

from etils import epath

from data_pipelines.storage import paths
from data_pipelines.text import untrusted
from data_pipelines.validation import SettingError, is_machine_failure
from grpo_tpu.checkpoint import load, manifest, reader
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights as model_files
from grpo_tpu.models.settings import ModelSettings


def read_settings(
  weights: str, like: ModelSettings, *, setting: str
) -> ModelSettings:
  """The settings of the frozen model that `weights` names.

  A run's step is the one that it means now. Size, head and image size are those
  of the files, and the size for "random:SEED" is that of `like`, as are types
  and attention. `setting` is the one that names the weights, for errors. Reads
  no tensor and needs no device.

  Raises:
    SettingError: There are no such files, or they hold another model.
    OSError: The bucket does not answer.
  """
  scheme, _, rest = weights.partition(":")
  try:
    if scheme not in ("run", "hf", "gguf", "gemma", "random") or not rest:
      raise ValueError("give run:WORKDIR, hf:DIR, gguf:FILE or gemma:DIR.")
    resolved, found = load.resolve_weights(weights), {}
    head = "score" * load.has_head(resolved)
    if scheme == "run":
      found = _recorded_size(load.split_run(resolved)[0])
    elif scheme != "random":
      found = {"name": _size_of(scheme, rest, head), "image_size": None}
    frozen = {"train_vision": False, "reference_dtype": None}
    frozen |= {"reference_memory": "device", "weights": resolved, "head": head}
    lora = dataclasses.replace(like.lora, rank=0, init="")
    return dataclasses.replace(like, lora=lora, **found, **frozen)
  except (OSError, ValueError) as error:
    if is_machine_failure(error):
      raise
    raise SettingError(
      f"{setting} ({weights!r}) must name the weights of a Gemma 3: {error}"
    ) from error


def _recorded_size(workdir: str) -> dict[str, str | int | None]:
  """Name and image size of the model of a run."""
  path = epath.Path(workdir) / "run.json"
  try:
    record = untrusted.read_json(path)
    config = untrusted.get_field(record, "config", dict, "it")
    model = untrusted.get_field(config, "model", dict, "its config")
    name = untrusted.get_field(model, "name", str, "its model")
    if (size := model.get("image_size")) is not None:
      untrusted.check_kind(size, int, "its image_size")
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{path} must tell the size of the model, and cannot be read: {error}; "
      "copy the whole folder of the run."
    ) from error
  return {"name": name, "image_size": size}


def _size_of(scheme: str, path: str, head: str) -> str:
  """The name of the size of the model in another program's files."""
  reasons = []
  for name, config in gemma3_config.CONFIGS.items():
    sizes = dataclasses.replace(config, has_score=bool(head))
    try:
      model_files.open_files(scheme, sizes, path)
      return name
    except ValueError as error:
      reasons.append(error)
  # A file of the right size may be damaged.
  others = [x for x in reasons if "set model.name" not in str(x)]
  if others:
    raise others[0]
  sizes = ", ".join(gemma3_config.CONFIGS)
  raise ValueError(f"{path} holds none of {sizes}; give one of these.")


def fingerprint(weights: str) -> str:
  """A digest of the contents of the files that resolved `weights` name.

  It is the same wherever they are.
  """
  scheme, _, rest = weights.partition(":")
  files, below = {"": weights}, ""
  if scheme == "run":
    workdir, step = load.split_run(weights)
    folder = paths.absolute(workdir) / "checkpoints"
    files = manifest.read_files(folder / reader.CheckpointInfo(step).name)
    base = reader.read_record(folder, step)["meta"].get("lora")
    below = fingerprint(base["weights"]) if base else ""
  elif scheme != "random":
    # The readers of a Hugging Face folder read nothing else.
    ends = (".safetensors", "config.json") if scheme == "hf" else ("",)
    files = manifest.describe_files(
      paths.absolute(rest), lambda name: name.endswith(ends)
    )
  text = json.dumps([files, below], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
