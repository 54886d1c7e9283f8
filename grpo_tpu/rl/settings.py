"""Settings of the loss, of what an update counts, and of the optimizer."""

from dataclasses import dataclass, field, fields, replace

from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  one_of,
  require_all,
)
from grpo_tpu.models.settings import expand_weights
from grpo_tpu.rewards.scoring import RewardConfig

ADVANTAGE_SCALES = ("group", "batch", "none")
ADVANTAGE_BASELINES = ("mean", "leave_one_out")
REWARD_AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


@dataclass(frozen=True)
class ObjectiveConfig:
  """The loss; docs/objective.md has the formula of each choice.

  Attributes:
    aggregation: The divisor of the sum over tokens, always of the whole
      optimizer batch. "token_mean": the number of unmasked tokens.
      "sequence_mean": each row's own number of tokens, then the number of rows.
      "constant": the number of rows times `max_completion_length`.
    importance: "token": each token has its own ratio. "sequence": a row has
      one ratio, exp of its mean log-ratio, and the gradient flows through the
      mean.
    surrogate: "clip": the pessimistic minimum of ratio and clipped ratio.
      "cispo": REINFORCE weighted by the capped ratio, without its gradient.
      "sapo": a sigmoid of the ratio, which cuts off no token's gradient.
    epsilon_low: How far below 1 the ratio may go, in (0, 1]. Only "clip" has a
      lower bound.
    epsilon_high: How far above 1 the ratio may go. For "cispo" the cap of the
      ratio itself, 1 or more. Not used by "sapo".
    dual_clip: Upper cap of the ratio for either sign of the advantage, above 1;
      None for no cap.
    beta: Weight of the KL term; 0 for no KL term and no reference model.
    kl_estimator: Value of the KL term, by the names of Schulman's note.
    kl_gradient: "reverse": the gradient of the reverse KL, importance
      corrected, for any estimator. "importance_weighted": the gradient of
      estimator times ratio. "estimator": the derivative of the estimator as
      written, which is pure noise for k1 and the forward KL's for k3.
    tis_cap: Upper cap of the sampler's importance weights; None for no cap.
    max_completion_length: Tokens, read by "constant" alone; None takes
      rollout.max_new_tokens.
  """

  aggregation: str = field(
    metadata=one_of(("token_mean", "sequence_mean", "constant"))
  )
  importance: str = field(metadata=one_of(("token", "sequence")))
  surrogate: str = field(metadata=one_of(("clip", "cispo", "sapo")))
  epsilon_low: float | int = field(metadata=interval("(0, 1]", 0.2))
  epsilon_high: float | int = field(metadata=interval("(0, inf)", 0.28))
  dual_clip: float | int | None
  beta: float | int = field(metadata=interval("[0, inf)", 0.0))
  kl_estimator: str = field(metadata=one_of(("k3", "k1", "k2")))
  kl_gradient: str = field(
    metadata=one_of(("reverse", "importance_weighted", "estimator"))
  )
  tis_cap: float | int | None = field(metadata=interval("(0, inf]", 2.0))
  max_completion_length: int | None = field(metadata=at_least(1))

  def __post_init__(self):
    check_fields(self, "objective")
    dual = self.dual_clip
    is_cap = self.epsilon_high >= 1 or self.surrogate != "cispo"
    cap = "be at least 1 for cispo, where it is the cap of the ratio itself"
    allowed = dual is None or self.surrogate == "clip"
    above = "be above 1, or it cuts a policy that has not moved"
    require_all(
      self,
      "objective",
      ("epsilon_high", is_cap, cap, 5.0),
      ("dual_clip", allowed, "be None unless the surrogate is clip", None),
      ("dual_clip", dual is None or dual > 1, above, 3.0),
    )


_DAPO = ObjectiveConfig(
  aggregation="token_mean",
  importance="token",
  surrogate="clip",
  epsilon_low=0.2,
  epsilon_high=0.28,
  dual_clip=None,
  beta=0.0,
  kl_estimator="k3",
  kl_gradient="reverse",
  tis_cap=None,
  max_completion_length=None,
)

# "constant" needs the run's own length too: `max_completion_length`.
PRESETS: dict[str, ObjectiveConfig] = {
  "grpo": replace(_DAPO, aggregation="sequence_mean", epsilon_high=0.2),
  "dr_grpo": replace(_DAPO, aggregation="constant", epsilon_high=0.2),
  "dapo": _DAPO,
  "bnpo": replace(_DAPO, epsilon_high=0.2),
  "gspo": replace(
    _DAPO,
    aggregation="sequence_mean",
    importance="sequence",
    epsilon_low=3e-4,
    epsilon_high=4e-4,
  ),
  "cispo": replace(_DAPO, surrogate="cispo", epsilon_low=1.0, epsilon_high=5.0),
  # The teacher stands in the reference's place.
  "distill": replace(_DAPO, beta=1.0),
}

