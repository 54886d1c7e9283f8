"""Counts the failures of one reward, and says when they are too many."""

import collections
from collections.abc import Sequence

# Of fewer rows, a share says little: so many successes are assumed at first.
_FEWEST_ROWS = 32
# So many failures in a row are no accident, even of a last, short batch.
_LONGEST_STREAK = 8


class ErrorBudget:
  """The failures on the most recent rows, at a constant cost per row."""

  def __init__(self, max_fraction: float, window: int):
    """Allows failures on a share of the last `window` rows."""
    self._max_fraction, self._window = max_fraction, window
    self._recent: collections.deque[bool] = collections.deque(maxlen=window)
    self._num_failed = 0  # Among the recent rows.
    self._num_seen = 0
    self._streak = 0  # Rows since the last batch with a success.

  def count(self, failed: Sequence[bool]) -> str:
    """Counts a batch; if the run must end, returns the rows that failed."""
    self._num_seen += len(failed)
    self._streak = self._streak + len(failed) if all(failed) else 0
    if self._streak >= min(_LONGEST_STREAK, max(self._num_seen, 1)):
      return f"every one of the last {self._streak} completions"
    size = min(self._window, max(self._num_seen, _FEWEST_ROWS))
    limit = self._max_fraction * size
    for has_failed in failed:
      if len(self._recent) == self._window:
        self._num_failed -= self._recent[0]
      self._recent.append(has_failed)
      self._num_failed += has_failed
      if has_failed and self._num_failed > limit:
        return (
          f"{self._num_failed} of the last {len(self._recent)} completions, "
          f"and rewards.max_error_fraction ({self._max_fraction:g}) allows "
          f"{limit:g} of {size}"
        )
    return ""
