"""The files beside exported weights that make the folder one to serve."""

import pathlib
from typing import Any

from absl import logging

from data_pipelines.storage.host_copy import host_copy
from data_pipelines.text import own_tokenizer, tokenizer, untrusted
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


def make_files(
  config: gemma3_config.ModelConfig,
  weights: str,
  origin: str,
  tokenizer_dir: str = "",
) -> dict[str, Any]:
  """Tokenizer, chat template, processor and sampling defaults of an export.

  By name, as bytes or as values for JSON. Those of `export.tokenizer_dir`, or
  of the folder of `origin`, from which the first run started, are copied. What
  is not there is made. `weights` is `model.weights` with its step.

  Raises:
    ValueError: The folder is gone, a file in it is damaged, or the tokenizer
      is no longer the one of the run.
  """
  scheme, _, start = origin.partition(":")
  named = tokenizer_dir or (start if scheme == "hf" else "")
  generation, folder, found = huggingface.GENERATION_CONFIG, pathlib.Path(), []
  if named:
    names = {*_COPIED, generation}
    folder = host_copy(named, what="export.tokenizer_dir", names=names)
    if not folder.is_dir():
      reason = f"{weights} started from {origin}, which is gone."
      raise ValueError(_needs_folder(tokenizer_dir, reason))
    found = [x for x in names if (folder / x).is_file()]
  copied = {
    name: untrusted.read_bytes(folder / name, untrusted.MAX_JSON_BYTES)
    for name in _COPIED
    if name in found
  }
  made = {}
  if generation in found:
    made[generation] = untrusted.read_json(folder / generation)
  if not copied.keys() & set(_PROCESSOR):
    made |= writer.processor_files(config)
  beside = next((folder / x for x in _TOKENIZER if x in copied), None)
  if opened := _open_tokenizer(weights, str(beside or "")):
    made |= writer.tokenizer_files(opened, config)
    if "tokenizer.json" in copied:  # Then no other tokenizer stands beside it.
      del made["tokenizer.model"]
  in_config = b'"chat_template"' in copied.get("tokenizer_config.json", b"")
  if not (in_config or copied.keys() & {_TEMPLATE, "chat_template.json"}):
    made[_TEMPLATE] = writer.chat_template()
  return made | copied


def _open_tokenizer(weights: str, path: str) -> tokenizer.Tokenizer | None:
  """The tokenizer at the path, or else that of the weights, if any."""
  own = own_tokenizer.find(weights)
  is_own, path = not path, path or own.path
  if not path and not own.fingerprint:
    logging.warning(
      "%s has no tokenizer, so the export has none and cannot be served: name "
      "a folder with its files in export.tokenizer_dir.",
      weights,
    )
    return None
  try:
    opened = tokenizer.Tokenizer(path)
    if is_own and own.fingerprint not in ("", opened.fingerprint):
      raise ValueError(f"{path} holds another than that of {weights}.")
  except ValueError as error:
    raise ValueError(_needs_folder("", str(error))) from error
  return opened


def _needs_folder(tokenizer_dir: str, reason: str) -> str:
  return (
    f"export.tokenizer_dir ({tokenizer_dir!r}) must name a folder with the "
    f"tokenizer's files, as of the model fetched again: {reason}"
  )