REWARD_MODEL = "bradley_terry"


@dataclass(frozen=True)
class PairLossConfig:
  """The loss of a reward model; docs/objective.md has the formula.

  Attributes:
    label_smoothing: Share of the labels taken to be wrong, below 0.5.
    centering: Weight of the squared sum of a pair's scores, which keeps their
      mean near 0.
    margin: Lead that the better completion must have, as a factor of the
      difference of the two labels; 0 for none.
    ties: True takes two completions with equal labels for equally good, and
      pulls their scores together; else such pairs say nothing.
  """

  label_smoothing: float = field(metadata=interval("[0, 0.5)", 0.1))
  centering: float = field(metadata=interval("[0, inf)", 0.01))
  margin: float = field(metadata=interval("[0, inf)", 1.0))
  ties: bool

  def __post_init__(self):
    check_fields(self, "objective.pairs")


@dataclass(frozen=True)
class ObjectiveSettings:
  """A preset and the changes to it.

  The other attributes are those of `ObjectiveConfig`; None takes the preset's
  value.

  Attributes:
    preset: The paper whose loss is the start. "distill" adds the KL of the
      `teacher`. "bradley_terry" trains a reward model on pairs instead, see
      `pairs`.
    teacher: The model that "distill" learns from, named as `model.weights` is:
      any size with the same tokenizer. It scores the sampled completions at
      `rollout.temperature`. `rewards.network_dtype` and `network_memory` say
      how it is kept.
    reward_aggregation: "sum_then_normalize": an advantage compares weighted
      sums of rewards. "normalize_then_sum": each reward has an advantage of its
      own; their weighted sum is normalised over the batch (GDPO).
    advantage_scale: Divisor of the advantages: the standard deviation of the
      rewards of the "group" or of the "batch", or "none". None takes "none" for
      dr_grpo and "group" for the other presets.
    advantage_baseline: The reward that an advantage subtracts: the "mean" of
      the group, or that of its other completions ("leave_one_out").
  """

  preset: str = field(metadata=one_of((*PRESETS, REWARD_MODEL)))
  teacher: str = field(metadata={"expand": expand_weights})
  reward_aggregation: str = field(metadata=one_of(REWARD_AGGREGATIONS))
  advantage_scale: str | None = field(metadata=one_of(ADVANTAGE_SCALES))
  advantage_baseline: str = field(metadata=one_of(ADVANTAGE_BASELINES))
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
  pairs: PairLossConfig

  def __post_init__(self):
    check_fields(self, "objective")
    distills, named = self.preset == "distill", bool(self.teacher)
    fits = named == distills
    rule = "name the weights of a teacher for the preset distill alone"
    remedy = "hf:DIR" if distills else ""
    require_all(self, "objective", ("teacher", fits, rule, remedy))

  @property
  def is_reward_model(self) -> bool:
    """True if a reward model is trained, and no policy."""
    return self.preset == REWARD_MODEL

  def resolve(self, max_new_tokens: int) -> ObjectiveConfig:
    """The preset with this run's changes."""
    changes = {
      each.name: getattr(self, each.name) for each in fields(ObjectiveConfig)
    }
    if changes["max_completion_length"] is None:
      changes["max_completion_length"] = max_new_tokens
    changes = {k: v for k, v in changes.items() if v is not None}
    return replace(PRESETS.get(self.preset, _DAPO), **changes)

  @property
  def scale(self) -> str:
    """The `advantage_scale`, or the one of the preset's paper."""
    default = "none" if self.preset == "dr_grpo" else "group"
    return self.advantage_scale or default


