"""Settings of the network: size, weights, types, attention, adapters."""

import dataclasses
import re
from dataclasses import field

from data_pipelines.storage.paths import expand_path
from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  one_of,
  require,
  require_all,
)
from grpo_tpu.models.gemma3 import config as gemma3_config

DTYPES = ("float32", "bfloat16")
ATTENTION_KINDS = ("auto", "einsum", "splash")
# In descending order of the device memory that they take.
REMAT_POLICIES = ("none", "dots", "full", "offload")
LORA_TARGETS = ("q", "kv", "output", "gating", "linear", "projector")
_WEIGHTS = ("hf", "gguf", "gemma", "run", "random")


def expand_weights(name: str, value: str) -> str:
  """The weights with the home in the place of a leading `~` of their path."""
  scheme, _, rest = value.partition(":")
  if scheme in (*_WEIGHTS, "peft") and scheme != "random":
    return f"{scheme}:{expand_path(name, rest)}"
  return value


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """The weights that have adapters, and the size of the adapters.

  Attributes:
    rank: Columns of `A` and rows of `B`; 0 trains the whole model instead.
    alpha: The product is multiplied by `alpha / rank`.
    targets: Weights with an adapter: queries, keys and values, the output of
      attention, gate and up, down, and the projector of the soft tokens, which
      a text model does not have.
    init: "peft:DIR" starts from the adapter that peft saved in this folder,
      local or on gs://, of the same rank, alpha and targets; "" from new ones.
  """

  rank: int = field(metadata=interval("[0, inf)", 16))
  alpha: float = field(metadata=interval("(0, inf)", 32.0))
  targets: tuple[str, ...] = field(metadata=one_of(LORA_TARGETS))
  init: str = field(metadata={"expand": expand_weights})

  def __post_init__(self):
    check_fields(self, "model.lora")
    rule = "targets", bool(self.targets), "hold at least one name"
    is_named = self.init.startswith("peft:") and len(self.init) > len("peft:")
    require_all(
      self,
      "model.lora",
      (*rule, LORA_TARGETS),
      ("init", is_named or not self.init, "name a folder", "peft:DIR"),
    )

  @property
  def scale(self) -> float:
    """The factor of the product `A B`."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """Which Gemma 3, from which weights, and how it runs.

  Attributes:
    name: The model's size.
    image_size: Side in pixels that images are resized to; None is the tower's
      own. At half of it the tower reads a quarter of the patches and makes as
      many soft tokens. Exports use the tower's own.
    head: "score" adds a linear layer from the last token's final state to a
      number, for a reward model; "" is a language model. Set by
      objective.preset=bradley_terry.
    weights: "hf:DIR" for a Hugging Face checkpoint, with config.json and
      *.safetensors; "gemma:DIR" for a checkpoint in the layout of the `gemma`
      library; "gguf:FILE" for a text model;
      "run:WORKDIR" for the newest checkpoint of another run, "run:WORKDIR@STEP"
      for one of its steps or @best for that with its best metric;
      "random:SEED" draws them, for tests. "" names none, which is enough for
      --mode=plan. Each path may be on gs://.
    param_dtype: Type of the decoder's parameters. If they are trained in
      bfloat16, the optimizer holds and updates masters in float32, which are in
      the checkpoints too.
    compute_dtype: Type of the decoder's matrix products.
    attention: "einsum", "splash" (a kernel for TPUs), or "auto" for splash on
      TPUs and einsum elsewhere.
    remat: Values that the decoder's layers keep for the backward pass. "none":
      all of them. "dots": the products with weights. "full": the layer's input
      alone. "offload": the same, in the host's memory.
    train_vision: Train the image tower too.
    vision_remat: The choice of `remat` for the image tower, if it is trained.
    lora: Adapters, trained in place of the parameters; off at rank 0.
    reference_dtype: Type of the matrices of the frozen reference model; None is
      `param_dtype`. With compute in bfloat16 a copy in bfloat16 gives about the
      same scores. With adapters there is no copy.
    reference_memory: Memory that holds the reference model: "device", or
      "pinned_host", from which it is copied to the devices to score.
    logits_chunk: Tokens of a data shard whose logits exist at a time.
  """

  name: str = field(metadata=one_of(gemma3_config.CONFIGS))
  image_size: int | None
  head: str = field(metadata=one_of(("", "score")))
  weights: str = field(metadata={"expand": expand_weights})
  param_dtype: str = field(metadata=one_of(DTYPES))
  compute_dtype: str = field(metadata=one_of(DTYPES))
  attention: str = field(metadata=one_of(ATTENTION_KINDS))
  remat: str = field(metadata=one_of(REMAT_POLICIES))
  train_vision: bool
  vision_remat: str = field(metadata=one_of(REMAT_POLICIES))
  lora: LoraConfig
  reference_dtype: str | None = field(metadata=one_of(DTYPES))
  reference_memory: str = field(metadata=one_of(("device", "pinned_host")))
  logits_chunk: int = field(metadata=at_least(1))

  def __post_init__(self):
    check_fields(self, "model")
    scheme, _, rest = self.weights.partition(":")
    is_named = scheme in _WEIGHTS and bool(rest)
    if self.weights and (
      not is_named or (scheme == "random" and not rest.isdecimal())
    ):
      raise ValueError(self.describe_weights())
    self._check_image_size()
    if self.lora.rank:
      self._check_with_adapters()

  def _check_image_size(self) -> None:
    """Checks that the tower can read and pool such images."""
    tower, size = gemma3_config.CONFIGS[self.name].vision, self.image_size
    if size is None:
      return
    if tower is None:
      raise ValueError(
        f"model.image_size ({size}) must be None for {self.name}, a text "
        "model; leave it out."
      )
    unit = tower.patch_size * round(tower.soft_tokens**0.5)
    require(
      size > 0 and size % unit == 0,
      "model.image_size",
      size,
      f"be a multiple of {unit}, a patch for each soft token of a side",
      f"set model.image_size={max(1, round(size / unit)) * unit}",
    )

  def _check_with_adapters(self) -> None:
    """Checks that the image tower and the reference have no settings."""
    with_adapters = f"with adapters (model.lora.rank={self.lora.rank})"
    no_tower = "which leave the image tower frozen"
    no_copy = "because the reference is the frozen model below them and no copy"
    for name, plain, reason in (
      ("train_vision", False, no_tower),
      ("reference_dtype", None, no_copy),
      ("reference_memory", "device", no_copy),
    ):
      value = getattr(self, name)
      require(
        value == plain,
        f"model.{name}",
        value,
        f"be {plain} {with_adapters}, {reason}",
        f"set model.{name}={plain}, or model.lora.rank=0",
      )

  def describe_weights(self) -> str:
    """An error that says what `weights` may be, and how to get them."""
    name = self.hub_name or "google/gemma-3-SIZE-it"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", self.weights):
      name = self.weights  # As transformers and vLLM take it.
    folder = name.partition("/")[2]
    return (
      f"model.weights ({self.weights!r}) must name the parameters of "
      f"{self.name}:\n"
      f"  hf:DIR, a Hugging Face folder, as in --config.model.weights="
      f"hf:{folder} after\n"
      f"    hf download {name} --local-dir {folder}\n"
      "  gguf:FILE, a GGUF file of a text model\n"
      "  gemma:DIR, a checkpoint of the gemma library\n"
      "  run:WORKDIR[@STEP or @best], a checkpoint of another run\n"
      "  random:SEED, which draws them, for tests"
    )

  @property
  def hub_name(self) -> str:
    """The released model on Hugging Face; "" for `tiny`, the only other."""
    size = self.name.removeprefix("gemma3_")
    return f"google/gemma-3-{size}-it" if size != self.name else ""

  @property
  def network(self) -> gemma3_config.ModelConfig:
    """Sizes of the network, with `image_size` and `head` applied."""
    model, size = gemma3_config.CONFIGS[self.name], self.image_size
    model = dataclasses.replace(model, has_score=bool(self.head))
    if size is None or model.vision is None:
      return model
    tower = dataclasses.replace(model.vision, input_size=size)
    return dataclasses.replace(model, vision=tower)

  @property
  def reference_type(self) -> str:
    """Type of the matrices of the reference."""
    return self.reference_dtype or self.param_dtype

  @property
  def adapters(self) -> LoraConfig | None:
    """The adapters to train, or None if the whole model is trained."""
    return self.lora if self.lora.rank else None
