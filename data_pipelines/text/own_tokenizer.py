"""Finds and opens the tokenizer that belongs to the weights of a run."""

from typing import NamedTuple

from etils import epath

from data_pipelines.settings import DataConfig, ModelInputs, recorded_dirs
from data_pipelines.sources import data_dirs
from data_pipelines.storage import objects
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text import untrusted
from data_pipelines.text.chat_format import GEMMA3

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
  """
  fingerprint = ""
  for _ in range(_MAX_RUNS):
    scheme, _, rest = weights.partition(":")
    if scheme != "run":
      return Found(_find_beside(scheme, rest), fingerprint)
    workdir, at, step = rest.rpartition("@")
    has_step = at and (step.isdecimal() or step == "best")
    workdir = epath.Path(workdir if has_step else rest)
    workdir = workdir.expanduser()
    source = str(workdir / "run.json")
    if not objects.exists(source, what="model.weights"):
      return Found("", fingerprint)
    record = untrusted.read_json(source)
    identity = untrusted.get_field(record, "data", dict, source)
    known = identity.get(OF_TOKENIZER) or identity.get(OF_DATA_DIR) or ""
    fingerprint = fingerprint or str(known)
    settings = untrusted.get_field(record, "config", dict, source)
    settings = untrusted.get_field(settings, "data", dict, source)
    name = untrusted.get_field(settings, "tokenizer", str, source)
    if not name and OF_TOKENIZER not in identity:
      folder, dirs = recorded_dirs(settings, source)
      folder = dirs[0][0] if dirs else folder or workdir / "data"
      name = str(epath.Path(folder) / _NAMES[0])
    if name:
      return Found(name, fingerprint)
    weights = untrusted.get_field(record, "weights", str, source)
  raise ValueError(f"model.weights ({weights!r}) must not start from itself.")


def _find_beside(scheme: str, path: str) -> str:
  """The tokenizer of a checkpoint of another program; "" if it has none."""
  if scheme == "gguf":
    return path
  folder = epath.Path(path).expanduser()
  # Kaggle's archives of the `gemma` library hold it beside the checkpoint.
  folders = {"hf": [folder], "gemma": [folder, folder.parent]}.get(scheme, ())
  files = (each / name for each in folders for name in _NAMES)
  found = (x for x in files if objects.exists(x, what="model.weights"))
  return str(next(found, ""))


def open_own(
  settings: DataConfig, model: ModelInputs, own: Found
) -> tokens.Tokenizer | None:
  """Opens the tokenizer of the settings, or that of the weights, if any."""
  size, name = model.vocab_size, settings.tokenizer
  setting, is_exact = f"data.tokenizer ({name!r})", True
  path = epath.Path(own.path).expanduser()
  found = own.path and (
    own.path == tokens.GEMMA or objects.exists(path, what="model.weights")
  )
  if not name and found:
    name = own.path
    setting = f"the tokenizer of model.weights ({model.weights!r})"
    is_exact = size == GEMMA3.vocab_size  # A small one may have fewer pieces.
  if name:
    try:
      tokenizer = tokens.Tokenizer(name)
    except ValueError as error:
      raise ValueError(f"{setting} must be the model's own: {error}") from error
    missing = size - tokenizer.vocab_size
    if missing < 0 or (is_exact and missing):
      raise ValueError(
        f"{setting} has {tokenizer.vocab_size} pieces, but model.name "
        f"({model.name!r}) has {size} embeddings; set data.tokenizer to the "
        "tokenizer of the model."
      )
    if not settings.tokenizer:
      _check_recorded(model, own, tokenizer)
    return tokenizer
  # Random weights of a released size know no tokens, so any ids will do.
  scheme, _, folder = model.weights.partition(":")
  if scheme != "random" and size == GEMMA3.vocab_size:
    folder = folder if scheme == "hf" else "DIR"
    raise ValueError(
      "data.tokenizer ('') must name Gemma's tokenizer, because model.weights "
      f"({model.weights!r}) have none beside them, and do not know the ids of "
      "the data dir's small tokenizer. Get it, as by\n"
      f"    hf download {model.hub_name} tokenizer.model --local-dir {folder}\n"
      f"  and set data.tokenizer={folder}/tokenizer.model. A tokenizer.json, a "
      ".gguf file, or gemma for that of the gemma library, will do too."
    )
  return None


def open_small(
  model: ModelInputs, own: Found, data: data_dirs.DataDir
) -> tokens.Tokenizer:
  """Opens the tokenizer of a data dir, which the model must have ids for."""
  made = data.manifest["tokenizer"]
  if made["vocab_size"] > model.vocab_size:
    raise ValueError(
      f"model.name ({model.name!r}) has {model.vocab_size} embeddings, fewer "
      f"than the {made['vocab_size']} pieces of the data dir's tokenizer; "
      "prepare the data with a smaller --vocab_size."
    )
  tokenizer = tokens.Tokenizer(data.folder / "tokenizer.model")
  if tokenizer.fingerprint != made["fingerprint"]:
    data.refuse_changed("tokenizer.model holds another tokenizer")
  _check_recorded(model, own, tokenizer)
  return tokenizer


def _check_recorded(
  model: ModelInputs, own: Found, tokenizer: tokens.Tokenizer
) -> None:
  """Refuses a tokenizer that is not the one that a run was trained with."""
  if own.fingerprint not in ("", tokenizer.fingerprint):
    raise ValueError(
      f"model.weights ({model.weights!r}) was trained with another tokenizer, "
      f"which is no longer in {own.path!r}; set data.dir to the data of that "
      "run, or data.tokenizer to its tokenizer."
    )
