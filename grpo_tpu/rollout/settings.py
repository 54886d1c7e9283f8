"""Settings of a rollout."""

import dataclasses

from data_pipelines.validation import require, require_at_least


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

  def __post_init__(self):
    require_at_least(
      self,
      "rollout",
      num_generations=1,
      max_new_tokens=1,
      min_new_tokens=0,
      chunk_tokens=1,
      pictures_per_shard=1,
      image_cache_mib=0,
    )
    require(
      0 < self.temperature < float("inf"),
      "rollout.temperature",
      self.temperature,
      "be above 0 and finite, for training needs the odds of what was sampled",
      "set rollout.temperature=1.0",
    )
    require(
      self.min_new_tokens < self.max_new_tokens,
      "rollout.min_new_tokens",
      self.min_new_tokens,
      f"be below rollout.max_new_tokens ({self.max_new_tokens})",
      "set rollout.min_new_tokens=0",
    )
    require(
      all(self.stop_strings),
      "rollout.stop_strings",
      self.stop_strings,
      "not hold an empty text, which every completion does",
      "set rollout.stop_strings=()",
    )
