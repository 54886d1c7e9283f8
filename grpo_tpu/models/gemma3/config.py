"""The sizes of Gemma 3, from a tiny one that trains on a laptop to 27B.

Values only: nothing here knows of arrays or devices.

References:
  Gemma Team, "Gemma 3 Technical Report", 2025 (arXiv:2503.19786), table 1.
"""

import dataclasses

# One global layer closes each period of five local ones (section 2).
PERIOD = 6


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A SigLIP tower and the pooling that shortens its output.

  Attributes:
    image_size: Side of the square input that the positions are of, in pixels.
    patch_size: Side of a patch, in pixels.
    width: Model width of the tower.
    depth: Number of encoder blocks.
    mlp_dim: Hidden width of a block's MLP.
    num_heads: Attention heads; divides `width`.
    soft_tokens: Tokens per image after average pooling (`S`), a square.
    start_of_image: The id that opens an image.
    end_of_image: The id that closes one.
    image_token: The id that stands for a soft token in Hugging Face's inputs;
      nothing here reads or writes it but exports.
    input_size: Side of what it is shown, where that is not `image_size`: the
      positions are then those between.
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
    """Side of the pictures that it is shown."""
    return self.input_size or self.image_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One Gemma 3 transformer.

  Attributes:
    vocab_size: Rows of the embedding (`V`).
    num_layers: Blocks; layer `i` is global where `(i + 1) % 6 == 0`.
    embed_dim: Model width (`D`).
    hidden_dim: Width of the gated MLP (`F`).
    num_heads: Query heads (`Q`).
    num_kv_heads: Key-value heads (`K`).
    head_dim: Size of a head (`H`).
    sliding_window: Positions a local layer reaches, itself included.
    query_scale: Factor on queries before the dot product.
    local_rope_base: RoPE base frequency of local layers.
    global_rope_base: RoPE base frequency of global layers.
    global_rope_factor: Positions of global layers are divided by this.
    vision: The image tower, or None for the text sizes.
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

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
        f"({self.num_kv_heads})."
      )
    # Transformers ignores the window inside an image and the gemma library
    # does not; no released size has an image longer than its window.
    if self.vision and self.vision.soft_tokens > self.sliding_window:
      raise ValueError(
        f"vision.soft_tokens ({self.vision.soft_tokens}) must fit in "
        f"sliding_window ({self.sliding_window}); what an image block longer "
        "than the window means is not defined by any released model."
      )

  @property
  def global_layers(self) -> tuple[bool, ...]:
    """Whether each layer is global."""
    return tuple((i + 1) % PERIOD == 0 for i in range(self.num_layers))

  @property
  def soft_tokens(self) -> int:
    """Soft tokens per image; 0 without a vision tower."""
    return self.vision.soft_tokens if self.vision else 0


_SIGLIP = VisionConfig(
  image_size=896,
  patch_size=14,
  width=1152,
  depth=27,
  mlp_dim=4304,
  num_heads=16,
  soft_tokens=256,
)


def _released(
  num_layers: int,
  embed_dim: int,
  hidden_dim: int,
  num_heads: int,
  num_kv_heads: int,
  *,
  head_dim: int = 256,
  sliding_window: int = 1024,
  query_scale: float = 256**-0.5,
  global_rope_factor: float = 8.0,
  vision: VisionConfig | None = _SIGLIP,
) -> ModelConfig:
  return ModelConfig(
    vocab_size=262_144,
    num_layers=num_layers,
    embed_dim=embed_dim,
    hidden_dim=hidden_dim,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    sliding_window=sliding_window,
    query_scale=query_scale,
    local_rope_base=10_000.0,
    global_rope_base=1_000_000.0,
    global_rope_factor=global_rope_factor,
    vision=vision,
  )


CONFIGS = {
  # For tests and the smoke run: every mechanism of the released sizes, small
  # enough to learn on two cores.
  "tiny": ModelConfig(
    vocab_size=1024,
    num_layers=6,
    embed_dim=64,
    hidden_dim=192,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    sliding_window=32,
    query_scale=32**-0.5,
    local_rope_base=10_000.0,
    global_rope_base=1_000_000.0,
    global_rope_factor=8.0,
    vision=VisionConfig(
      image_size=48,
      patch_size=8,
      width=64,
      depth=2,
      mlp_dim=192,
      num_heads=2,
      soft_tokens=9,
      # As in the tokenizers that data_pipelines trains.
      start_of_image=109,
      end_of_image=110,
      image_token=1024,
    ),
  ),
  "gemma3_270m": _released(
    18, 640, 2048, 4, 1,
    sliding_window=512, global_rope_factor=1.0, vision=None,
  ),
  "gemma3_1b": _released(
    26, 1152, 6912, 4, 1,
    sliding_window=512, global_rope_factor=1.0, vision=None,
  ),
  "gemma3_4b": _released(34, 2560, 10_240, 8, 4),
  "gemma3_12b": _released(48, 3840, 15_360, 16, 8),
  "gemma3_27b": _released(
    62, 5376, 21_504, 32, 16,
    head_dim=128, query_scale=(5376 / 32) ** -0.5,
  ),
}  # fmt: skip
