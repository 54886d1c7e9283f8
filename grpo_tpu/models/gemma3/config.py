"""The sizes of Gemma 3, from a tiny one that trains on a laptop to 27B.

References:
  Gemma Team, "Gemma 3 Technical Report", 2025 (arXiv:2503.19786), table 1.
"""

import dataclasses

from data_pipelines.text import tables

# Layers per period: five local ones, then a global one (section 2).
PERIOD = 6


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A SigLIP image tower and the pooling of its output.

  Attributes:
    image_size: Side in pixels of the images that the tower was trained on.
    patch_size: Side of a patch in pixels.
    width: Model width of the tower.
    depth: Number of encoder blocks.
    mlp_dim: Hidden width of a block's MLP.
    num_heads: Number of attention heads; divides `width`.
    soft_tokens: Tokens per image after average pooling (`S`), a square number.
    start_of_image: Id that opens an image.
    end_of_image: Id that closes an image.
    image_token: Id of a soft token in Hugging Face's inputs; only exports use
      it.
    input_size: Side in pixels of the images to encode, if other than
      `image_size`; positions are then interpolated.
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  soft_tokens: int
  start_of_image: int = 255_999
  end_of_image: int = 256_000
  image_token: int = 262_144
  input_size: int | None = None

  def __post_init__(self):
    side = self.shown_size // self.patch_size
    pooled = round(self.soft_tokens**0.5)
    if pooled**2 != self.soft_tokens or side % pooled or not side:
      raise ValueError(
        f"soft_tokens ({self.soft_tokens}) must be a square whose side divides "
        f"the {side} patches of an image's side."
      )

  @property
  def shown_size(self) -> int:
    """Side in pixels of the images to encode."""
    return self.input_size or self.image_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One Gemma 3 transformer.

  Attributes:
    vocab_size: Rows of the embedding (`V`).
    num_layers: Number of blocks; layer `i` is global if `(i + 1) % 6 == 0`.
    embed_dim: Model width (`D`).
    hidden_dim: Width of the gated MLP (`F`).
    num_heads: Number of query heads (`Q`).
    num_kv_heads: Number of key-value heads (`K`).
    head_dim: Size of a head (`H`).
    sliding_window: Reach of a local layer in positions, itself included.
    query_scale: Factor of queries before the dot product.
    local_rope_base: RoPE base frequency of local layers.
    global_rope_base: RoPE base frequency of global layers.
    global_rope_factor: Positions of global layers are divided by this.
    vision: The image tower, or None for the text sizes.
    has_score: True if a linear layer makes a number of the last token's final
      state, as in a reward model.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  hidden_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  sliding_window: int
  query_scale: float
  local_rope_base: float
  global_rope_base: float
  global_rope_factor: float
  vision: VisionConfig | None
  has_score: bool = False

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
        f"({self.num_kv_heads})."
      )
    # Transformers ignores the window inside an image, the gemma library does
    # not; in no released size is an image longer than the window.
    if self.vision and self.vision.soft_tokens > self.sliding_window:
      raise ValueError(
        f"vision.soft_tokens ({self.vision.soft_tokens}) must fit in "
        f"sliding_window ({self.sliding_window}); no released model defines "
        "attention in an image that is longer than the window."
      )

  @property
  def global_layers(self) -> tuple[bool, ...]:
    """True for each global layer."""
    return tuple((i + 1) % PERIOD == 0 for i in range(self.num_layers))

  @property
  def soft_tokens(self) -> int:
    """Soft tokens per image; 0 without an image tower."""
    return self.vision.soft_tokens if self.vision else 0


def _make_config(
  *, query_pre_attn_scalar: int, vision: dict | None = None, **sizes
) -> ModelConfig:
  return ModelConfig(
    **sizes,
    query_scale=query_pre_attn_scalar**-0.5,
    vision=VisionConfig(**vision) if vision else None,
  )


CONFIGS = {
  name: _make_config(**fields)
  for name, fields in tables.read(__package__, "sizes.toml").items()
}
