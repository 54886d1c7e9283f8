"""Settings of a rollout."""

from dataclasses import dataclass, field

from data_pipelines.validation import at_least, check_fields, interval, require


@dataclass(frozen=True)
class RolloutConfig:
  """How completions are sampled.

  Attributes:
    num_generations: Completions per prompt (`G`).
    max_new_tokens: Most tokens of a completion (`T`).
    min_new_tokens: Tokens of a completion before its stop token, at least. In
      sampling and training the softmax leaves stop tokens out until then.
    temperature: Divisor of the logits, in training on the samples too.
      Completions that come with the data are scored at 1, whatever this is.
    stop_strings: Texts that end a completion like a stop token, at the first
      token that completes one of them.
    chunk_tokens: Tokens that all rows decode between two looks of the host, at
      which rows have finished and whether the run is preempted. It does not
      change the samples.
    prompts_at_a_time: Prompts, over all hosts, that are decoded together;
      divides `data.prompts_per_step`, and None is all of them. Fewer prompts
      need smaller caches and give the same samples.
    pictures_per_shard: Images that the tower of each data shard reads at a
      time.
    image_cache_mib: Memory of each process for the results of a frozen image
      tower, kept from step to step, in MiB; 0 for none.
  """

  num_generations: int = field(metadata=at_least(1))
  max_new_tokens: int = field(metadata=at_least(1))
  min_new_tokens: int = field(metadata=interval("[0, inf)", 0))
  temperature: float = field(metadata=interval("(0, inf)", 1.0))
  stop_strings: tuple[str, ...]
  chunk_tokens: int = field(metadata=at_least(1))
  prompts_at_a_time: int | None
  pictures_per_shard: int = field(metadata=at_least(1))
  image_cache_mib: int = field(metadata=interval("[0, inf)", 0))

  def __post_init__(self):
    check_fields(self, "rollout")
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
