"""`run.json`: what a workdir is a run of.

Written when a run starts, read when it goes on: a run is not continued on other
data or with another model, and weights that were "the newest of that run" stay
those they were.
"""

import dataclasses
import json
import os
import pathlib
from importlib import metadata
from typing import Any

from data_pipelines import prompts
from grpo_tpu import config as run_config

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def read(workdir: str) -> dict[str, Any] | None:
  """The card of the run in `workdir`, or None where there is none.

  Raises:
    ValueError: It is damaged.
  """
  path = pathlib.Path(workdir) / "run.json"
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(
      f"{path} must be a run's card, but cannot be read: {error}; bring it "
      "back, or name an empty --workdir."
    ) from error


def check(
  card: dict[str, Any] | None,
  config: run_config.Config,
  identity: dict[str, str],
  workdir: str,
) -> None:
  """Refuses to go on with a run of other data, prompts, seed or model.

  Raises:
    ValueError: Naming what differs.
  """
  if card is None:
    return
  wanted, saved = _essence(config, identity), card["essence"]
  for name in wanted | saved:
    if saved.get(name) != wanted.get(name):
      raise ValueError(
        f"{name} ({wanted.get(name)!r}) must stay what the run in {workdir} "
        f"was started with ({saved.get(name)!r}); set it back, or name an "
        "empty --workdir."
      )


def write(
  workdir: str,
  config: run_config.Config,
  identity: dict[str, str],
  weights: str,
) -> None:
  """Writes the card whole.

  Args:
    workdir: Of the run.
    config: Its settings.
    identity: Of its data.
    weights: `model.weights` with its step spelt out.
  """
  card = {
    "essence": _essence(config, identity),
    "weights": weights,
    "accepted_mathvista_training_terms": (
      config.data.accept_mathvista_training_terms
    ),
    "config": config.to_dict(),
    "versions": {name: metadata.version(name) for name in _PACKAGES},
  }
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  unfinished = folder / ".run.json.tmp"
  unfinished.write_text(json.dumps(card, indent=2) + "\n")
  os.replace(unfinished, folder / "run.json")


def _essence(
  config: run_config.Config, identity: dict[str, str]
) -> dict[str, Any]:
  template = prompts.TEMPLATES[config.data.prompt_template]
  pan_and_scan = config.data.pan_and_scan
  return {
    "seed": config.seed,
    "model.name": config.model.name,
    "model.weights": config.model.weights,
    "data.kind": config.data.kind,
    "data.prompts_per_step": config.data.prompts_per_step,
    "data.prompt_template": config.data.prompt_template,
    # By its text too, which a later version may word in another way.
    "data.prompt_template: its text": template.fingerprint,
    "data.shuffle_options": config.data.shuffle_options,
    # Its numbers are of no matter where it is off.
    "data.pan_and_scan": dataclasses.asdict(pan_and_scan)
    if pan_and_scan.enabled
    else None,
    **_adapters(config),
    **identity,
  }


def _adapters(config: run_config.Config) -> dict[str, Any]:
  """What the adapters of a run are like; nothing where there are none."""
  if config.lora is None:
    return {}
  return {
    "model.lora.rank": config.lora.rank,
    "model.lora.alpha": config.lora.alpha,
    "model.lora.targets": list(config.lora.targets),
  }
