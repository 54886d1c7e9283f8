"""The settings of a run: frozen, typed, checked before a device is touched.

No setting has a default here; `configs/base.py` gives every value. Below
`main` nobody sees a ConfigDict.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines import (
  ablations,
  images,
  pipeline,
  preferences,
  prompts,
  synthetic,
)
from grpo_tpu import (
  distributed,
  metric_table,
  profiling,
  retention,
  sharding,
)
from grpo_tpu import objective as objectives
from grpo_tpu import optimizer as optimizers
from grpo_tpu import shaping as shapings
from grpo_tpu.gemma3 import attention, lora, remat, weights
from grpo_tpu.gemma3 import config as gemma3_config
from grpo_tpu.rewards import scoring

_DTYPES = ("float32", "bfloat16")
_MEMORIES = ("device", "pinned_host")
_WEIGHTS = {
  "random": "random:SEED",
  "run": "run:WORKDIR[@STEP]",
  "hf": "hf:DIR",
  "gemma": "gemma:DIR",
  "gguf": "gguf:FILE",
}


class SettingError(ValueError):
  """A setting, flag or data set that must change before a run can start."""


@contextlib.contextmanager
def refutable() -> Iterator[None]:
  """Around what checks settings: its ValueErrors are the user's to mend."""
  try:
    yield
  except ValueError as error:
    raise SettingError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where problems come from, and how they reach the model.

  Attributes:
    kind: "online" samples completions; "preference" and "demonstrations" take
      those that the data pipeline writes.
    dir: What `data_pipelines.prepare` wrote; "" draws the synthetic set once,
      under the workdir.
    tokenizer: The model's own, as `data_pipelines.tokenizer.Tokenizer` finds
      it; "" takes the small one that lies in the data dir.
    synthetic: What that set is made of.
    synthetic_eval_fraction: Share of its pictures that is held out.
    train_split: Problems to train on.
    eval_split: Problems held out.
    worker_processes: Processes on each host that build training batches; 0 is
      threads, which keep up unless pictures are huge. The batches are the same.
    prompts_per_step: Prompts of a step, over all hosts (`B`).
    prompt_buckets: Ascending lengths, in tokens, that prompts are padded to.
    prompt_template: A key of `prompts.TEMPLATES`: how prompts, in training and
      in evaluation, ask for a reply, and how the replies made here give it.
    shuffle_options: Ask each training row with its options in an order of its
      own; evaluation never does.
    pan_and_scan: Whether long pictures are shown again in crops, in training
      and in evaluation; each costs the tokens of a picture.
    preference_completions: Labelled completions of a prompt, for kind
      "preference".
    preference_file: JSON lines of labelled completions, see
      `data_pipelines.preferences`; "" makes a right one and wrong ones.
    preference_kinds: Which wrong ones, of `preferences.KINDS`.
    preference_rewards: "functions" pays labelled completions as sampled ones
      are paid, "labels" takes the labels for rewards.
    accept_mathvista_training_terms: MathVista's licence prohibits training on
      it; True says that you have read it and may.
  """

  kind: str
  dir: str
  tokenizer: str
  synthetic: synthetic.Spec
  synthetic_eval_fraction: float
  train_split: str
  eval_split: str
  worker_processes: int
  prompts_per_step: int
  prompt_buckets: tuple[int, ...]
  prompt_template: str
  shuffle_options: bool
  pan_and_scan: images.PanAndScan
  preference_completions: int
  preference_file: str
  preference_kinds: tuple[str, ...]
  preference_rewards: str
  accept_mathvista_training_terms: bool


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """Which Gemma 3, from which weights, run how.

  Attributes:
    name: A key of `gemma3.config.CONFIGS`.
    image_size: Side in pixels that pictures are shown at; None is the tower's
      own. At half of it the tower reads a quarter of the patches, and makes as
      many soft tokens. Exports show them at its own.
    weights: "random:SEED"; "run:WORKDIR[@STEP]" for another run's newest (or
      given) checkpoint; "hf:DIR" for a local Hugging Face checkpoint, with
      config.json and *.safetensors; "gemma:DIR" for a checkpoint in the layout
      of the `gemma` library, here or on gs://; "gguf:FILE" for a text size.
    param_dtype: Of the decoder's parameters.
    compute_dtype: Of its matrix products.
    attention: "einsum", "splash" (a kernel for TPUs), or "auto" for splash on
      TPUs and einsum elsewhere.
    remat: What the decoder's layers keep for the backward pass: "none"
      recomputes nothing, "dots" all but the products with weights, "full"
      everything, and "offload" as much, from what the host's memory keeps.
    train_vision: Train the image tower too.
    vision_remat: The same of the image tower, where it is trained.
    lora: Adapters to train in place of the parameters; off at rank 0.
    reference_dtype: Of the matrices of the frozen copy that the whole model is
      compared with; None is `param_dtype`. With compute in bfloat16 a copy in
      bfloat16 scores alike. With adapters there is no copy.
    reference_memory: Where that copy lies: "device", or "pinned_host", from
      where it visits the devices to score.
    logits_chunk: Tokens of a data shard whose logits exist at a time.
  """

  name: str
  image_size: int | None
  weights: str
  param_dtype: str
  compute_dtype: str
  attention: str
  remat: str
  train_vision: bool
  vision_remat: str
  lora: lora.LoraConfig
  reference_dtype: str | None
  reference_memory: str
  logits_chunk: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many ways each mesh axis cuts; the product is the device count."""

  replica: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How completions are sampled.

  Attributes:
    num_generations: Completions per prompt (`G`).
    max_new_tokens: Tokens per completion at most (`T`).
    min_new_tokens: No stop token before this many others, in sampling and in
      training: it is in neither's softmax there.
    temperature: Logits are divided by it, in training too.
    stop_strings: Texts that end a completion as a stop token does, at the first
      token that completes one of them.
    chunk_tokens: Tokens that all rows write before the host looks which go on,
      and whether the run is to be interrupted. The samples are the same.
    prompts_at_a_time: Prompts, over all hosts, whose completions are decoded
      together; divides `data.prompts_per_step`, and None is all of them. The
      samples are the same, and the caches of fewer take less memory.
    pictures_per_shard: Pictures that each data shard's tower reads at a time.
    image_cache_mib: What each process keeps of the tower's results from step to
      step, with a frozen tower; 0 for nothing.
  """

  num_generations: int
  max_new_tokens: int
  min_new_tokens: int
  temperature: float
  stop_strings: tuple[str, ...]
  chunk_tokens: int
  prompts_at_a_time: int | None
  pictures_per_shard: int
  image_cache_mib: int


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
  """A preset, and what is to differ from it; None takes the preset's value.

  Attributes beyond `preset` and the two of the advantages are the fields of
  `objective.ObjectiveConfig`.

  Attributes:
    preset: A key of `objective.PRESETS`.
    advantage_scale: Of `objective.group_advantages`.
    advantage_baseline: Of `objective.group_advantages`.
  """

  preset: str
  advantage_scale: str | None
  advantage_baseline: str
  aggregation: str | None
  importance: str | None
  surrogate: str | None
  epsilon_low: float | None
  epsilon_high: float | None
  dual_clip: float | None
  beta: float | None
  kl_estimator: str | None
  kl_gradient: str | None
  tis_cap: float | None
  max_completion_length: int | None


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """The fields of `optimizer.OptimizerConfig` but `num_steps`."""

  learning_rate: float
  schedule: str
  warmup_steps: int
  end_fraction: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  max_grad_norm: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long, and in what parts.

  Attributes:
    num_steps: Batches of prompts.
    num_iterations: Updates on each batch.
    microbatch_bundles: Prompts, over all hosts, whose activations exist at a
      time; divides `data.prompts_per_step`.
    max_skipped_updates: In a row, for gradients that were not finite, until the
      run is given up.
  """

  num_steps: int
  num_iterations: int
  microbatch_bundles: int
  max_skipped_updates: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation on the held-out split: greedy in training, more by itself.

  Attributes:
    every_steps: Also before the first step and after the last; 0 for never.
    num_problems: The first so many of the split.
    batch_size: Problems decoded together.
    num_samples: Completions that --mode=evaluate samples of each problem, all
      at a time, beside the greedy one; 0 for none.
    temperature: Their logits are divided by it.
    top_k: They are drawn from the likeliest so many tokens; 0 for all.
    top_p: And from the fewest that hold this share; 1.0 for all.
    ks: Of pass@k and maj@k, none above `num_samples`; of no matter without.
    ablations: Of `ablations.KINDS`: what --mode=evaluate does to the pictures
      in evaluations of their own.
    num_examples: Failures that its report shows.
  """

  every_steps: int
  num_problems: int
  batch_size: int
  num_samples: int
  temperature: float
  top_k: int
  top_p: float
  ks: tuple[int, ...]
  ablations: tuple[str, ...]
  num_examples: int


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
  """Completions to look at: how often, and how many."""

  every_steps: int
  count: int


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """What --mode=export writes.

  Attributes:
    step: Of the workdir's checkpoints; None for the newest, or for
      `model.weights` where there is none.
    dtype: Of all tensors.
    tokenizer_dir: Whose tokenizer and processor files go along; "" takes those
      of an "hf:DIR" in `model.weights`, if it is one.
    adapter: Whether a run's adapters go out alone, in fp32 and for peft, rather
      than merged into what they belong to.
  """

  step: int | None
  dtype: str
  tokenizer_dir: str
  adapter: bool


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
  data: DataConfig
  model: ModelSettings
  mesh: MeshConfig
  distributed: distributed.DistributedConfig
  rollout: RolloutConfig
  rewards: scoring.RewardConfig
  objective: ObjectiveSettings
  shaping: shapings.ShapingConfig
  optimizer: OptimizerSettings
  train: TrainConfig
  checkpoint: retention.CheckpointConfig
  eval: EvalConfig
  samples: SamplesConfig
  profile: profiling.ProfileConfig
  export: ExportConfig

  def __post_init__(self):
    _check_numbers(self)
    _check_names(self)
    _check_weights(self)
    _check_divisions(self)
    _check_mesh(self)
    _check_evaluation(self.eval)
    _check_best(self)
    _check_lora(self)
    # Each part checks its own settings when it is made.
    _ = self.objective_config, self.optimizer_config

  @property
  def model_config(self) -> gemma3_config.ModelConfig:
    """The model's sizes."""
    model, size = gemma3_config.CONFIGS[self.model.name], self.model.image_size
    if size is None or model.vision is None:
      return model
    tower = dataclasses.replace(model.vision, input_size=size)
    return dataclasses.replace(model, vision=tower)

  @property
  def lora(self) -> lora.LoraConfig | None:
    """What the adapters are like, or None where the whole model is trained."""
    return self.model.lora if self.model.lora.rank else None

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
  settings = {
    name: _value(hints[name], given[name], f"{where}{name}") for name in names
  }
  try:
    return cls(**settings)
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


