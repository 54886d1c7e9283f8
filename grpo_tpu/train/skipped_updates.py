"""Ends a run whose gradients are not finite too often in a row."""

from collections.abc import Sequence

from absl import logging


class SkippedUpdates:
  """Counts updates that were skipped because a gradient was not finite."""

  def __init__(self, limit: int):
    """Allows fewer than `limit` skipped updates in a row."""
    self.count = 0
    self._limit, self._in_a_row = limit, 0

  def check(self, step: int, skipped: Sequence[float]) -> None:
    """Counts the updates of a step; each is 1 if it was skipped, else 0.

    Raises:
      FloatingPointError: `limit` updates in a row were skipped.
    """
    longest, count = 0, int(sum(skipped))
    for flag in skipped:
      self._in_a_row = self._in_a_row + 1 if flag else 0
      longest = max(longest, self._in_a_row)
    self.count += count
    if not count:
      return
    logging.warning(
      "Step %d skipped %d updates whose gradients were not finite; %d in a row"
      " (train.max_skipped_updates is %d).",
      *(step, count, longest, self._limit),
    )
    if longest >= self._limit:
      raise FloatingPointError(
        f"{longest} updates in a row had gradients that were not finite, up to "
        f"step {step}, and train.max_skipped_updates ({self._limit}) allows no "
        "more. They changed nothing: lower optimizer.learning_rate, or look "
        "at the samples of these steps."
      )
