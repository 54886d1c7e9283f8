"""The size of every record's row, measured before any row is built.

Every reader measures every record, so that all readers know how far a batch's
prompts and images must be padded without asking each other.
"""

from typing import NamedTuple

import numpy as np
from absl import logging

from data_pipelines import prompt_rows
from data_pipelines.text import shuffle_options


class RecordIndex(NamedTuple):
  """Sizes of the rows of some records.

  Attributes:
    lengths: int32 [n], tokens of each prompt; `prompt_rows.UNUSABLE` for a
      record that cannot be used, `prompt_rows.PADDING` where there is none.
    num_images: int32 [n], images and crops that each prompt shows.
  """

  lengths: np.ndarray
  num_images: np.ndarray

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

  def batch_shape(self, builder: prompt_rows.RowBuilder) -> tuple[int, int]:
    """The prompt bucket and the images per row of a batch of these records."""
    longest = max(int(self.lengths.max()), builder.shortest_prompt)
    bucket = next(size for size in builder.prompt_buckets if size >= longest)
    return bucket, max(int(self.num_images.max()), builder.num_images)


def scan(
  builder: prompt_rows.RowBuilder, count: int, *, needs_answers: bool
) -> RecordIndex:
  """Measures the first `count` records of the builder's source.

  Raises:
    ValueError: `needs_answers`, and a usable problem has no public answer.
  """
  lengths = np.full(count, prompt_rows.UNUSABLE, np.int32)
  num_images = np.zeros(count, np.int32)
  num_choices = num_fixed = 0
  for index in range(count):
    try:
      problem = builder.source[index]
      lengths[index], num_images[index] = builder.measure(problem)
    except prompt_rows.UNREADABLE as error:
      prompt_rows.warn_masked(index, error)
      continue
    if builder.shuffle_options and problem.choices:
      num_choices += 1
      num_fixed += shuffle_options.is_fixed(problem)
    if needs_answers and not problem.has_answer:
      raise ValueError(
        f"problem {problem.pid} has no public answer, and training needs one "
        "for every problem; train on another split."
      )
  logging.info(
    "%d of %d problems can be used and fit into data.prompt_buckets.",
    np.count_nonzero(lengths),
    count,
  )
  if builder.shuffle_options:
    logging.info(
      "Options are shuffled, except in %d of %d problems that refer to them.",
      num_fixed,
      num_choices,
    )
  return RecordIndex(lengths, num_images)
