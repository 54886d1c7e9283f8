"""Settings of the network: size, weights, types, attention, adapters."""

import dataclasses

from data_pipelines.validation import require, require_at_least, require_one_of
from grpo_tpu.models.gemma3 import attention, lora, remat
from grpo_tpu.models.gemma3 import config as gemma3_config

DTYPES = ("float32", "bfloat16")
_MEMORIES = ("device", "pinned_host")
_WEIGHTS = {
  "random": "random:SEED",
  "run": "run:WORKDIR[@STEP]",
  "hf": "hf:DIR",
  "gemma": "gemma:DIR",
  "gguf": "gguf:FILE",
}


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

  def __post_init__(self):
    require_at_least(self, "model", logits_chunk=1)
    for name, value, choices in (
      ("name", self.name, tuple(gemma3_config.CONFIGS)),
      ("param_dtype", self.param_dtype, DTYPES),
      ("compute_dtype", self.compute_dtype, DTYPES),
      ("attention", self.attention, attention.KINDS),
      ("remat", self.remat, remat.POLICIES),
      ("vision_remat", self.vision_remat, remat.POLICIES),
      ("reference_memory", self.reference_memory, _MEMORIES),
    ):
      require_one_of(f"model.{name}", value, choices)
    if self.reference_dtype is not None:
      require_one_of("model.reference_dtype", self.reference_dtype, DTYPES)
    scheme, colon, rest = self.weights.partition(":")
    require(
      scheme in _WEIGHTS
      and bool(colon and rest)
      and (scheme != "random" or rest.isdecimal()),
      "model.weights",
      self.weights,
      f"be one of {', '.join(_WEIGHTS.values())}",
      "set model.weights=random:0",
    )
    self._check_image_size()
    if self.lora.rank:
      self._check_beside_adapters()

  def _check_image_size(self) -> None:
    """Whether the tower can read such pictures, and pool them."""
    tower, size = gemma3_config.CONFIGS[self.name].vision, self.image_size
    if size is None:
      return
    if tower is None:
      require(
        False,
        "model.image_size",
        size,
        f"be None for {self.name}, which sees no pictures",
        "leave it out, for the tower's own",
      )
      return
    unit = tower.patch_size * round(tower.soft_tokens**0.5)
    require(
      size > 0 and size % unit == 0,
      "model.image_size",
      size,
      f"be a multiple of {unit}, a patch for each soft token of a side",
      f"set model.image_size={max(1, round(size / unit)) * unit}",
    )

  def _check_beside_adapters(self) -> None:
    """Whether nothing is asked of a tower or a reference of their own."""
    rank = self.lora.rank
    require(
      not self.train_vision,
      "model.train_vision",
      self.train_vision,
      f"be False with adapters (model.lora.rank={rank}), which leave the tower "
      "as it is",
      "set model.train_vision=False, or model.lora.rank=0",
    )
    for name, value, plain in (
      ("model.reference_dtype", self.reference_dtype, None),
      ("model.reference_memory", self.reference_memory, "device"),
    ):
      require(
        value == plain,
        name,
        value,
        f"be {plain} with adapters (model.lora.rank={rank}), for the reference "
        "is what lies under them and no copy of it",
        f"set {name}={plain}, or model.lora.rank=0",
      )

  @property
  def network(self) -> gemma3_config.ModelConfig:
    """Sizes of the network, with `image_size` applied."""
    model, size = gemma3_config.CONFIGS[self.name], self.image_size
    if size is None or model.vision is None:
      return model
    tower = dataclasses.replace(model.vision, input_size=size)
    return dataclasses.replace(model, vision=tower)

  @property
  def adapters(self) -> lora.LoraConfig | None:
    """The adapters to train, or None if the whole model is trained."""
    return self.lora if self.lora.rank else None
