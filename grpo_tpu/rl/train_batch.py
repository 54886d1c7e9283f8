"""The batch that an update learns from: bundles, on the mesh.

A bundle is one prompt with its completions.
"""

import flax.struct
from jaxtyping import Array, Bool, Float, Int

from grpo_tpu.models.gemma3 import text


class TrainBatch(flax.struct.PyTreeNode):
  """Bundles of a step; the first axis of every array is the bundle's.

  Attributes:
    prompt_ids: Token ids, padded on the right.
    prompt_length: Number of tokens before the padding.
    images: Images of each prompt in the order of their placeholders: pixels, or
      the features that a frozen image tower made of them.
    completion_ids: Token ids, padded on the right.
    completion_mask: True on tokens that count; all False for an excluded row.
    advantages: One per completion; zeros for demonstrations.
    old_per_token_logps: Log-probabilities under the policy that sampled; None
      stands for the current policy.
    ref_per_token_logps: Log-probabilities under the frozen reference; None
      stands for the current policy.
    sampler_logps: Log-probabilities as the sampler computed them; None says
      that the completions came with the data, and no temperature shaped them.
    token_weights: Factors of each token's surrogate; None stands for 1.
    counted: True for completions that belong to the batch, masked ones too;
      None stands for all.
    pixels: The images as a teacher reads them, until it has read the batch;
      None stands for `images`.
    teacher_states: Final states of the teacher that predict the completions.
    preferred: True at [u, i, j] where completion i is labelled better than j,
      for the implicit preference metrics; None measures nothing.
    labels: Higher for better completions, NaN for a missing one; for the loss
      of a reward model alone.
    num_encoded: Number of slots of `images` that the tower encodes, if they
      are pixels; see `pictures`. 0 encodes them all, in their microbatches.
  """

  prompt_ids: Int[Array, "U P"]
  prompt_length: Int[Array, " U"]
  images: text.Images
  completion_ids: Int[Array, "U C T"]
  completion_mask: Bool[Array, "U C T"]
  advantages: Float[Array, "U C"] | None = None
  old_per_token_logps: Float[Array, "U C T"] | None = None
  ref_per_token_logps: Float[Array, "U C T"] | None = None
  sampler_logps: Float[Array, "U C T"] | None = None
  token_weights: Float[Array, "U C T"] | None = None
  counted: Bool[Array, "U C"] | None = None
  pixels: text.Images | None = None
  teacher_states: Float[Array, "U C T E"] | None = None
  preferred: Bool[Array, "U C C"] | None = None
  labels: Float[Array, "U C"] | None = None
  num_encoded: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def is_sampled(self) -> bool:
    """True if our sampler drew the completions, in its own way."""
    return self.sampler_logps is not None


class ScoredGroups(flax.struct.PyTreeNode):
  """The completions of a batch of prompts with their rewards."""

  batch: TrainBatch  # Without advantages.
  # By name, before weights; "total" and "heuristics" are weighted. A
  # "length_penalty" is part of the total.
  rewards: dict[str, Float[Array, "U C"]]
  valid: Bool[Array, "U C"]  # False for a malformed prompt or a failed reward.
  group: Int[Array, " U"]  # Its number in the step.
  # Rewards that are normalised one by one, before weights.
  apart: dict[str, Float[Array, "U C"]] = flax.struct.field(
    default_factory=dict
  )

  @property
  def compared(self) -> dict[str, Float[Array, "U C"]]:
    """The rewards that have advantages: those `apart`, or else the total."""
    return self.apart or {"total": self.rewards["total"]}
