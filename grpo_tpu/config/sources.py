"""The weights and the data that a mode reads, settled before devices start.

Nothing is trained, evaluated or exported from random parameters, or on drawn
problems instead of real ones, unless the settings ask for it. A workdir with a
run is read at its newest checkpoint.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from data_pipelines.settings import recorded_dirs
from data_pipelines.storage import objects, paths
from data_pipelines.validation import require
from grpo_tpu.checkpoint import load, networks, reader
from grpo_tpu.config import schema
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import fingerprint
from grpo_tpu.observability import run_record
from grpo_tpu.rewards import judge_templates

# The settings of a run that decide what it is asked, and where answers end.
_OF_PROMPTS = (
  *("seed", "data.prompt_", "data.system_prompt", "data.few_shot"),
  *("data.pan_and_scan.", "data.dir", "data.train_split"),
  *("rollout.max_new_tokens", "rollout.min_new_tokens", "rollout.stop_strings"),
)


def resolve(
  config: Config, mode: str, workdir: str, is_flag: Callable[[str], bool]
) -> Config:
  """The settings with the weights and the data that a mode reads.

  `is_flag` is true for a setting that the command line sets: the random weights
  of a config file are where training starts, and nothing to evaluate.

  Raises:
    ValueError: The settings must name weights or data, or the workdir holds a
      run of another model.
  """
  if paths.is_remote(workdir):
    # Nothing is drawn, planned or compiled for a bucket that is closed.
    objects.exists(f"{workdir}/run.json", what="--workdir")
  for _, template, _ in config.rewards.judges:
    judge_templates.open_template(template)
  if mode == "plan":
    return config
  schema.check_weights(config, is_remote=True)
  if mode != "train":
    config = _take_run(config, mode, workdir, is_flag("model.weights"))
  needs = [] if config.model.weights else [config.model.describe_weights()]
  has_data = config.data.weighted_dirs or mode in ("export", "answer")
  if config.model.hub_name and not has_data:
    needs.append(_describe_data(config, mode))
  if needs:
    raise ValueError("\n".join(needs))
  if mode != "export":  # That takes the head that there is.
    load.check_head(config.model, _recorded_head(config.model.weights))
  if config.model.hub_name and config.model.weights.startswith("random:"):
    logging.warning(
      "model.weights (%r) draws the parameters of %s at random: this model is "
      "noise, good for tests of the program alone.",
      config.model.weights,
      config.model.name,
    )
  return as_trained(config, is_flag) if mode == "answer" else config


def _recorded_head(weights: str) -> str:
  """The head of a run by its record, or of other files; "" if none is known."""
  if not weights.startswith("run:"):
    return "score" * load.has_head(weights)
  record = run_record.read(load.split_run(weights)[0])
  return record["config"].get("model", {}).get("head", "") if record else ""


def fix_networks(config: Config, workdir: str) -> Config:
  """The settings with the steps of reward models, judges and the teacher.

  They are those that the run in the workdir started with, if there is one.

  Raises:
    ValueError: Weights cannot be found, or are of no reward model that fits.
  """
  record = run_record.read(workdir) if workdir else None
  saved = record["essence"] if record else {}

  def fix(setting: str, was: str, weights: str) -> str:
    if weights in ("", "self"):
      return weights
    is_same = load.split_run(was)[0] == load.split_run(weights)[0]
    if is_same and not weights.rpartition("@")[2].isdecimal():
      return was
    found = networks.read_settings(weights, config.model, setting=setting)
    return found.weights

  def fix_all(setting: str, named: Sequence[Any]) -> tuple[Any, ...]:
    before = [str(was) for was, *_ in saved.get(setting, [])]
    pairs = itertools.zip_longest(named, before[: len(named)], fillvalue="")
    return tuple(
      (fix(setting, was, weights), *rest) for (weights, *rest), was in pairs
    )

  rewards = config.rewards
  rewards = dataclasses.replace(
    rewards,
    models=fix_all("rewards.models", rewards.models),
    judges=fix_all("rewards.judges", rewards.judges),
  )
  if rewards.models:
    # Imported here because few runs need it.
    from grpo_tpu.rewards import model

    model.read_models(rewards, config.model)
  name, objective = "objective.teacher", config.objective
  teacher = fix(name, str(saved.get(name, "")), objective.teacher)
  objective = dataclasses.replace(objective, teacher=teacher)
  return dataclasses.replace(config, rewards=rewards, objective=objective)


def network_identity(
  config: Config, tokenizer: Any, *, has_images: bool
) -> dict[str, str]:
  """Fingerprints of contents of reward models, judges and teacher, by a name.

  Raises:
    ValueError: A network cannot read the prompts of the data.
  """
  if not (config.rewards.network_weights or config.distills):
    return {}
  from grpo_tpu.rewards import model

  found = model.read_models(config.rewards, config.model)
  found += [
    networks.read_settings(weights, config.model, setting="rewards.judges")
    for weights, *_ in config.rewards.judges
    if weights != "self"
  ]
  found += [config.teacher] if config.distills else []
  model.check_data(found, tokenizer, has_images=has_images)
  named = [x for x, *_ in (*config.rewards.models, *config.rewards.judges)]
  named = dict(zip(config.rewards.network_weights, named, strict=True))
  contents = {f"rewards: contents of {name}": x for name, x in named.items()}
  teacher = config.teacher.weights if config.distills else ""
  contents["objective.teacher: contents"] = teacher
  contents = {
    name: networks.fingerprint(weights)
    for name, weights in contents.items()
    if weights not in ("", "self")
  }
  return contents | {
    f"rewards: template of judge_{number}": judge_templates.open_template(
      template
    ).fingerprint
    for number, (_, template, _) in enumerate(config.rewards.judges, start=1)
  }


def _take_run(
  config: Config, mode: str, workdir: str, has_weights_flag: bool
) -> Config:
  """The settings with the checkpoint of the workdir's run, if it has one.

  The run also gives the data if the settings name none.
  """
  named = config.model.weights
  if named.startswith("random:") and not has_weights_flag:
    named = ""
  record = run_record.read(workdir) if workdir else None
  if not workdir or not (record or reader.steps(f"{workdir}/checkpoints")):
    rule = f"hold a run to {mode}, and there is none in this folder"
    remedy = "--config.model.weights=run:WORKDIR or =hf:DIR"
    remedy = f"correct it, or name the weights, as in {remedy}"
    require(bool(named), "--workdir", workdir, rule, remedy)
    return config
  trained = record["config"] if record else {}
  is_own = named.startswith("run:") and paths.absolute(
    load.split_run(named)[0]
  ) == paths.absolute(workdir)
  if not is_own and named not in ("", trained.get("model", {}).get("weights")):
    logging.warning(
      "Reads model.weights (%r), which are not those of the run in %s.",
      named,
      workdir,
    )
    return config
  for name in ["name", "image_size"] + ["head"] * (mode != "export"):
    value = getattr(config.model, name)
    was = trained.get("model", {}).get(name, value)
    require(
      *(value == was, f"model.{name}", value),
      f"be that of the run in --workdir ({workdir!r}), which has {was!r}",
      "give the --config of that run, another --workdir, or weights of this "
      "model in model.weights",
    )
  step = _export_step(config, workdir) if mode == "export" else ""
  weights = f"run:{workdir}" + (f"@{step}" if step else "")
  if is_own and not step:
    weights = named
  logging.info("Reads the run in the workdir: model.weights=%s.", weights)
  data, saved = config.data, trained.get("data")
  if saved and not data.weighted_dirs:
    folder, dirs = recorded_dirs(saved, "the record of the run")
    data = dataclasses.replace(data, dir=folder, dirs=dirs)
    logging.info("Reads the data of the run: %s.", folder or dirs or "drawn")
  model = dataclasses.replace(config.model, weights=weights)
  return dataclasses.replace(config, model=model, data=data)


def as_trained(config: Config, is_flag: Callable[[str], bool]) -> Config:
  """The settings with the prompts and limits that a `run:` was trained with.

  Those for which `is_flag` is true stay.
  """
  scheme, record = config.model.weights.partition(":")[0], None
  if scheme == "run":
    record = run_record.read(load.split_run(config.model.weights)[0])
  values = config.to_dict()
  trained = fingerprint.flatten(record["config"]) if record else {}
  for name, value in fingerprint.flatten(values).items():
    was = trained.get(name, value)
    if name.startswith(_OF_PROMPTS) and was != value and not is_flag(name):
      logging.info("As in training: %s=%r", name, was)
      *sections, last = name.split(".")
      functools.reduce(dict.__getitem__, sections, values)[last] = was
  return Config.from_config_dict(values)


def _export_step(config: Config, workdir: str) -> str:
  """The setting `export.step`, if the run has such a checkpoint; "" if None."""
  step, saved = config.export.step or "", reader.steps(f"{workdir}/checkpoints")
  listed = ", ".join(map(str, saved)) or "none"
  rule = f"be one of the steps of the run in {workdir} ({listed})"
  holds, remedy = step in ("", "best"), "leave it out for the newest whole one"
  holds = holds or int(step) in saved
  require(holds, "export.step", step, rule, remedy)
  return step


def _describe_data(config: Config, mode: str) -> str:
  """An error that says what `data.dir` may be, and how to get it."""
  kind = " --eval_fraction=1" if mode == "evaluate" else ""
  has_vision = config.model_config.vision is not None
  drawn = "synthetic" if has_vision else "reasoning_gym:basic_arithmetic"
  return (
    f"data.dir ('') must name the data for {config.model.name}, as in "
    f"--config.data.dir=DIR after\n"
    f"    python -m data_pipelines.prepare --source=PATH{kind} "
    "--data_dir=DIR\n"
    "  with a file or folder of questions and answers, see "
    "docs/data.md, or\n"
    f"    python -m data_pipelines.prepare --source={drawn} --data_dir=DIR"
  )
