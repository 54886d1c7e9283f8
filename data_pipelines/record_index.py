"""The size of every record's row, measured before any row is built.

Every reader measures every record, to know how far batches must be padded.
"""

import collections
import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

from data_pipelines import prompt_rows, records
from data_pipelines.sources.drawn import reasoning_gym
from data_pipelines.validation import printable, require

# What is wrong with a record that a setting leaves out, and what to do if no
# record is left.
_LEFT_OUT = {
  "prompt_too_long": (
    "with a prompt of more than {longest_prompt} tokens (the last of "
    "data.prompt_buckets)",
    "raise data.prompt_buckets",
  ),
  "completion_too_long": (
    "with a completion of more than {longest_completion} tokens "
    "(rollout.max_new_tokens)",
    "raise rollout.max_new_tokens",
  ),
  "unseen_pictures": (
    "with pictures, which model.name ({model!r}) cannot see",
    "set model.name to one with an image tower, such as gemma3_4b, or data.dir "
    "to problems without pictures",
  ),
}
_UNREADABLE = ("that cannot be used, see the warnings", "prepare them again")


class BatchShape(NamedTuple):
  """The shape of a batch over all shards."""

  prompt_length: int  # The bucket that its prompts are padded to.
  images_per_row: int  # Images and crops that its richest row shows.
  num_images: int  # Images and crops that all its rows show.


class RecordIndex(NamedTuple):
  """Sizes of the rows of some records, both int32 [n]."""

  lengths: np.ndarray  # Tokens of each prompt, or `UNUSABLE` or `PADDING`.
  num_images: np.ndarray  # Images and crops that each prompt shows.

  @property
  def usable(self) -> np.ndarray:
    """int64 [m], the indices of the records that can be used, ascending."""
    return np.flatnonzero(self.lengths > 0)

  @property
  def left_out(self) -> str:
    """Count and digest of the records that cannot be used; "" for none."""
    missing = np.flatnonzero(self.lengths == prompt_rows.UNUSABLE)
    if not missing.size:
      return ""
    digest = hashlib.sha256(missing.astype("<i8").tobytes()).hexdigest()
    return f"{missing.size} of {len(self.lengths)}, sha256 {digest[:16]}"

  def select(self, indices: np.ndarray | slice) -> "RecordIndex":
    """The sizes of these records alone."""
    return RecordIndex(self.lengths[indices], self.num_images[indices])

  def pad_to(self, count: int) -> "RecordIndex":
    """Fills the index up with padding rows."""
    missing = (0, count - len(self.lengths))
    return RecordIndex(
      np.pad(self.lengths, missing, constant_values=prompt_rows.PADDING),
      np.pad(self.num_images, missing),
    )

  def batch_shape(self, builder: prompt_rows.RowBuilder) -> BatchShape:
    """The shape of a batch of these records."""
    longest = max(int(self.lengths.max()), builder.shortest_prompt)
    bucket = next(size for size in builder.prompt_buckets if size >= longest)
    counts = self.num_images
    return BatchShape(bucket, int(counts.max()), int(counts.sum()))


def scan(
  builder: prompt_rows.RowBuilder, count: int, *, for_training: bool
) -> RecordIndex:
  """Measures the first `count` records of the builder's source.

  Problems with pictures that the model cannot see are padding in an evaluation,
  where other unusable records are problems without an answer.
  """
  lengths = np.full(count, prompt_rows.UNUSABLE, np.int32)
  num_images = np.zeros(count, np.int32)
  left_out: collections.Counter[str] = collections.Counter()
  unrewarded: list[str] = []
  num_scored = 0
  for index in range(count):
    try:
      problem = builder.source[index]
      lengths[index], num_images[index] = builder.measure(problem)
    except prompt_rows.UNREADABLE as error:
      reason = error.reason if isinstance(error, records.BadRecord) else ""
      left_out[reason] += 1
      if reason == "unseen_pictures" and not for_training:
        lengths[index] = prompt_rows.PADDING
      if reason not in _LEFT_OUT:
        prompt_rows.warn_unusable(index, error)
      continue
    num_scored += problem.answer_type == "scored"
    # A reward can score a completion, or the record has one.
    can_teach = builder.rewards_unchecked or builder.kind == "demonstrations"
    if for_training and not (problem.is_checkable or can_teach):
      unrewarded.append(problem.pid)
  if num_scored:
    reasoning_gym.require_library()
  if unrewarded:
    labels = ", data.preference_rewards=labels for completions with labels"
    raise ValueError(
      f"data.train_split ({builder.split!r}) must hold answers that rules can "
      f"check, or a reward must need none, but {len(unrewarded)} of {count} "
      f"problems have none, the first {printable(unrewarded[0])}. Set "
      "rewards.judges or rewards.models, or rewards.custom to a function, with "
      f"a weight{labels if builder.kind == 'preference' else ''};"
      " or train on problems with answers, which are all that "
      "data_pipelines.prepare keeps without --unchecked_answers=keep."
    )
  found = RecordIndex(lengths, num_images)
  _report(builder, found, left_out, for_training)
  return found


def _report(
  builder: prompt_rows.RowBuilder,
  index: RecordIndex,
  left_out: Mapping[str, int],
  for_training: bool,
) -> None:
  """Logs how many records can be used; refuses to train on none."""
  faults = collections.Counter[tuple[str, str]]()
  for reason, number in left_out.items():
    faults[_LEFT_OUT.get(reason, _UNREADABLE)] += number
  facts = {
    "longest_prompt": builder.prompt_buckets[-1],
    "longest_completion": builder.max_new_tokens,
    "model": builder.model_name,
  }
  listed = ", ".join(
    f"{number} {fault.format_map(facts)}"
    for (fault, _), number in faults.items()
  )
  listed = listed and f"; left out: {listed}"
  usable, count = len(index.usable), len(index.lengths)
  is_unseen = 0 < left_out.get("unseen_pictures", 0) == count
  if is_unseen or (for_training and not usable):
    remedies = "; ".join(remedy for _, remedy in faults)
    use = "training" if for_training else "evaluation"
    raise ValueError(
      f"none of the {count} records can be used for {use}{listed}. To "
      f"continue, {remedies or 'prepare the data again'}."
    )
  for name, each in builder.sets.items() if for_training else ():
    lengths = index.lengths[each.start : each.stop]
    remedy = "leave it out, or use another model or longer prompts"
    rule = f"name data with records that can be used, and {name} has none"
    holds = bool((lengths > 0).any())
    require(holds, "data.dirs", list(builder.sets), rule, remedy)
  if builder.split:
    message = "%s: %d of %d problems can be used%s."
    logging.info(message, builder.split, usable, count, listed)