@dataclass(frozen=True)
class ShapingConfig:
  """Filters and weights of completions and tokens; see docs/objective.md.

  Attributes:
    truncated: Treatment of a completion that ran out of tokens, which has an
      answer only in a closed tag or box. "keep": as any other. "mask": its
      reward counts in its group, its tokens do not. "penalise": its reward
      falls with its length, see `soft_tokens`.
    soft_tokens: Last tokens of `rollout.max_new_tokens` over which "penalise"
      lowers the reward evenly, by 1 in all.
    zero_variance: Treatment of a group whose rewards are all equal. "keep": its
      tokens and rows count, with advantage 0. "drop": it leaves the batch.
      "resample": other prompts are sampled in its place.
    max_batches: Most batches that "resample" samples for one step; groups that
      still have equal rewards are dropped then.
    advantage_clip: Bound of an advantage's size; None for no bound.
    top_entropy_share: Share of the batch's tokens that the surrogate reads,
      those of highest entropy; 1 for all. The divisor counts all tokens.
    entropy_bonus: Weight of the tokens' mean entropy, which lowers the loss; 0
      for none.
    sampler_correction: Truncated importance sampling, if `objective.tis_cap` is
      set. "token" weighs each token by its ratio of policy to sampler,
      "sequence" a row by exp of its mean log-ratio.
    sampler_ratio_bounds: Least and greatest ratio of policy to sampler of a
      row, as the geometric mean over its tokens; outliers leave the loss, but
      not its divisor. Empty for no bounds.
    off_policy_bound: Bound of a row's mean log-ratio of sampler to current
      policy; rows of negative advantage above it leave the loss in the same way
      (DeepSeek-V3.2). None for no bound.
  """

  truncated: str = field(metadata=one_of(("keep", "mask", "penalise")))
  soft_tokens: int = field(metadata=at_least(1))
  zero_variance: str = field(metadata=one_of(("keep", "drop", "resample")))
  max_batches: int = field(metadata=at_least(1))
  advantage_clip: float | None = field(metadata=interval("(0, inf]", None))
  top_entropy_share: float = field(metadata=interval("(0, 1]", 1.0))
  entropy_bonus: float = field(metadata=interval("[0, inf)", 0.0))
  sampler_correction: str = field(metadata=one_of(("token", "sequence")))
  sampler_ratio_bounds: tuple[float, ...]
  off_policy_bound: float | None = field(metadata=interval("[0, inf)", 0.1))

  def __post_init__(self):
    check_fields(self, "shaping")
    match self.sampler_ratio_bounds:
      case (low, high):
        is_range = 0 <= low <= 1 <= high
      case bounds:
        is_range = not bounds
    bounds_rule = "be empty, or a number up to 1 and one from 1 on"
    fits = self.zero_variance != "resample" or self.max_batches >= 2
    rule = "be at least 2 to resample"
    require_all(
      self,
      "shaping",
      ("max_batches", fits, rule, 3),
      ("sampler_ratio_bounds", is_range, bounds_rule, (0.5, 2.0)),
    )


@dataclass(frozen=True)
class OptimizerSettings:
  """AdamW: how far an update goes.

  Attributes:
    learning_rate: The peak, reached after `warmup_steps` updates.
    schedule: From the peak: "constant"; or down to `end_fraction` of it at the
      last update of the run, along a "cosine" or a "linear" ramp.
    warmup_steps: Updates of linear warm-up; the first is already above 0.
    end_fraction: Share of the peak that is left at the end; not used by
      "constant".
    b1: Decay of Adam's first moment.
    b2: Decay of Adam's second moment.
    eps: Added to the root of the second moment.
    weight_decay: Decoupled weight decay, times the learning rate; on matrices
      only.
    max_grad_norm: Global norm that gradients are scaled down to; inf for no
      clipping.
  """

  learning_rate: float = field(metadata=interval("[0, inf)", 1e-6))
  schedule: str = field(metadata=one_of(("constant", "cosine", "linear")))
  warmup_steps: int = field(metadata=interval("[0, inf)", 0))
  end_fraction: float = field(metadata=interval("[0, 1]", 0.1))
  b1: float = field(metadata=interval("[0, 1)", 0.9))
  b2: float = field(metadata=interval("[0, 1)", 0.99))
  eps: float = field(metadata=interval("(0, inf)", 1e-8))
  weight_decay: float = field(metadata=interval("[0, inf)", 0.0))
  max_grad_norm: float = field(metadata=interval("(0, inf]", 1.0))

  def __post_init__(self):
    check_fields(self, "optimizer")


@dataclass(frozen=True)
class OptimizerConfig(OptimizerSettings):
  """The settings of the optimizer for a run of known length."""

  # Updates in the whole run, warm-up included: several in a step of several
  # iterations.
  num_steps: int = field(metadata=at_least(1))

  def __post_init__(self):
    super().__post_init__()
    rule = f"be below the number of updates ({self.num_steps})"
    fits = self.warmup_steps < self.num_steps
    require_all(self, "optimizer", ("warmup_steps", fits, rule, 0))


@dataclass(frozen=True)
class LearnerConfig:
  """The settings of an update, besides the network."""

  # None for demonstrations.
  objective: ObjectiveConfig | PairLossConfig | None
  optimizer: OptimizerConfig
  # Entropy bonus, sampler correction and the bounds are read.
  shaping: ShapingConfig
  num_microbatches: int


@dataclass(frozen=True)
class CollectorConfig:
  """How a batch of experience is made."""

  kind: str
  rewards: RewardConfig
  shaping: ShapingConfig
  advantage_scale: str
  advantage_baseline: str
  # Rewards, with their weights, that have an advantage each; () for the total.
  separate_weights: tuple[tuple[str, float], ...]
  num_parts: int  # Parts in which a batch is decoded.
  label_rewards: bool  # Labels are the whole reward of preference groups.
  # Labels are all that is read of them, for no policy is trained.
  is_reward_model: bool = False
  keeps_pixels: bool = False  # Beside a frozen tower's features, to a teacher.
