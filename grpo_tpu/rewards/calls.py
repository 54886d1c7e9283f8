"""From rows to calls of users' rewards, and back to rows.

Rows are called for some at a time, in worker processes or in this one. A call
that fails is repeated row by row, so that a bad row takes no other with it.
Neither order nor result depends on which worker is done first.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

from data_pipelines import records
from grpo_tpu.rewards import custom, pool

# One value for each row of a call, or why there is none.
type _Answer = list[float] | str


class Calls:
  """Calls users' rewards, in workers that last from batch to batch."""

  def __init__(
    self,
    paths: Sequence[str],
    *,
    num_workers: int,
    rows_per_call: int,
    timeout_seconds: float,
  ):
    """Starts no worker yet.

    Args:
      paths: Of the functions; see `custom.resolve`.
      num_workers: Processes; 0 calls in this one, without timeout.
      rows_per_call: Rows of a call, at most.
      timeout_seconds: After which a call has failed, whatever its rows.
    """
    self._functions = {path: custom.resolve(path) for path in paths}
    self._rows_per_call = rows_per_call
    self._pool = None
    if paths and num_workers:
      self._pool = pool.Pool(
        paths, num_workers=num_workers, timeout_seconds=timeout_seconds
      )

  def close(self) -> None:
    """Ends the workers."""
    if self._pool is not None:
      self._pool.close()

  def start(
    self, completions: Sequence[str], problems: Sequence[records.Problem]
  ) -> Callable[[str], Iterator[float | str]]:
    """Begins to call every function on every row.

    Returns:
      For a path, what each row earns, or why it earns nothing; in order.
    """
    size, count = self._rows_per_call, len(completions)
    spans = [range(count)[i : i + size] for i in range(0, count, size)]

    def begun(path: str, rows: range) -> futures.Future[_Answer]:
      return self._submit(
        path, [completions[i] for i in rows], [problems[i] for i in rows]
      )

    calls = {
      path: [begun(path, rows) for rows in spans] for path in self._functions
    }

    def earned(path: str) -> Iterator[float | str]:
      answers = [call.result() for call in calls[path]]
      # All begin before any is waited for.
      alone = {
        row: begun(path, range(row, row + 1))
        for rows, answer in zip(spans, answers, strict=True)
        if isinstance(answer, str) and len(rows) > 1
        for row in rows
      }
      for rows, answer in zip(spans, answers, strict=True):
        for place, row in enumerate(rows):
          if row in alone:
            place, answer = 0, alone[row].result()
          yield answer if isinstance(answer, str) else answer[place]

    return earned

  def _submit(
    self,
    path: str,
    completions: Sequence[str],
    problems: Sequence[records.Problem],
  ) -> futures.Future[_Answer]:
    if self._pool is not None:
      return self._pool.submit(path, completions, problems)
    done: futures.Future[_Answer] = futures.Future()
    done.set_result(custom.call(self._functions[path], completions, problems))
    return done
