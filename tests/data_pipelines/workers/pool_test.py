"""Calls in worker processes: results, failures, and processes that end.

Most laws of the pool are tested through users' rewards, its first callers, in
tests/grpo_tpu/rewards/custom_test.py.
"""

import os
import time

import pytest

from data_pipelines.workers import functions, pool
from tests.grpo_tpu.rewards.custom_test import await_end

ANNOUNCED = "tests.grpo_tpu.rewards.user_rewards:announced"
PATHS = ("math:hypot", "os:getpid", "builtins:len")


@pytest.fixture(params=[0, 2])
def workers(request):
  made = pool.Pool(PATHS, num_workers=request.param, timeout_seconds=20.0)
  yield made
  made.close()


def test_a_call_gives_the_functions_result_or_its_failure(workers):
  calls = [workers.submit("math:hypot", 3.0, float(i)) for i in range(5)]
  assert calls[4].result() == 5.0
  failure = workers.submit("builtins:len", 3).result()
  assert isinstance(failure, functions.Failure)
  assert failure.reason.startswith("TypeError: object of type 'int' has no len")
  assert workers.submit("builtins:len", "abc").result() == 3


def test_with_workers_calls_leave_this_process():
  for num_workers, is_here in ((0, True), (1, False)):
    made = pool.Pool(PATHS, num_workers=num_workers, timeout_seconds=20.0)
    pid = made.submit("os:getpid").result()
    made.close()
    assert (pid == os.getpid()) == is_here


@pytest.mark.parametrize("close", [pool.Pool.close, lambda _: pool.close_all()])
def test_closing_kills_a_call_that_hangs_at_once(tmp_path, close):
  path = tmp_path / "pids"
  workers = pool.Pool([ANNOUNCED], num_workers=1, timeout_seconds=500.0)
  call = workers.submit(ANNOUNCED, [f"Trap {path}"], [])
  while not path.exists():
    time.sleep(0.01)
  start = time.monotonic()
  close(workers)
  assert time.monotonic() - start < 10
  assert "exit code -9" in call.result().reason
  await_end(int(path.read_text().split()[0]))


def test_a_path_that_names_nothing_is_refused_with_its_setting():
  with pytest.raises(
    ValueError, match=r"^a.b \('os:no_such'\) must name a fun"
  ):
    functions.resolve("os:no_such", setting="a.b")
