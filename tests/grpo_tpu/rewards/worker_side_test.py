"""Users' rewards that are awaited one by one, and those with a set-up."""

import itertools

import numpy as np
import pytest

from grpo_tpu.rewards import scoring
from tests.grpo_tpu.rewards import async_rewards, custom_test, user_rewards
from tests.grpo_tpu.rewards.custom_test import ROW_FAILS, TRAPPED, score

HERE = "tests.grpo_tpu.rewards.async_rewards"


def config_of(*names, **changes):
  paths = tuple(f"{HERE}:{name}" for name in names)
  fields = {"custom": paths, "custom_weights": (2.0,) * len(names)}
  return custom_test.config_of(**fields | {"max_retries": 0} | changes)


@pytest.fixture(autouse=True)
def _closed():
  yield
  scoring.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_calls_of_all_groups_are_in_flight_together_up_to_the_limit(
  num_workers,
):
  config = config_of("six_at_once", num_workers=num_workers, max_concurrent=6)
  problems = [custom_test.make_problem()] * 3
  started = [scoring.start([""] * 3, problems, config) for _ in range(4)]
  for finish in started:
    assert finish().values[-1].tolist() == [6, 6, 6]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_reward_is_that_of_its_own_row(num_workers):
  """Beside functions of lists, and whatever call ends first."""
  config = config_of("of_problem", "Listed", num_workers=num_workers)
  found = score([""] * 40, config).components
  np.testing.assert_array_equal(found["of_problem"], range(40))
  assert sorted(found["Listed"]) == list(range(1, 41))


def test_a_row_is_paid_if_a_further_try_succeeds():
  """Else it is excluded and counted, and the others are paid."""
  for retries in (2, 1):
    found = score([""] * 20, config_of("flaky", max_retries=retries))
    failed = [retries < 2 and row in (3, 13) for row in range(20)]
    np.testing.assert_array_equal(found.failed["flaky"], failed)
    expected = np.where(failed, 0, np.arange(20))
    np.testing.assert_array_equal(found.components["flaky"], expected)
    assert found.errors["flaky"] == sum(failed)
    async_rewards._tries.clear()


@pytest.mark.parametrize(
  ("name", "num_workers", "reason"),
  [
    ("hanging", 1, "longer than 1 seconds"),
    ("hanging", 0, "longer than 1 seconds"),
    ("stubborn", 1, "longer than 1 seconds"),
    ("blocking", 1, "longer than 1 seconds"),
    ("stuck", 1, "longer than 1 seconds"),
    ("dying", 1, "exit code 3"),
    ("leaving", 1, "SystemExit: 4"),
    ("leaving", 0, "SystemExit: 4"),
    ("interrupting", 1, "its process "),
    ("eating", 1, "MemoryError: "),
    ("cancelled", 1, "CancelledError"),
    ("cancelled", 0, "CancelledError"),
    ("cancelling", 1, "it cancelled itself"),
    ("cancelling_all", 1, "its process "),
    ("stopping", 1, "stopped before Future completed"),
    ("leaking", 1, "left a task"),
    ("foreign", 1, "Foreign: "),
    ("grouped", 0, "BaseExceptionGroup: two"),
    ("timing_out", 1, "TimeoutError: "),
    ("nan", 1, "not nan"),
    ("listed", 1, "not an object of type list"),
    ("awaitable", 1, "not None"),
  ],
)
def test_a_bad_row_fails_alone(name, num_workers, reason, caplog):
  limit = 1.0 if "longer" in reason else 20.0
  config = config_of(name, num_workers=num_workers, timeout_seconds=limit)
  found = score(TRAPPED, config)
  np.testing.assert_array_equal(found.failed[name], ROW_FAILS)
  assert found.errors[name] == 2
  expected = np.float32(user_rewards.brevity(TRAPPED, None))
  expected[ROW_FAILS] = 0
  np.testing.assert_array_equal(found.components[name], expected)
  assert reason in caplog.text


def test_a_worker_whose_calls_ignore_their_end_is_replaced():
  """Before the next batch, so that they neither pile up nor cost a row."""
  config = config_of(
    *("process", "stubborn"), num_workers=1, timeout_seconds=0.5
  )
  pids = []
  for _ in range(2):
    for started in scoring.start_workers(config):
      started.result()
    found = score(["x", "Trap", "y"], config)
    assert found.valid.tolist() == [True, False, True]
    pids.append({*found.components["process"]})
  assert len(pids[0]) == 1 and not pids[0] & pids[1]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", ["Listed", "Awaited"])
def test_a_class_is_made_and_loaded_once_before_the_first_row(
  name, num_workers
):
  """The reward is the number of the call of the one instance."""
  async_rewards.Loaded.number = itertools.count(1)
  config = config_of(name, num_workers=num_workers)
  for batch in range(2):
    found = score([""] * 9, config).components[name]
    assert sorted(found) == [*range(9 * batch + 1, 9 * batch + 10)]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", ["Unloadable", "AwaitedUnloadable"])
def test_a_set_up_that_fails_ends_the_run_with_its_words(name, num_workers):
  config = config_of(name, num_workers=num_workers)
  reason = rf"{name}.*FileNotFoundError: no weights here \(.*rewards.py:\d+\)"
  with pytest.raises(RuntimeError, match=reason):
    score(TRAPPED, config)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("of_lists", "must take `completion` and `problem`, one of each, because"),
    (
      "positional",
      "must take `completion` and `problem`, one of each, because",
    ),
    ("yielding", "must return its reward, because it is async"),
    ("Named", "must take no arguments when it is made"),
    ("Uncalled", "must have a method `__call__`, because it is a class"),
  ],
)
def test_what_cannot_be_called_is_refused_before_the_run(name, message):
  path = rf"rewards.custom \('{HERE}:{name}'\) {message}"
  with pytest.raises(ValueError, match=path):
    config_of(name)
