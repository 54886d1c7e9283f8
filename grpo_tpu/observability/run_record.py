"""`run.json`: the settings, the data and the attempts of the run in a workdir.

A run resumes only with the settings, model and data that it was started with,
unless the user accepts the changes. Weights that were "the newest of that run"
stay the same ones. Every start of the program is an attempt, recorded with its
code and devices and, unless it was killed, with its end.
"""

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from data_pipelines import validation
from data_pipelines.settings import recorded_dirs
from data_pipelines.storage import paths
from data_pipelines.text import chat_prompts, tables, untrusted
from grpo_tpu.checkpoint import reader
from grpo_tpu.distributed import fingerprint

_MAY_DIFFER = tables.read(__package__, "run_record.toml")["may_differ"]
# The fields of the record that later programs read.
_FIELDS = {
  **{"essence": dict, "accepted_changes": list, "weights": str},
  **{"config": dict, "attempts": list},
}
# The facts about its end that every attempt keeps.
_KEPT = ("exit_code", "reason", "step")


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """A run that is about to start in a workdir, which may hold one's record."""

  workdir: str
  settings: Mapping[str, Any]  # As the user set them; a resume compares these.
  defaults: Mapping[str, Any]  # Count for settings newer than the record.
  data: Mapping[str, str]  # Fingerprints.
  # The settings with the values of presets, to show; None shows `settings`.
  resolved: Mapping[str, Any] | None = None

  def check(self) -> dict[str, Any] | None:
    """The record, if any; a SettingError lists changes of settings or data."""
    record = read_together(self.workdir)
    if record is not None:
      self._refuse(self._changes(record["essence"], self._must_match()))
    return record

  def check_data(self, meta: Mapping[str, Any]) -> None:
    """Raises a SettingError if the `meta` of a checkpoint names other data.

    Somebody may have copied the checkpoint into the workdir.
    """
    saved = {name: meta.get(name) for name in self.data}
    self._refuse(self._changes(saved, self.data))

  def write(self, weights: str) -> None:
    """Records the next attempt; `weights` is `model.weights` with its step."""
    essence = self._must_match()
    before = read(self.workdir) or {
      "essence": essence,
      "accepted_changes": [],
      "attempts": [],
    }
    accepted = before["accepted_changes"]
    changes = self._changes(before["essence"], essence)
    terms = "accept_mathvista_training_terms"
    device = jax.devices()[0]
    attempt = {
      "started": _now(),
      "revision": fingerprint.revision(),
      "code": fingerprint.digest(fingerprint.code_hashes())[:12],
      "devices": {
        "kind": device.device_kind,
        "count": jax.device_count(),
        "hosts": jax.process_count(),
      },
      "ended": None,
    }
    record = {
      "essence": essence,
      "accepted_changes": [*accepted, changes] if changes else accepted,
      "weights": weights,
      "accepted_mathvista_training_terms": self.settings["data"][terms],
      "config": self.resolved or self.settings,
      "data": self.data,
      "packages": fingerprint.package_versions(),
      "attempts": [*before["attempts"], attempt | dict.fromkeys(_KEPT)],
      "end": None,
    }
    _replace(self.workdir, record)

  def _must_match(self) -> dict[str, Any]:
    """The settings and fingerprints that decide the run's numbers."""
    settings = fingerprint.flatten(self.settings)
    dropped = [f"{name}." for name in _MAY_DIFFER]
    if settings["optimizer.schedule"] == "constant":
      dropped.append("train.num_steps.")
    if not settings["data.pan_and_scan.enabled"]:
      dropped.append("data.pan_and_scan.")
    if not settings["model.lora.rank"]:
      dropped.append("model.lora.")
    kept = {
      name: value
      for name, value in settings.items()
      if not f"{name}.".startswith(tuple(dropped))
    }
    # A later version may word the template of this name differently. A file is
    # known by its contents, which are among the data.
    name = settings["data.prompt_template"]
    if template := chat_prompts.TEMPLATES.get(name):
      kept[chat_prompts.OF_TEMPLATE] = template.fingerprint
    else:
      kept["data.prompt_template"] = pathlib.Path(name).name
    return kept | dict(self.data)

  def _changes(
    self, saved: Mapping[str, Any], wanted: Mapping[str, Any]
  ) -> dict[str, dict[str, Any]]:
    default = fingerprint.flatten(self.defaults).get
    return {
      name: {"was": was, "is": now}
      for name, (was, now) in fingerprint.diff(saved, wanted, default).items()
    }

  def _refuse(self, changes: dict[str, Any]) -> None:
    if not changes:
      return
    listed = "\n".join(
      f"  {validation.printable(name)}: was "
      f"{untrusted.shorten(each['was'], 300)}, is "
      f"{untrusted.shorten(each['is'], 300)}"
      for name, each in changes.items()
    )
    if self.settings["checkpoint"]["accept_changes"]:
      logging.warning("Resuming %s with changes:\n%s", self.workdir, listed)
      return
    raise validation.SettingError(
      f"--workdir ({self.workdir}) has a run that was started with other "
      f"settings or data:\n{listed}\nSet them back, choose an empty --workdir, "
      "or set checkpoint.accept_changes=True to continue anyway."
    )


def read(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """The record in `workdir`, or None; a SettingError if it is damaged."""
  path = epath.Path(workdir) / "run.json"
  try:
    record = untrusted.read_json(path, source="it")
    _check_record(record)
    return record
  except FileNotFoundError:
    return None
  except validation.SettingError:
    raise
  except (OSError, ValueError) as error:
    reason = str(error).removesuffix(".")
    raise validation.SettingError(
      f"{path} must be the record of a run, but cannot be read: {reason}; "
      "restore the file, or choose an empty --workdir."
    ) from error


def read_together(workdir: str) -> dict[str, Any] | None:
  """As `read`, by process 0, which tells the others."""

  def ask() -> str:
    try:
      return json.dumps([read(workdir), "", False])
    except validation.SettingError as error:
      is_machine = validation.is_machine_failure(error)
      return json.dumps([None, str(error), is_machine])

  record, error, is_machine = json.loads(reader.ask_first_process(ask))
  if error:
    raise (OSError if is_machine else validation.SettingError)(error)
  return record


def _check_record(record: dict[str, Any]) -> None:
  """Raises a ValueError unless the record has the fields that are read."""
  for name, kind in _FIELDS.items():
    untrusted.get_field(record, name, kind, "it")
  if not record["attempts"]:
    raise ValueError("'attempts' in it must not be empty")
  untrusted.check_items(record["attempts"], dict, "its attempts")
  for section, name in (("model", "weights"), ("data", "dir")):
    settings = record["config"].get(section, {})
    untrusted.check_kind(settings, dict, f"{section!r} in its config")
    if name in settings:
      untrusted.get_field(settings, name, str, f"its config.{section}")
  if "dirs" in record["config"].get("data", {}):
    recorded_dirs(record["config"]["data"], "its config.data")


def close(workdir: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
  """Records how the current attempt has ended, until the next start."""
  record = read(workdir)
  if record is None:
    raise ValueError("the file is gone")
  kept = {name: facts[name] for name in _KEPT}
  record["attempts"][-1] |= {"ended": _now()} | kept
  record["end"] = dict(facts)
  _replace(workdir, record)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _replace(workdir: str | os.PathLike[str], record: Mapping) -> None:
  """Replaces the file in one move: a kill leaves the old file."""
  text = json.dumps(record, indent=2) + "\n"
  paths.write_whole(paths.make_folder(workdir) / "run.json", text.encode())
