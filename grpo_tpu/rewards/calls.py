"""Calls of users' rewards on rows, several rows per call.

A call that fails is repeated row by row, so that a bad row fails alone. Results
depend on neither the order nor the speed of the workers.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

from data_pipelines import records
from data_pipelines.workers import functions, pool

_CALL = "grpo_tpu.rewards.custom:call"


class Calls:
  """Calls users' rewards in workers that live from batch to batch."""

  def __init__(
    self,
    paths: Sequence[str],
    *,
    num_workers: int,
    rows_per_call: int,
    timeout_seconds: float,
  ):
    """Creates the pool without starting a worker.

    Args:
      paths: The reward functions; see `custom.resolve`.
      num_workers: Worker processes; see `pool.Pool`.
      rows_per_call: The most rows of a call.
      timeout_seconds: Time after which a call fails, whatever its rows.
    """
    self._paths = tuple(paths)
    self._rows_per_call = rows_per_call
    self._pool = pool.Pool(
      (_CALL, *paths), num_workers=num_workers, timeout_seconds=timeout_seconds
    )

  def close(self) -> None:
    """Ends the workers."""
    self._pool.close()

  def start(
    self, completions: Sequence[str], problems: Sequence[records.Problem]
  ) -> Callable[[str], Iterator[float | functions.Failure]]:
    """Starts to call every function on every row.

    Returns:
      A function from a path to the result of each row, in the rows' order.
    """
    size, count = self._rows_per_call, len(completions)
    spans = [range(count)[i : i + size] for i in range(0, count, size)]

    def start_call(path: str, rows: range) -> futures.Future:
      return self._pool.submit(
        *(_CALL, path),
        [completions[i] for i in rows],
        [problems[i] for i in rows],
      )

    calls = {
      path: [start_call(path, rows) for rows in spans] for path in self._paths
    }

    def wait_for(path: str) -> Iterator[float | functions.Failure]:
      results = [call.result() for call in calls[path]]
      # All repeated calls start before the first one is waited for.
      repeated = {
        row: start_call(path, range(row, row + 1))
        for rows, result in zip(spans, results, strict=True)
        if isinstance(result, functions.Failure) and len(rows) > 1
        for row in rows
      }
      for rows, result in zip(spans, results, strict=True):
        for index, row in enumerate(rows):
          if row in repeated:
            index, result = 0, repeated[row].result()
          failed = isinstance(result, functions.Failure)
          yield result if failed else result[index]

    return wait_for
