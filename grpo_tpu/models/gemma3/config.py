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
  """A SigLIP image tower and the pooling of its output; sides in pixels."""

  image_size: int  # Side of the images that the tower was trained on.
  patch_size: int
  width: int
  depth: int  # Number of encoder blocks.
  mlp_dim: int
  num_heads: int  # Divides `width`.
  soft_tokens: int  # Per image after average pooling (`S`), a square number.
  # Ids that open and close an image, and that of a soft token in exports.
  start_of_image: int = 255_999
  end_of_image: int = 256_000
  image_token: int = 262_144
  # Side of the images to encode, if other; positions are then interpolated.
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
  """One Gemma 3 transformer."""

  vocab_size: int  # Rows of the embedding (`V`).
  num_layers: int  # Layer `i` is global if `(i + 1) % 6 == 0`.
  embed_dim: int  # Model width (`D`).
  hidden_dim: int  # Width of the gated MLP (`F`).
  num_heads: int  # Query heads (`Q`).
  num_kv_heads: int  # Key-value heads (`K`).
  head_dim: int  # Size of a head (`H`).
  sliding_window: int  # Reach of a local layer in positions, itself included.
  query_scale: float  # Factor of queries before the dot product.
  local_rope_base: float  # RoPE base frequency of local layers.
  global_rope_base: float
  global_rope_factor: float  # Positions of global layers are divided by this.
  vision: VisionConfig | None  # None for the text sizes.
  # A linear layer makes a number of the last token's state: a reward model.
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
