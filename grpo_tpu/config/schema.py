"""The settings of a run: frozen, typed, checked before a device is touched.

No setting has a default here; `configs/base.py` gives every value. Below
`main` nobody sees a ConfigDict.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.text import chat_prompts as prompts
from data_pipelines.validation import require
from grpo_tpu.checkpoint import retention
from grpo_tpu.config import sections
from grpo_tpu.distributed import initialize as distributed
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import lora, weights
from grpo_tpu.models.settings import ModelSettings
from grpo_tpu.observability import profiler, registry
from grpo_tpu.rewards import scoring
from grpo_tpu.rl import objective as objectives
from grpo_tpu.rl import optimizer as optimizers
from grpo_tpu.rl import shaping as shapings
from grpo_tpu.rollout.settings import RolloutConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """A run. `from_config_dict` reads it; each section says what it holds.

  Attributes:
    seed: Of all that is drawn.
    compilation_cache_dir: Where compiled programs outlive the process, unless
      `$JAX_COMPILATION_CACHE_DIR` names another place; "" for nowhere.
  """

  seed: int
  compilation_cache_dir: str
  data: sections.DataConfig
  model: ModelSettings
  mesh: sections.MeshConfig
  distributed: distributed.DistributedConfig
  rollout: RolloutConfig
  rewards: scoring.RewardConfig
  objective: sections.ObjectiveSettings
  shaping: shapings.ShapingConfig
  optimizer: sections.OptimizerSettings
  train: sections.TrainConfig
  checkpoint: retention.CheckpointConfig
  eval: sections.EvalConfig
  samples: sections.SamplesConfig
  profile: profiler.ProfileConfig
  export: sections.ExportConfig

  def __post_init__(self):
    _check_sections_agree(self)
    _check_weights(self)
    _check_divisions(self)
    _check_mesh(self)
    # Each part checks its own settings when it is made.
    _ = self.objective_config, self.optimizer_config

  @property
  def model_config(self) -> gemma3_config.ModelConfig:
    """The sizes of the network."""
    return self.model.network

  @property
  def lora(self) -> lora.LoraConfig | None:
    """What the adapters are like, or None where the whole model is trained."""
    return self.model.adapters

  @property
  def objective_config(self) -> objectives.ObjectiveConfig:
    """The preset with this run's changes."""
    changes = {
      field.name: getattr(self.objective, field.name)
      for field in dataclasses.fields(objectives.ObjectiveConfig)
    }
    if changes["max_completion_length"] is None:
      changes["max_completion_length"] = self.rollout.max_new_tokens
    changes = {k: v for k, v in changes.items() if v is not None}
    preset = objectives.PRESETS[self.objective.preset]
    return dataclasses.replace(preset, **changes)

  @property
  def advantage_scale(self) -> str:
    """The setting, or what goes with the preset."""
    preset = objectives.ADVANTAGE_SCALES[self.objective.preset]
    return self.objective.advantage_scale or preset

  @property
  def optimizer_config(self) -> optimizers.OptimizerConfig:
    """The settings, with the number of updates of this run."""
    return optimizers.OptimizerConfig(
      num_steps=self.train.num_steps * self.train.num_iterations,
      **dataclasses.asdict(self.optimizer),
    )

  @property
  def has_reference(self) -> bool:
    """Whether a frozen policy scores what the run learns from."""
    kind = self.data.kind
    return kind == "preference" or (
      kind == "online" and self.objective_config.beta > 0
    )

  @property
  def num_rollouts(self) -> int:
    """Parts of a step's prompts, whose completions are sampled in turns."""
    prompts = self.data.prompts_per_step
    return prompts // (self.rollout.prompts_at_a_time or prompts)

  @property
  def num_microbatches(self) -> int:
    """Parts that a step's batch is cut into."""
    return self.data.prompts_per_step // self.train.microbatch_bundles

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, as `run.json` holds them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_config_dict(cls, values: Mapping[str, Any]) -> "Config":
    """The settings in `values`, an `ml_collections.ConfigDict` or the like.

    Raises:
      ValueError: A setting is missing, unknown, of the wrong type, or breaks a
        rule; the message names setting, value, rule and remedy.
    """
    return _build(cls, values, "")


