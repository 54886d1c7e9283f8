"""Calls of users' rewards on rows, several rows per call.

A call that fails is repeated row by row, so that a bad row fails alone. Results
depend on neither the order nor the speed of the workers.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

from data_pipelines import records
from data_pipelines.workers import functions, pool
from grpo_tpu.rewards import custom
from grpo_tpu.rewards.settings import RewardConfig

CALL = "grpo_tpu.rewards.custom:call"


def start(
  workers: pool.Pool,
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  config: RewardConfig,
) -> Callable[[str], Iterator[float | functions.Failure]]:
  """Starts to call every function of `custom` on every row.

  Returns a function from a path to the result of each row.
  """
  size, count = config.rows_per_call, len(completions)
  spans = [range(count)[i : i + size] for i in range(0, count, size)]

  def start_call(path: str, rows: range) -> futures.Future:
    some_completions = [completions[row] for row in rows]
    encoded = custom.encode([problems[row] for row in rows])
    check = functools.partial(custom.check, count=len(rows))
    return workers.submit(CALL, path, some_completions, *encoded, check=check)

  calls = {
    path: [start_call(path, rows) for rows in spans] for path in config.custom
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
        value = result if failed else result[index]
        is_reason = isinstance(value, str)
        yield functions.Failure(value) if is_reason else value

  return wait_for