def _require(holds: bool, name: str, value: Any, rule: str, remedy: str):
  if not holds:
    raise ValueError(f"{name} ({value!r}) must {rule}; {remedy}.")


def _check_numbers(config: Config) -> None:
  for name, least in (
    ("seed", 0),
    ("data.worker_processes", 0),
    ("data.prompts_per_step", 1),
    ("data.preference_completions", 2),
    ("model.logits_chunk", 1),
    ("mesh.replica", 1),
    ("mesh.fsdp", 1),
    ("mesh.tensor", 1),
    ("rollout.num_generations", 1),
    ("rollout.max_new_tokens", 1),
    ("rollout.min_new_tokens", 0),
    ("rollout.chunk_tokens", 1),
    ("rollout.pictures_per_shard", 1),
    ("rollout.image_cache_mib", 0),
    ("train.num_steps", 1),
    ("train.num_iterations", 1),
    ("train.microbatch_bundles", 1),
    ("train.max_skipped_updates", 1),
    ("eval.every_steps", 0),
    ("eval.num_problems", 1),
    ("eval.batch_size", 1),
    ("eval.num_samples", 0),
    ("eval.top_k", 0),
    ("eval.num_examples", 0),
    ("samples.every_steps", 0),
    ("samples.count", 0),
  ):
    value = config
    for part in name.split("."):
      value = getattr(value, part)
    _require(
      typing.cast(int, value) >= least,
      name,
      value,
      f"be at least {least}",
      f"set {name}={max(least, 1)}",
    )
  _require(
    config.shaping.soft_tokens <= config.rollout.max_new_tokens
    or config.shaping.truncated != "penalise",
    "shaping.soft_tokens",
    config.shaping.soft_tokens,
    f"be at most rollout.max_new_tokens ({config.rollout.max_new_tokens})",
    f"set shaping.soft_tokens={max(1, config.rollout.max_new_tokens // 4)}",
  )
  _require(
    config.data.kind == "online" or config.shaping.zero_variance != "resample",
    "shaping.zero_variance",
    config.shaping.zero_variance,
    "not be resample where completions come with the data",
    "set shaping.zero_variance=drop",
  )
  _require(
    config.export.step is None or config.export.step >= 0,
    "export.step",
    config.export.step,
    "be a step that was saved, or None for the newest",
    "leave it out",
  )
  _require(
    not config.profile.steps
    or config.profile.steps[-1] <= config.train.num_steps,
    "profile.steps",
    config.profile.steps,
    f"end by train.num_steps ({config.train.num_steps})",
    f"set profile.steps=({config.train.num_steps}, {config.train.num_steps})",
  )
  _require(
    config.seed < 2**31,
    "seed",
    config.seed,
    "fit in 31 bits",
    "choose a smaller one",
  )
  _require(
    0 < config.rollout.temperature < float("inf"),
    "rollout.temperature",
    config.rollout.temperature,
    "be above 0 and finite, for training needs the odds of what was sampled",
    "set rollout.temperature=1.0",
  )
  _require(
    config.rollout.min_new_tokens < config.rollout.max_new_tokens,
    "rollout.min_new_tokens",
    config.rollout.min_new_tokens,
    f"be below rollout.max_new_tokens ({config.rollout.max_new_tokens})",
    "set rollout.min_new_tokens=0",
  )
  _require(
    all(config.rollout.stop_strings),
    "rollout.stop_strings",
    config.rollout.stop_strings,
    "not hold an empty text, which every completion does",
    "set rollout.stop_strings=()",
  )
  _require(
    not (config.rollout.image_cache_mib and config.model.train_vision),
    "rollout.image_cache_mib",
    config.rollout.image_cache_mib,
    "be 0 where the tower is trained, whose results change with every step",
    "set rollout.image_cache_mib=0, or model.train_vision=False",
  )
  _require(
    0 < config.data.synthetic_eval_fraction < 1,
    "data.synthetic_eval_fraction",
    config.data.synthetic_eval_fraction,
    "be between 0 and 1",
    "set data.synthetic_eval_fraction=0.1",
  )
  buckets = config.data.prompt_buckets
  _require(
    bool(buckets)
    and buckets[0] > 0
    and all(a < b for a, b in zip(buckets, buckets[1:], strict=False)),
    "data.prompt_buckets",
    buckets,
    "be ascending lengths in tokens",
    "set data.prompt_buckets=(128, 512)",
  )