def _build(cls: type, values: Any, where: str) -> Any:
  """A dataclass from a mapping, sections within sections."""
  if not isinstance(values, Mapping) and not hasattr(values, "items"):
    raise ValueError(
      f"{where.rstrip('.')} ({values!r}) must be a section of settings; set "
      f"one of its parts, as in {where}{dataclasses.fields(cls)[0].name}=..."
    )
  hints = typing.get_type_hints(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  given = dict(values.items())
  for name in given:
    if name not in names:
      close = difflib.get_close_matches(name, names, n=1) or names[:1]
      raise ValueError(
        f"{where}{name} ({given[name]!r}) is not a setting; did you mean "
        f"{where}{close[0]}?"
      )
  for name in names:
    if name not in given:
      raise ValueError(
        f"{where}{name} is missing; start the config from configs/base.py, "
        "which gives every setting a value."
      )
  values = {
    name: _value(hints[name], given[name], f"{where}{name}") for name in names
  }
  try:
    return cls(**values)
  except ValueError as error:
    if str(error).startswith(where):
      raise
    # A part that others use too does not know which section it is.
    raise ValueError(
      f"{where}{error} configs/base.py has a value that is."
    ) from error


def _value(hint: Any, value: Any, name: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return _build(typing.cast(type, hint), value, f"{name}.")
  if isinstance(hint, types.UnionType):
    if value is None and types.NoneType in hint.__args__:
      return None
    hint = next(x for x in hint.__args__ if x is not types.NoneType)
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if isinstance(value, list | tuple):
      return tuple(_value(item, x, name) for x in value)
    wanted = f"a tuple of {item.__name__}"
  else:
    if hint is float and type(value) is int:
      return float(value)
    # bool is an int to Python, but True is not a number of steps.
    if type(value) is hint:
      return value
    wanted = hint.__name__
  raise ValueError(
    f"{name} ({value!r}) must be of type {wanted}, not "
    f"{type(value).__name__}; write it as the value in configs/base.py is."
  )


def _check_sections_agree(config: Config) -> None:
  require(
    config.shaping.soft_tokens <= config.rollout.max_new_tokens
    or config.shaping.truncated != "penalise",
    "shaping.soft_tokens",
    config.shaping.soft_tokens,
    f"be at most rollout.max_new_tokens ({config.rollout.max_new_tokens})",
    f"set shaping.soft_tokens={max(1, config.rollout.max_new_tokens // 4)}",
  )
  require(
    config.data.kind == "online" or config.shaping.zero_variance != "resample",
    "shaping.zero_variance",
    config.shaping.zero_variance,
    "not be resample where completions come with the data",
    "set shaping.zero_variance=drop",
  )
  require(
    not config.profile.steps
    or config.profile.steps[-1] <= config.train.num_steps,
    "profile.steps",
    config.profile.steps,
    f"end by train.num_steps ({config.train.num_steps})",
    f"set profile.steps=({config.train.num_steps}, {config.train.num_steps})",
  )
  require(
    0 <= config.seed < 2**31,
    "seed",
    config.seed,
    "be at least 0, and fit in 31 bits",
    "set seed=1",
  )
  require(
    not (config.rollout.image_cache_mib and config.model.train_vision),
    "rollout.image_cache_mib",
    config.rollout.image_cache_mib,
    "be 0 where the tower is trained, whose results change with every step",
    "set rollout.image_cache_mib=0, or model.train_vision=False",
  )
  require(
    not config.data.pan_and_scan.enabled
    or config.model_config.vision is not None,
    "data.pan_and_scan.enabled",
    config.data.pan_and_scan.enabled,
    f"be False for {config.model.name}, which sees no pictures",
    "set data.pan_and_scan.enabled=False",
  )
  require(
    config.data.kind != "online"
    or not config.rewards.weights["format"]
    or "<answer>" in prompts.TEMPLATES[config.data.prompt_template].instruction,
    "rewards.format",
    config.rewards.weights["format"],
    "be 0 where data.prompt_template "
    f"({config.data.prompt_template!r}) does not ask for the <answer> that it "
    "pays",
    "set rewards.format=0.0, or data.prompt_template=tagged",
  )
  metric = config.checkpoint.best_metric
  require(
    not metric
    or (config.eval.every_steps > 0 and registry.is_declared(metric)),
    "checkpoint.best_metric",
    metric,
    "be empty, or a metric of docs/metrics.md, with eval.every_steps "
    f"({config.eval.every_steps}) above 0",
    "set checkpoint.best_metric=eval/accuracy",
  )


def _check_weights(config: Config) -> None:
  """Whether their files, where they have any, are those of the model named."""
  scheme, _, rest = config.model.weights.partition(":")
  if scheme in weights.OPENERS:
    try:
      weights.OPENERS[scheme](config.model_config, rest)
    except ValueError as error:
      raise ValueError(
        f"model.weights ({config.model.weights!r}) must be a checkpoint of "
        f"model.name ({config.model.name!r}): {error} Set either to what the "
        "other is."
      ) from error


def _check_mesh(config: Config) -> None:
  """Whether the mesh divides every parameter, by the rules and no device."""
  mesh = sharding.abstract_mesh(**dataclasses.asdict(config.mesh))
  tree = weights.abstract_params(config.model_config, np.dtype(np.float32))
  sharding.param_shardings(mesh, tree)
  if config.lora:
    adapters = lora.abstract_adapters(config.model_config, config.lora)
    sharding.param_shardings(mesh, adapters)


def _check_divisions(config: Config) -> None:
  shards = config.mesh.replica * config.mesh.fsdp
  for name, value in (
    ("data.prompts_per_step", config.data.prompts_per_step),
    ("train.microbatch_bundles", config.train.microbatch_bundles),
    ("eval.batch_size", config.eval.batch_size),
  ):
    require(
      value % shards == 0,
      name,
      value,
      f"be a multiple of mesh.replica * mesh.fsdp ({shards})",
      f"set {name}={max(1, round(value / shards)) * shards}",
    )
  prompts = config.data.prompts_per_step
  require(
    prompts % config.train.microbatch_bundles == 0,
    "train.microbatch_bundles",
    config.train.microbatch_bundles,
    f"divide data.prompts_per_step ({prompts})",
    f"set train.microbatch_bundles={prompts}",
  )
  at_a_time = config.rollout.prompts_at_a_time
  require(
    at_a_time is None
    or (at_a_time > 0 and at_a_time % shards == 0 and prompts % at_a_time == 0),
    "rollout.prompts_at_a_time",
    at_a_time,
    f"be None, or divide data.prompts_per_step ({prompts}) into multiples of "
    f"mesh.replica * mesh.fsdp ({shards})",
    f"set rollout.prompts_at_a_time={shards}",
  )
  require(
    config.data.kind != "online" or config.rollout.num_generations >= 2,
    "rollout.num_generations",
    config.rollout.num_generations,
    "be at least 2, for an advantage compares completions of one prompt",
    "set rollout.num_generations=8",
  )
