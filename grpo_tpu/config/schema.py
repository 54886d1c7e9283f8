"""The settings of a run: frozen, typed, checked before a device is touched.

No setting has a default here; `defaults.get_config` gives every value. Below
`main` nobody sees a ConfigDict. This module does not import JAX, so that the
settings can be read in a moment; the checks that need it do.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from data_pipelines.settings import DataConfig, ModelInputs
from data_pipelines.storage import paths
from data_pipelines.text import chat_prompts
from data_pipelines.validation import SettingError, require, require_all
from grpo_tpu.checkpoint.settings import CheckpointConfig, ExportConfig
from grpo_tpu.config import eval_metrics, parse, sections
from grpo_tpu.distributed.settings import DistributedConfig, MeshConfig
from grpo_tpu.models.gemma3.config import ModelConfig
from grpo_tpu.models.settings import LoraConfig, ModelSettings
from grpo_tpu.rewards.settings import COMPONENTS, RewardConfig
from grpo_tpu.rl.settings import (
  CollectorConfig,
  LearnerConfig,
  ObjectiveConfig,
  ObjectiveSettings,
  OptimizerConfig,
  OptimizerSettings,
  ShapingConfig,
)
from grpo_tpu.rollout.settings import RolloutConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """A run. `from_config_dict` reads it; each section documents its settings.

  Attributes:
    seed: Seed of everything random.
    compilation_cache_dir: Folder, on a disk or in a bucket, that keeps compiled
      programs between runs, unless `$JAX_COMPILATION_CACHE_DIR` names another;
      "" keeps none.
  """

  seed: int
  compilation_cache_dir: str
  data: DataConfig
  model: ModelSettings
  mesh: MeshConfig
  distributed: DistributedConfig
  rollout: RolloutConfig
  rewards: RewardConfig
  objective: ObjectiveSettings
  shaping: ShapingConfig
  optimizer: OptimizerSettings
  train: sections.TrainConfig
  checkpoint: CheckpointConfig
  eval: sections.EvalConfig
  samples: sections.SamplesConfig
  profile: sections.ProfileConfig
  export: ExportConfig

  def __post_init__(self):
    if self.objective.is_reward_model and not self.model.head:
      model = dataclasses.replace(self.model, head="score")
      object.__setattr__(self, "model", model)
    _check_run(self)
    _check_images(self)
    _check_reward_model(self)
    _check_rewards(self)
    check_weights(self, is_remote=False)
    _check_divisions(self)
    _check_mesh(self)
    # Both check their values when they are built.
    _ = self.objective_config, self.optimizer_config

  @property
  def model_config(self) -> ModelConfig:
    """The sizes of the network."""
    return self.model.network

  @property
  def model_inputs(self) -> ModelInputs:
    """The inputs of the model, for the data pipeline."""
    vision, is_paired = self.model_config.vision, self.data.kind == "preference"
    has_labels = is_paired and (
      self.data.preference_rewards == "labels" or self.objective.is_reward_model
    )
    return ModelInputs(
      name=self.model.name,
      weights=self.model.weights,
      hub_name=self.model.hub_name,
      vocab_size=self.model_config.vocab_size,
      image_size=vision.shown_size if vision else 0,
      soft_tokens=vision.soft_tokens if vision else 0,
      max_new_tokens=self.rollout.max_new_tokens,
      rewards_unchecked=has_labels
      or self.rewards.rewards_unchecked
      or self.distills,
    )

  @property
  def lora(self) -> LoraConfig | None:
    """The adapters, or None if the whole model is trained."""
    return self.model.adapters

  @property
  def objective_config(self) -> ObjectiveConfig:
    """The preset of the objective with this run's changes."""
    return self.objective.resolve(self.rollout.max_new_tokens)

  @property
  def optimizer_config(self) -> OptimizerConfig:
    """The settings, with the number of updates of this run."""
    return OptimizerConfig(
      num_steps=self.train.num_steps * self.train.num_iterations,
      **dataclasses.asdict(self.optimizer),
    )

  @property
  def collector_config(self) -> CollectorConfig:
    """How a batch of experience is made."""
    shaping, separate = self.shaping, {}
    if self.distills and not self.rewards.term_weights:
      # The teacher teaches groups of equal rewards, which are logged only.
      shaping = dataclasses.replace(shaping, zero_variance="keep")
    kind, labels = self.data.kind, self.data.preference_rewards == "labels"
    is_apart = self.objective.reward_aggregation == "normalize_then_sum"
    if is_apart and not (kind == "preference" and labels):
      separate = dict(self.rewards.term_weights)
      if kind == "online" and shaping.truncated == "penalise":
        separate["length_penalty"] = 1.0
    return CollectorConfig(
      kind=self.data.kind,
      rewards=self.rewards,
      shaping=shaping,
      advantage_scale=self.objective.scale,
      advantage_baseline=self.objective.advantage_baseline,
      separate_weights=tuple(separate.items()),
      num_parts=self.num_rollouts,
      label_rewards=labels,
      is_reward_model=self.objective.is_reward_model,
      keeps_pixels=self.distills and not self.model.train_vision,
    )

  @property
  def learner_config(self) -> LearnerConfig:
    """The settings of an update, besides the network."""
    objective = self.objective_config
    if self.objective.is_reward_model:
      objective = self.objective.pairs
    return LearnerConfig(
      objective=None if self.data.kind == "demonstrations" else objective,
      optimizer=self.optimizer_config,
      shaping=self.shaping,
      num_microbatches=self.num_microbatches,
    )

  @property
  def has_reference(self) -> bool:
    """True if a frozen reference model scores the training batches."""
    kind = self.data.kind
    if self.objective.is_reward_model or self.distills:
      return False
    return kind == "preference" or (
      kind == "online" and self.objective_config.beta > 0
    )

  @property
  def distills(self) -> bool:
    """True if a teacher teaches."""
    return bool(self.objective.teacher)

  @functools.cached_property
  def teacher(self) -> ModelSettings:
    """The model that `objective.teacher` names, read from its files."""
    from grpo_tpu.checkpoint import networks

    name, model = self.objective.teacher, self.model
    dtype = self.rewards.network_dtype or model.param_dtype
    like = dataclasses.replace(model, param_dtype=dtype)
    found = networks.read_settings(name, like, setting="objective.teacher")
    if found.network.vision and not name.startswith("run:"):
      return dataclasses.replace(found, image_size=model.image_size)
    return found

  @property
  def needs_start(self) -> bool:
    """True if what the policy started from is kept, as reference or judge."""
    judges = (weights for weights, *_ in self.rewards.judges)
    return self.has_reference or "self" in judges

  @property
  def num_rollouts(self) -> int:
    """Parts of a step's prompts, which are decoded one after the other."""
    prompts = self.data.prompts_per_step
    return prompts // (self.rollout.prompts_at_a_time or prompts)

  @property
  def num_microbatches(self) -> int:
    """Parts of a step's batch."""
    return self.data.prompts_per_step // self.train.microbatch_bundles

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, as the user set them."""
    return dataclasses.asdict(self)

  def to_resolved_dict(self) -> dict[str, Any]:
    """These settings with the values of the presets, for `run.json`."""
    values = self.to_dict()
    values["objective"] |= dataclasses.asdict(self.objective_config)
    values["objective"]["advantage_scale"] = self.objective.scale
    weights = self.rewards.weights
    values["rewards"] |= {name: weights[name] for name in COMPONENTS}
    values["rewards"]["gate_heuristics"] = self.rewards.is_gated
    return values

  @classmethod
  def from_config_dict(cls, values: Mapping[str, Any]) -> "Config":
    """Reads an `ml_collections.ConfigDict` or another nested mapping.

    Raises:
      ValueError: A setting is missing, unknown, of the wrong type, or breaks a
        rule; the message names setting, value, rule and remedy.
    """
    return parse.build_section(cls, values)


def _check_run(config: Config) -> None:
  """Checks the seed, paths, steps and metrics of the run."""
  # Stays as it is written, for run.json: a resume may have another home.
  paths.expand_path("compilation_cache_dir", config.compilation_cache_dir)
  num_steps = config.train.num_steps
  ends = all(step <= num_steps for step in config.profile.steps)
  rule = f"end by train.num_steps ({num_steps})"
  require_all(
    *(config, ""),
    ("seed", config.seed >= 0, "be at least 0", 1),
    ("profile.steps", ends, rule, (num_steps, num_steps)),
  )
  eval_metrics.check(
    *(config.eval, config.data, config.train, config.checkpoint),
    is_reward_model=config.objective.is_reward_model,
  )


def _check_images(config: Config) -> None:
  """Checks the settings that only a model with an image tower has."""
  vision, data = config.model_config.vision, config.data
  caches = config.rollout.image_cache_mib and config.model.train_vision
  tower_rule = "be 0 if the image tower is trained, which changes its results"
  has_crops = data.pan_and_scan.enabled and not vision
  crops_rule = f"be False for {config.model.name}, a text model"
  most = max(1, data.prompt_buckets[-1] // vision.soft_tokens) if vision else 1
  rule = (
    f"be at most {most}: no more fit into the last of data.prompt_buckets "
    f"({data.prompt_buckets[-1]}) of {config.model.name}"
  )
  remedy = "0, or model.train_vision=False"
  require_all(
    *(config, ""),
    ("rollout.image_cache_mib", not caches, f"{tower_rule} every step", remedy),
    ("data.pan_and_scan.enabled", not has_crops, crops_rule, False),
    ("data.images_per_prompt", data.images_per_prompt <= most, rule, most),
  )


def _check_reward_model(config: Config) -> None:
  """Checks that a model with a score is trained on pairs, and no other is."""
  trains, kind = config.objective.is_reward_model, config.data.kind
  remedy = "set data.kind=preference and objective.preset=bradley_terry"
  rule = f"be preference to train a reward model ({config.objective.preset})"
  require(not trains or kind == "preference", "data.kind", kind, rule, remedy)
  rule = "be '' for a language model"
  head = config.model.head
  require(trains or not head, "model.head", head, rule, remedy)


def _check_rewards(config: Config) -> None:
  """Checks rewards and their shaping against the prompts and completions."""
  length, shaping = config.rollout.max_new_tokens, config.shaping
  is_online = config.data.kind == "online"
  teacher, has_rewards = config.distills, bool(config.rewards.term_weights)
  compares = is_online and (has_rewards or not teacher)
  can_compare = config.rollout.num_generations >= 2 or not compares
  bounded = shaping.sampler_ratio_bounds or shaping.off_policy_bound is not None
  bounds_rule = "be () if completions come with the data, as "
  bounds_rule += "shaping.off_policy_bound be None"
  fits = shaping.soft_tokens <= length or shaping.truncated != "penalise"
  tokens_rule = f"be at most rollout.max_new_tokens ({length})"
  can_draw = is_online or shaping.zero_variance != "resample"
  variance_rule = "not be resample if completions come with the data"
  pair = "be at least 2, for an advantage compares completions of one prompt"
  has_kl = config.objective_config.beta > 0 or not teacher
  teaches = (
    not is_online or has_rewards or teacher or config.rewards.preset != "none"
  )
  none_rule = "name a reward where no teacher teaches"
  require_all(
    *(config, ""),
    ("data.kind", is_online or not teacher, "be online to distill", "online"),
    ("objective.beta", has_kl, "be above 0 to distill", 1.0),
    ("rewards.preset", bool(teaches), none_rule, "answer"),
    ("shaping.soft_tokens", fits, tokens_rule, max(1, length // 4)),
    ("shaping.zero_variance", can_draw, variance_rule, "drop"),
    ("rollout.num_generations", can_compare, pair, 8),
    ("shaping.sampler_ratio_bounds", is_online or not bounded, bounds_rule, ()),
  )
  weight, name = config.rewards.weights["format"], config.data.prompt_template
  asks = chat_prompts.asks_for_tag(name)
  require(
    asks or not weight or not is_online,
    "rewards.format",
    weight,
    f"be 0 if data.prompt_template ({name!r}) does not ask for the <answer> "
    "tag that it rewards",
    "set rewards.format=0.0, or data.prompt_template=tagged",
  )


def _check_teacher(config: Config) -> None:
  """Checks that the teacher can read what the policy samples."""
  ours, teacher = config.model_config, config.teacher
  theirs = teacher.network
  named = "objective.teacher", teacher.weights
  is_ours = theirs.vocab_size == ours.vocab_size and not theirs.has_score
  rule = f"be a language model with the ids of {config.model.name}"
  require(is_ours, *named, rule, "")
  size, shown = (x.vision and x.vision.shown_size for x in (ours, theirs))
  fits = not (size and shown) or size == shown
  rule = f"read images of the policy's {size} pixels, and not of {shown}"
  require(fits, *named, rule, f"set model.image_size={teacher.image_size}")
  _check_mesh(config, theirs)


def check_weights(config: Config, *, is_remote: bool) -> None:
  """Checks that the files of weights, adapters and teacher fit the model.

  Those in a bucket are checked when a mode is about to read them.
  """
  adapters = config.model.lora.init
  if adapters and paths.is_remote(adapters.removeprefix("peft:")) == is_remote:
    from grpo_tpu.models.gemma3.convert import peft

    peft.check(config.model_config, config.model.lora)
  teacher = config.objective.teacher.partition(":")[2]
  if teacher and paths.is_remote(teacher) == is_remote:
    _check_teacher(config)
  named, name = config.model.weights, config.model.name
  scheme, _, rest = named.partition(":")
  has_files = scheme not in ("", "random", "run")
  if not has_files or paths.is_remote(rest) != is_remote:
    return
  from grpo_tpu.models.gemma3 import weights

  try:
    weights.open_files(scheme, config.model_config, rest)
  except SettingError:
    raise
  except ValueError as error:
    remedy = "Change one of the two."
    if scheme == "hf" and isinstance(error.__cause__, FileNotFoundError):
      repository = config.model.hub_name or "google/gemma-3-SIZE-it"
      folder = "DIR" if is_remote else rest
      copy = f" && gcloud storage cp DIR/*.* {rest}/" * is_remote
      remedy = (
        f"Get one by: hf download {repository} --local-dir {folder}{copy}"
      )
    raise ValueError(
      f"model.weights ({named!r}) must be a checkpoint of model.name "
      f"({name!r}): {error} {remedy}"
    ) from error


def _check_mesh(config: Config, network: ModelConfig | None = None) -> None:
  """Checks, without devices, that the mesh divides every parameter.

  Those are the policy's, with its adapters, unless another network is given.
  """
  import numpy as np

  from grpo_tpu.distributed import sharding
  from grpo_tpu.models.gemma3 import lora, weights

  mesh = sharding.abstract_mesh(**dataclasses.asdict(config.mesh))
  sizes = network or config.model_config
  tree = weights.abstract_params(sizes, np.dtype(np.float32))
  sharding.param_shardings(mesh, tree)
  if config.lora and not network:
    adapters = lora.abstract_adapters(config.model_config, config.lora)
    sharding.param_shardings(mesh, adapters)


def _check_divisions(config: Config) -> None:
  """Checks that batches divide into microbatches, rollouts and shards."""
  shards = config.mesh.replica * config.mesh.fsdp
  prompts = config.data.prompts_per_step
  bundles = config.train.microbatch_bundles
  part = config.rollout.prompts_at_a_time
  sizes = {
    "data.prompts_per_step": prompts,
    "train.microbatch_bundles": bundles,
    "eval.batch_size": config.eval.batch_size,
  }
  multiple = f"of mesh.replica * mesh.fsdp ({shards})"
  rule = f"be a multiple {multiple}"
  divisor = f"divide data.prompts_per_step ({prompts})"
  fits = bool(part and part > 0 and part % shards == prompts % part == 0)
  parts = f"be None, or {divisor} into multiples {multiple}"
  require_all(
    *(config, ""),
    *(
      (name, size % shards == 0, rule, max(1, round(size / shards)) * shards)
      for name, size in sizes.items()
    ),
    ("train.microbatch_bundles", prompts % bundles == 0, divisor, prompts),
    ("rollout.prompts_at_a_time", part is None or fits, parts, shards),
  )
