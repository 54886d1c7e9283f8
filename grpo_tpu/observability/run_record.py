"""`run.json`: what a workdir is a run of, and what has become of it.

Written when a run starts, read when it goes on: a run is not continued with
other settings, another model or other data unless it is told to, and weights
that were "the newest of that run" stay those they were. Every start is an
attempt in it, with the code and the devices it ran on, and with its end, unless
it was killed.
"""

import datetime
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging

from data_pipelines.text import chat_prompts
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import preflight

# What changes no number of a step but by rounding, or is known by its contents
# and not by its place. All other settings are of the essence, those among them
# that are yet to come.
_INCIDENTAL = (
  *("checkpoint", "eval", "export", "mesh", "samples"),
  *("distributed", "profile"),
  *("data.dir", "data.tokenizer", "data.worker_processes", "data.synthetic"),
  *("data.synthetic_eval_fraction", "data.preference_file"),
  "data.accept_mathvista_training_terms",
  *("model.attention", "model.remat", "model.vision_remat"),
  *("model.logits_chunk", "model.reference_memory"),
  *("rewards.num_workers", "rewards.rows_per_call"),
  *("rewards.timeout_seconds", "rewards.max_error_fraction"),
  "rewards.error_window",
  *("train.microbatch_bundles", "train.max_skipped_updates"),
)
# Of the words at an end, what stays of each attempt.
_LASTING = ("exit_code", "reason", "step")


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
  """Refuses to go on with a run of other settings or other data.

  Raises:
    ValueError: Setting by setting, what it was and what it is.
  """
  if card is not None:
    saved = card["essence"]
    _refuse(_changes(saved, _essence(config, identity)), config, workdir)


def check_data(
  meta: Mapping[str, Any],
  config: run_config.Config,
  identity: dict[str, str],
  workdir: str,
) -> None:
  """Refuses to go on from a checkpoint, by its meta, of other data.

  It may have been put there, beside a card of another run or none.

  Raises:
    ValueError: What it was and what it is.
  """
  saved = {name: meta.get(name) for name in identity}
  _refuse(_changes(saved, identity), config, workdir)


def _refuse(
  changes: dict[str, Any], config: run_config.Config, workdir: str
) -> None:
  if not changes:
    return
  listed = "\n".join(
    f"  {name}: was {each['was']!r}, is {each['is']!r}"
    for name, each in changes.items()
  )
  if config.checkpoint.accept_changes:
    logging.warning("The run in %s goes on, changed:\n%s", workdir, listed)
    return
  raise ValueError(
    f"--workdir ({workdir}) must be given what its run was started with, but "
    f"this is changed:\n{listed}\nSet it back, name an empty --workdir, or set "
    "checkpoint.accept_changes=True to go on all the same."
  )


def _changes(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict:
  """By name: what it was, and what it is."""
  # As JSON has it: tuples are lists there.
  wanted = json.loads(json.dumps(wanted))
  return {
    name: {"was": saved.get(name), "is": wanted.get(name)}
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  }


def write(
  workdir: str,
  config: run_config.Config,
  identity: dict[str, str],
  weights: str,
) -> None:
  """Writes the card of a run that starts or goes on, as its next attempt.

  Args:
    workdir: Of the run.
    config: Its settings.
    identity: Of its data.
    weights: `model.weights` with its step spelt out.
  """
  before = read(workdir)
  essence = _essence(config, identity)
  accepted = before["accepted_changes"] if before else []
  changes = _changes(before["essence"], essence) if before else {}
  card = {
    "essence": essence,
    "accepted_changes": [*accepted, changes] if changes else accepted,
    "weights": weights,
    "accepted_mathvista_training_terms": (
      config.data.accept_mathvista_training_terms
    ),
    "config": config.to_dict(),
    "data": identity,
    "packages": preflight.packages(),
    "attempts": [*(before["attempts"] if before else []), _attempt()],
    "end": None,
  }
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  _replace(workdir, card)


def close(workdir: str | os.PathLike[str], words: Mapping[str, Any]) -> None:
  """Writes how the attempt that is under way has ended.

  Args:
    workdir: Of the run, with a card of this attempt.
    words: `exit_code`, `reason`, `step` and whatever else there is to say,
      which stands under `end` until the next start.
  """
  card = read(str(workdir))
  assert card is not None
  lasting = {name: words[name] for name in _LASTING}
  card["attempts"][-1] |= {"ended": _now()} | lasting
  card["end"] = dict(words)
  _replace(workdir, card)


def _attempt() -> dict[str, Any]:
  """When and on what this process has started, and no end yet."""
  device = jax.devices()[0]
  code = json.dumps(preflight.code(preflight.ROOT), sort_keys=True).encode()
  return {
    "started": _now(),
    "revision": preflight.revision(),
    "code": hashlib.sha256(code).hexdigest()[:12],
    "devices": {
      "kind": device.device_kind,
      "count": jax.device_count(),
      "hosts": jax.process_count(),
    },
    "ended": None,
  } | dict.fromkeys(_LASTING)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _replace(workdir: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
  """Writes the card whole: a kill leaves the one before."""
  folder = pathlib.Path(workdir)
  unfinished = folder / ".run.json.tmp"
  unfinished.write_text(json.dumps(card, indent=2) + "\n")
  os.replace(unfinished, folder / "run.json")


def _essence(
  config: run_config.Config, identity: dict[str, str]
) -> dict[str, Any]:
  """What the numbers of a run follow from, by the names of the settings."""
  settings = dict(_flat(config.to_dict()))
  if config.optimizer.schedule == "constant":
    del settings["train.num_steps"]
  # Of no matter where they are off.
  for section, is_on in (
    ("data.pan_and_scan", config.data.pan_and_scan.enabled),
    ("model.lora", config.lora is not None),
  ):
    if not is_on:
      settings = {
        name: value
        for name, value in settings.items()
        if not name.startswith(f"{section}.")
      }
  # By its text too, which a later version may word in another way.
  template = chat_prompts.TEMPLATES[config.data.prompt_template]
  settings["data.prompt_template: its text"] = template.fingerprint
  return settings | identity


def _flat(
  settings: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any]]:
  """The settings of the essence, each by its whole name."""
  for name, value in settings.items():
    name = f"{where}{name}"
    if name in _INCIDENTAL:
      continue
    if isinstance(value, Mapping):
      yield from _flat(value, f"{name}.")
    else:
      yield name, value
