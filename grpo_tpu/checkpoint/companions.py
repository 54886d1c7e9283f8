"""The files beside exported weights that make the folder one to serve.

Those of the folder that training started from are copied. What it lacks is
written, as all of it is for a run with a tokenizer of its own.
"""

import pathlib
from typing import Any

from absl import logging

from data_pipelines.text import own_tokenizer, tokenizer, untrusted
from data_pipelines.validation import require
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3.convert import huggingface
from grpo_tpu.models.gemma3.convert import huggingface_tokenizer as writer

_TOKENIZER = ("tokenizer.json", "tokenizer.model")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TEMPLATE = "chat_template.jinja"
_COPIED = (
  *(*_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"),
  *("added_tokens.json", _TEMPLATE, "chat_template.json", *_PROCESSOR),
)
_MAX_BYTES = 256 * 2**20


def find_folder(weights: str, origin: str, tokenizer_dir: str) -> str:
  """The folder whose files are copied; "" if there is none.

  Args:
    weights: `model.weights` with its step.
    origin: The weights that its first run started from.
    tokenizer_dir: The setting `export.tokenizer_dir`.

  Raises:
    ValueError: The folder is gone.
  """
  if tokenizer_dir:
    require(
      pathlib.Path(tokenizer_dir).is_dir(),
      "export.tokenizer_dir",
      tokenizer_dir,
      "be a folder with the tokenizer's files",
      "correct it, or leave it out",
    )
    return tokenizer_dir
  scheme, _, folder = origin.partition(":")
  if scheme != "hf":
    return ""
  require(
    pathlib.Path(folder).is_dir(),
    "export.tokenizer_dir",
    "",
    f"name a folder with the tokenizer's files, because {weights} started from "
    f"{origin}, which is gone",
    "fetch that model again and name its folder",
  )
  return folder


def open_tokenizer(weights: str, folder: str) -> tokenizer.Tokenizer | None:
  """The tokenizer of the folder, or else the one that belongs to the weights.

  None, with a warning, if they have none.

  Raises:
    ValueError: It cannot be read, or is no longer the one of the run.
  """
  own = own_tokenizer.find(weights)
  beside = (pathlib.Path(folder) / name for name in _TOKENIZER if folder)
  path = next((str(x) for x in beside if x.is_file()), own.path)
  if not path and not own.fingerprint:
    logging.warning(
      "%s has no tokenizer, so the export has none and cannot be served: name "
      "a folder with its files in export.tokenizer_dir.",
      weights,
    )
    return None
  try:
    opened = tokenizer.Tokenizer(path)
  except ValueError as error:
    raise ValueError(_describe_loss(weights, str(error))) from error
  is_own = path == own.path and own.fingerprint
  if is_own and opened.fingerprint != own.fingerprint:
    raise ValueError(_describe_loss(weights, f"{path} holds another one."))
  return opened


def _describe_loss(weights: str, reason: str) -> str:
  return (
    "export.tokenizer_dir ('') must name a folder with the tokenizer's files, "
    f"because that of {weights} cannot be used: {reason}"
  )


def read_generation_config(folder: str) -> dict[str, Any]:
  """How the model of a folder asks to be sampled from; {} if it does not say.

  Raises:
    ValueError: The file is damaged.
  """
  path = pathlib.Path(folder) / huggingface.GENERATION_CONFIG
  return untrusted.read_json(path) if folder and path.is_file() else {}


def make_files(
  config: gemma3_config.ModelConfig,
  folder: str,
  opened: tokenizer.Tokenizer | None,
) -> dict[str, Any]:
  """Files by name: their bytes, or values for JSON.

  Args:
    config: Sizes of the network.
    folder: The folder to copy from, or "".
    opened: The tokenizer, or None.
  """
  copied = {
    name: untrusted.read_bytes(path, _MAX_BYTES)
    for name in _COPIED
    if folder and (path := pathlib.Path(folder) / name).is_file()
  }
  made: dict[str, Any] = {
    huggingface.GENERATION_CONFIG: read_generation_config(folder)
  }
  if not copied.keys() & set(_PROCESSOR):
    made |= writer.processor_files(config)
  if opened and "tokenizer.json" not in copied:
    made |= writer.tokenizer_files(opened, config)
  in_config = b'"chat_template"' in copied.get("tokenizer_config.json", b"")
  if not (in_config or copied.keys() & {_TEMPLATE, "chat_template.json"}):
    made[_TEMPLATE] = writer.chat_template()
  return made | copied
