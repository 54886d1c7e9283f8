"""Finds the tokenizer that belongs to the weights that a model starts from."""

import pathlib
from typing import NamedTuple

from etils import epath

from data_pipelines.text import untrusted

# The names of fingerprints in the `data` of a run's record.
OF_TOKENIZER = "data.tokenizer: its contents"
OF_DATA_DIR = "data.dir: its tokenizer"
_NAMES = ("tokenizer.model", "tokenizer.json")
_MAX_RUNS = 100


class Found(NamedTuple):
  """A tokenizer file, and what it must hold."""

  path: str  # "" if there is none.
  fingerprint: str  # As the run that used it recorded; "" if none did.


def find(weights: str) -> Found:
  """The tokenizer that belongs to `model.weights`.

  It stands beside a checkpoint, and within a GGUF file. A run's is the one that
  it used: named in its settings, that of its weights, or that of its data.

  Raises:
    ValueError: The record of a run cannot be read.
  """
  fingerprint = ""
  for _ in range(_MAX_RUNS):
    scheme, _, rest = weights.partition(":")
    if scheme != "run":
      return Found(_find_beside(scheme, rest), fingerprint)
    workdir, at, step = rest.rpartition("@")
    workdir = pathlib.Path(workdir if at and step.isdecimal() else rest)
    workdir = workdir.expanduser()
    if not (workdir / "run.json").exists():
      return Found("", fingerprint)
    source = str(workdir / "run.json")
    record = untrusted.read_json(source)
    identity = untrusted.get_field(record, "data", dict, source)
    fingerprint = fingerprint or str(
      identity.get(OF_TOKENIZER) or identity.get(OF_DATA_DIR) or ""
    )
    settings = untrusted.get_field(record, "config", dict, source)
    settings = untrusted.get_field(settings, "data", dict, source)
    name = untrusted.get_field(settings, "tokenizer", str, source)
    folder = untrusted.get_field(settings, "dir", str, source)
    if not name and OF_TOKENIZER not in identity:
      name = str(pathlib.Path(folder or workdir / "data") / _NAMES[0])
    if name:
      return Found(name, fingerprint)
    weights = untrusted.get_field(record, "weights", str, source)
  raise ValueError(f"model.weights ({weights!r}) must not start from itself.")


def _find_beside(scheme: str, path: str) -> str:
  """The tokenizer of a checkpoint of another program; "" if it has none."""
  if scheme == "gguf":
    return path
  if scheme not in ("hf", "gemma"):
    return ""
  folder = epath.Path(path).expanduser()
  # Kaggle's archives of the `gemma` library hold it beside the checkpoint.
  folders = (folder, folder.parent) if scheme == "gemma" else (folder,)
  files = (each / name for each in folders for name in _NAMES)
  return next((str(file) for file in files if file.exists()), "")
