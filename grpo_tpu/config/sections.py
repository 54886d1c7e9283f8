"""The sections of a run's settings: frozen, typed, each held to its own rules.

What two sections must agree on is for `config`, which puts them together.
"""

import dataclasses

from data_pipelines import images, prompt_rows
from data_pipelines.preferences import completions
from data_pipelines.scoring import ablations
from data_pipelines.sources import synthetic
from data_pipelines.text import chat_prompts
from data_pipelines.validation import require, require_at_least, require_one_of
from grpo_tpu.models.settings import DTYPES
from grpo_tpu.rl import objective as objectives


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where problems come from, and how they reach the model.

  Attributes:
    kind: "online" samples completions; "preference" and "demonstrations" take
      those that the data pipeline writes.
    dir: What `data_pipelines.prepare` wrote; "" draws the synthetic set once,
      under the workdir.
    tokenizer: The model's own, as `data_pipelines.text.tokenizer.Tokenizer`
      finds it; "" takes the small one that lies in the data dir.
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
      `data_pipelines.preferences.completions`; "" makes a right one and wrong
      ones.
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

  def __post_init__(self):
    require_at_least(self, "data", worker_processes=0, prompts_per_step=1)
    require_at_least(self, "data", preference_completions=2)
    require_one_of("data.kind", self.kind, prompt_rows.KINDS)
    require_one_of(
      "data.prompt_template",
      self.prompt_template,
      tuple(chat_prompts.TEMPLATES),
    )
    require_one_of(
      "data.preference_rewards",
      self.preference_rewards,
      ("functions", "labels"),
    )
    require(
      0 < self.synthetic_eval_fraction < 1,
      "data.synthetic_eval_fraction",
      self.synthetic_eval_fraction,
      "be between 0 and 1",
      "set data.synthetic_eval_fraction=0.1",
    )
    buckets = self.prompt_buckets
    require(
      bool(buckets)
      and buckets[0] > 0
      and all(a < b for a, b in zip(buckets, buckets[1:], strict=False)),
      "data.prompt_buckets",
      buckets,
      "be ascending lengths in tokens",
      "set data.prompt_buckets=(128, 512)",
    )
    kinds = self.preference_kinds
    require(
      bool(kinds)
      and set(kinds) <= set(completions.KINDS)
      and len(set(kinds)) == len(kinds),
      "data.preference_kinds",
      kinds,
      f"be one or more of {', '.join(completions.KINDS)}, each once",
      f"set data.preference_kinds={completions.DEFAULT_KINDS}",
    )
    require(
      not (self.shuffle_options and self.preference_file),
      "data.shuffle_options",
      self.shuffle_options,
      "be False with a data.preference_file, whose completions name options by "
      "the letters they had",
      "set data.shuffle_options=False",
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many ways each mesh axis cuts; the product is the device count."""

  replica: int
  fsdp: int
  tensor: int

  def __post_init__(self):
    require_at_least(self, "mesh", replica=1, fsdp=1, tensor=1)


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

  def __post_init__(self):
    require_one_of("objective.preset", self.preset, tuple(objectives.PRESETS))
    if self.advantage_scale is not None:
      require_one_of(
        "objective.advantage_scale",
        self.advantage_scale,
        ("group", "batch", "none"),
      )
    require_one_of(
      "objective.advantage_baseline",
      self.advantage_baseline,
      ("mean", "leave_one_out"),
    )


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

  def __post_init__(self):
    require_at_least(
      self,
      "train",
      num_steps=1,
      num_iterations=1,
      microbatch_bundles=1,
      max_skipped_updates=1,
    )


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

  def __post_init__(self):
    require_at_least(
      self,
      "eval",
      every_steps=0,
      num_problems=1,
      batch_size=1,
      num_samples=0,
      top_k=0,
      num_examples=0,
    )
    require(
      0 < self.temperature < float("inf"),
      "eval.temperature",
      self.temperature,
      "be above 0 and finite; the greedy answer is always asked for besides",
      "set eval.temperature=1.0",
    )
    require(
      0 < self.top_p <= 1,
      "eval.top_p",
      self.top_p,
      "be above 0 and at most 1",
      "set eval.top_p=1.0",
    )
    most = self.num_samples or float("inf")
    require(
      list(self.ks) == sorted({k for k in self.ks if 1 <= k <= most}),
      "eval.ks",
      self.ks,
      f"ascend from at least 1 to at most eval.num_samples "
      f"({self.num_samples})",
      f"set eval.ks=(1, {self.num_samples})"
      if self.num_samples > 1
      else "set eval.ks=(1,)",
    )
    kinds = self.ablations
    require(
      set(kinds) <= set(ablations.KINDS) and len(set(kinds)) == len(kinds),
      "eval.ablations",
      kinds,
      f"be different ones of {', '.join(ablations.KINDS)}",
      f"set eval.ablations={ablations.KINDS}",
    )


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
  """Completions to look at: how often, and how many."""

  every_steps: int
  count: int

  def __post_init__(self):
    require_at_least(self, "samples", every_steps=0, count=0)


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

  def __post_init__(self):
    require_one_of("export.dtype", self.dtype, DTYPES)
    require(
      self.step is None or self.step >= 0,
      "export.step",
      self.step,
      "be a step that was saved, or None for the newest",
      "leave it out",
    )
