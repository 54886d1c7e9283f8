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
from grpo_tpu.models.gemma3.convert import huggingface_config
from grpo_tpu.models.settings import ModelSettings

_SCHEMES = ("run", "hf", "gguf", "gemma", "random")


def read_settings(
  weights: str, like: ModelSettings, *, setting: str
) -> ModelSettings:
  """The settings of the frozen model that `weights` names.

  A run's step is the one that it means now. Size, head and image size are those
  of the files, and those of `like` for "random:SEED"; types and attention are
  those of `like`. `setting` is the one that names the weights, for errors.
  Reads no tensor and needs no device.

  Raises:
    SettingError: There are no such files, or they hold another model.
    OSError: The bucket does not answer.
  """
  scheme, _, rest = weights.partition(":")
  try:
    if scheme not in _SCHEMES or not rest:
      raise ValueError("give run:WORKDIR, hf:DIR, gguf:FILE or gemma:DIR.")
    found = {"weights": weights, "head": ""}
    if scheme == "run":
      found = _of_run(weights)
    elif scheme != "random":
      found = _of_files(scheme, rest)
    return dataclasses.replace(
      like,
      **found,
      train_vision=False,
      lora=dataclasses.replace(like.lora, rank=0, init=""),
      reference_dtype=None,
      reference_memory="device",
    )
  except (OSError, ValueError) as error:
    if is_machine_failure(error):
      raise
    raise SettingError(
      f"{setting} ({weights!r}) must name the weights of a Gemma 3: {error}"
    ) from error


def _of_run(weights: str) -> dict[str, str | int | None]:
  """Name, image size, head and weights of the model of a run."""
  resolved = load.resolve_weights(weights)
  path = epath.Path(load.split_run(resolved)[0]) / "run.json"
  try:
    record = untrusted.read_json(path)
  except OSError as error:
    raise ValueError(
      f"{path} says of what size the run is, and cannot be read ({error}); "
      "copy the whole folder of the run."
    ) from error
  config = untrusted.get_field(record, "config", dict, str(path))
  model = untrusted.get_field(config, "model", dict, f"config in {path}")
  name = untrusted.get_field(model, "name", str, f"the model in {path}")
  if name not in gemma3_config.CONFIGS:
    raise ValueError(
      f"{path} is of {untrusted.shorten(name)}, which this version does not "
      "know; name another run."
    )
  size, head = model.get("image_size"), model.get("head", "")
  for value, kind in ((size, int), (head, str)):
    if value is not None:
      untrusted.check_kind(value, kind, f"the model in {path}")
  found = {"name": name, "image_size": size, "head": head}
  return found | {"weights": resolved}


def _of_files(scheme: str, path: str) -> dict[str, str | None]:
  """Name, head and weights of the model in another program's files."""
  head, reasons = "", []
  if scheme == "hf":
    head = "score" * huggingface_config.read(path).has_score
  for name, config in gemma3_config.CONFIGS.items():
    sizes = dataclasses.replace(config, has_score=bool(head))
    try:
      model_files.open_files(scheme, sizes, path)
    except ValueError as error:
      reasons.append(error)
      continue
    weights = f"{scheme}:{path}"
    return {"name": name, "image_size": None, "head": head, "weights": weights}
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
    checkpoints = paths.absolute(workdir) / "checkpoints"
    info = reader.CheckpointInfo(step)
    files = manifest.read_files(checkpoints / info.name)
    base = reader.read_record(checkpoints, step)["meta"].get("lora")
    below = fingerprint(base["weights"]) if base else ""
  elif scheme != "random":
    # The readers of a Hugging Face folder read nothing else.
    ends = (".safetensors", "config.json") if scheme == "hf" else ("",)
    files = manifest.describe_files(
      paths.absolute(rest), lambda name: name.endswith(ends)
    )
  text = json.dumps([files, below], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