def _check_evaluation(settings: EvalConfig) -> None:
  _require(
    0 < settings.temperature < float("inf"),
    "eval.temperature",
    settings.temperature,
    "be above 0 and finite; the greedy answer is always asked for besides",
    "set eval.temperature=1.0",
  )
  _require(
    0 < settings.top_p <= 1,
    "eval.top_p",
    settings.top_p,
    "be above 0 and at most 1",
    "set eval.top_p=1.0",
  )
  most = settings.num_samples or float("inf")
  _require(
    list(settings.ks) == sorted({k for k in settings.ks if 1 <= k <= most}),
    "eval.ks",
    settings.ks,
    f"ascend from at least 1 to at most eval.num_samples "
    f"({settings.num_samples})",
    f"set eval.ks=(1, {settings.num_samples})"
    if settings.num_samples > 1
    else "set eval.ks=(1,)",
  )
  kinds = settings.ablations
  _require(
    set(kinds) <= set(ablations.KINDS) and len(set(kinds)) == len(kinds),
    "eval.ablations",
    kinds,
    f"be different ones of {', '.join(ablations.KINDS)}",
    f"set eval.ablations={ablations.KINDS}",
  )


def _check_best(config: Config) -> None:
  metric = config.checkpoint.best_metric
  _require(
    not metric
    or (config.eval.every_steps > 0 and metric_table.is_declared(metric)),
    "checkpoint.best_metric",
    metric,
    "be empty, or a metric of docs/metrics.md, with eval.every_steps "
    f"({config.eval.every_steps}) above 0",
    "set checkpoint.best_metric=eval/accuracy",
  )


def _check_lora(config: Config) -> None:
  if config.lora is None:
    return
  _require(
    not config.model.train_vision,
    "model.train_vision",
    config.model.train_vision,
    f"be False with adapters (model.lora.rank={config.lora.rank}), which leave "
    "the tower as it is",
    "set model.train_vision=False, or model.lora.rank=0",
  )
  for name, value, plain in (
    ("model.reference_dtype", config.model.reference_dtype, None),
    ("model.reference_memory", config.model.reference_memory, "device"),
  ):
    _require(
      value == plain,
      name,
      value,
      f"be {plain} with adapters (model.lora.rank={config.lora.rank}), for the "
      "reference is what lies under them and no copy of it",
      f"set {name}={plain}, or model.lora.rank=0",
    )
  lora.abstract_adapters(config.model_config, config.lora)


def _check_names(config: Config) -> None:
  for name, value, choices in (
    ("data.kind", config.data.kind, pipeline.KINDS),
    (
      "data.prompt_template",
      config.data.prompt_template,
      tuple(prompts.TEMPLATES),
    ),
    (
      "data.preference_rewards",
      config.data.preference_rewards,
      ("functions", "labels"),
    ),
    ("model.name", config.model.name, tuple(gemma3_config.CONFIGS)),
    ("model.param_dtype", config.model.param_dtype, _DTYPES),
    ("model.compute_dtype", config.model.compute_dtype, _DTYPES),
    ("model.attention", config.model.attention, attention.KINDS),
    ("model.remat", config.model.remat, remat.POLICIES),
    ("model.vision_remat", config.model.vision_remat, remat.POLICIES),
    ("export.dtype", config.export.dtype, _DTYPES),
    (
      "model.reference_dtype",
      config.model.reference_dtype or config.model.param_dtype,
      _DTYPES,
    ),
    ("model.reference_memory", config.model.reference_memory, _MEMORIES),
    ("objective.preset", config.objective.preset, tuple(objectives.PRESETS)),
    (
      "objective.advantage_scale",
      config.advantage_scale
      if config.objective.preset in objectives.PRESETS
      else "group",
      ("group", "batch", "none"),
    ),
    (
      "objective.advantage_baseline",
      config.objective.advantage_baseline,
      ("mean", "leave_one_out"),
    ),
  ):
    close = difflib.get_close_matches(value, choices, n=1) or choices[:1]
    _require(
      value in choices,
      name,
      value,
      f"be one of {', '.join(choices)}",
      f"set {name}={close[0]}",
    )
  _check_image_size(config)
  _require(
    not config.data.pan_and_scan.enabled
    or config.model_config.vision is not None,
    "data.pan_and_scan.enabled",
    config.data.pan_and_scan.enabled,
    f"be False for {config.model.name}, which sees no pictures",
    "set data.pan_and_scan.enabled=False",
  )
  kinds = config.data.preference_kinds
  _require(
    bool(kinds)
    and set(kinds) <= set(preferences.KINDS)
    and len(set(kinds)) == len(kinds),
    "data.preference_kinds",
    kinds,
    f"be one or more of {', '.join(preferences.KINDS)}, each once",
    f"set data.preference_kinds={preferences.DEFAULT_KINDS}",
  )
  _require(
    not (config.data.shuffle_options and config.data.preference_file),
    "data.shuffle_options",
    config.data.shuffle_options,
    "be False with a data.preference_file, whose completions name options by "
    "the letters they had",
    "set data.shuffle_options=False",
  )
  _require(
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


def _check_image_size(config: Config) -> None:
  """Whether the tower can read such pictures, and pool them."""
  tower, size = (
    gemma3_config.CONFIGS[config.model.name].vision,
    config.model.image_size,
  )
  if size is None:
    return
  remedy = "leave it out, for the tower's own"
  if tower is None:
    rule = f"be None for {config.model.name}, which sees no pictures"
    _require(False, "model.image_size", size, rule, remedy)
    return
  unit = tower.patch_size * round(tower.soft_tokens**0.5)
  _require(
    size > 0 and size % unit == 0,
    "model.image_size",
    size,
    f"be a multiple of {unit}, a patch for each soft token of a side",
    f"set model.image_size={max(1, round(size / unit)) * unit}",
  )


def _check_weights(config: Config) -> None:
  """Whether the scheme is one, and its files are those of the model named."""
  scheme, colon, rest = config.model.weights.partition(":")
  _require(
    scheme in _WEIGHTS
    and bool(colon and rest)
    and (scheme != "random" or rest.isdecimal()),
    "model.weights",
    config.model.weights,
    f"be one of {', '.join(_WEIGHTS.values())}",
    "set model.weights=random:0",
  )
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
  sharding.shardings(mesh, tree)
  if config.lora:
    adapters = lora.abstract_adapters(config.model_config, config.lora)
    sharding.shardings(mesh, adapters)


def _check_divisions(config: Config) -> None:
  shards = config.mesh.replica * config.mesh.fsdp
  for name, value in (
    ("data.prompts_per_step", config.data.prompts_per_step),
    ("train.microbatch_bundles", config.train.microbatch_bundles),
    ("eval.batch_size", config.eval.batch_size),
  ):
    _require(
      value % shards == 0,
      name,
      value,
      f"be a multiple of mesh.replica * mesh.fsdp ({shards})",
      f"set {name}={max(1, round(value / shards)) * shards}",
    )
  prompts = config.data.prompts_per_step
  _require(
    prompts % config.train.microbatch_bundles == 0,
    "train.microbatch_bundles",
    config.train.microbatch_bundles,
    f"divide data.prompts_per_step ({prompts})",
    f"set train.microbatch_bundles={prompts}",
  )
  at_a_time = config.rollout.prompts_at_a_time
  _require(
    at_a_time is None
    or (at_a_time > 0 and at_a_time % shards == 0 and prompts % at_a_time == 0),
    "rollout.prompts_at_a_time",
    at_a_time,
    f"be None, or divide data.prompts_per_step ({prompts}) into multiples of "
    f"mesh.replica * mesh.fsdp ({shards})",
    f"set rollout.prompts_at_a_time={shards}",
  )
  _require(
    config.data.kind != "online" or config.rollout.num_generations >= 2,
    "rollout.num_generations",
    config.rollout.num_generations,
    "be at least 2, for an advantage compares completions of one prompt",
    "set rollout.num_generations=8",
  )
