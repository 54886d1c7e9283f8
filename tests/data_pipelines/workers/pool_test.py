"""Calls in worker processes: results, failures, and processes that end.

Further laws of the pool are tested through users' rewards, its callers, in
tests/grpo_tpu/rewards/custom_test.py.
"""

import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from data_pipelines.workers import functions, pool
from tests.data_pipelines.workers import hostile

ROOT = pathlib.Path(__file__).resolve().parents[3]
ANNOUNCED = "tests.grpo_tpu.rewards.user_rewards:announced"
HOSTILE = "tests.data_pipelines.workers.hostile"
PATHS = ("math:hypot", "os:getpid", "builtins:len", "builtins:float")


def is_alive(pid):
  """True for a running process, False for a zombie."""
  if not pathlib.Path("/proc/self/stat").exists():
    pytest.skip("no /proc, so a zombie looks like a running process")
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
  except (FileNotFoundError, ProcessLookupError):
    return False
  return state.split()[0] not in "ZX"


def await_end(pid, seconds=20.0):
  deadline = time.monotonic() + seconds
  while is_alive(pid):
    assert time.monotonic() < deadline, f"process {pid} still runs"
    time.sleep(0.02)


def make_pool(*names, num_workers=1, timeout_seconds=20.0, memory_gib=4.0):
  return pool.Pool(
    [*PATHS, *(f"{HOSTILE}:{name}" for name in names)],
    num_workers=num_workers,
    timeout_seconds=timeout_seconds,
    memory_gib=memory_gib,
  )


@pytest.fixture(params=[0, 2])
def workers(request):
  made = make_pool("raise_unspeakable", "leave", num_workers=request.param)
  yield made
  made.close()


@pytest.fixture
def open_pool():
  pools = []

  def made(*names, **changes):
    pools.append(make_pool(*names, **changes))
    return pools[-1]

  yield made
  for each in pools:
    each.close()


def call(workers, name, *arguments, **options):
  path = f"{HOSTILE}:{name}" if ":" not in name else name
  return workers.submit(path, *arguments, **options).result(60)


def test_a_call_gives_the_functions_result_or_its_failure(workers):
  calls = [workers.submit("math:hypot", 3.0, float(i)) for i in range(5)]
  assert calls[4].result() == 5.0
  failure = workers.submit("builtins:len", 3).result()
  assert isinstance(failure, functions.Failure)
  assert failure.reason.startswith("TypeError: object of type 'int' has no len")
  assert workers.submit("builtins:len", "abc").result() == 3


def test_leaving_or_raising_without_words_is_a_failure_too(workers):
  assert call(workers, "leave").reason.startswith("SystemExit: 4 (")
  reason = call(workers, "raise_unspeakable").reason
  # The reason ends with the file and line of the function.
  assert reason.startswith("Unspeakable: (without words) (")
  assert re.search(r"hostile\.py:\d+\)$", reason)


def test_a_result_that_does_not_pass_the_check_is_a_failure(workers):
  def check(result):
    raise ValueError(f"{result} is refused")

  found = workers.submit("builtins:len", "abc", check=check).result()
  assert found == functions.Failure("3 is refused")
  assert call(workers, "builtins:len", "abc") == 3


def test_with_workers_calls_leave_this_process():
  for num_workers, is_here in ((0, True), (1, False)):
    made = make_pool(num_workers=num_workers)
    pid = made.submit("os:getpid").result()
    made.close()
    assert (pid == os.getpid()) == is_here


@pytest.mark.parametrize("close", [pool.Pool.close, lambda _: pool.close_all()])
def test_closing_kills_a_call_that_hangs_at_once(tmp_path, close):
  path = tmp_path / "pids"
  workers = make_pool("start_children", timeout_seconds=500.0)
  running = workers.submit(f"{HOSTILE}:start_children", str(path), "hang")
  while not path.exists():
    time.sleep(0.01)
  start = time.monotonic()
  close(workers)
  assert time.monotonic() - start < 10
  assert running.result() == functions.Failure(
    "its process was ended by SIGKILL"
  )
  for pid in json.loads(path.read_text()):
    assert not is_alive(pid)


@pytest.mark.parametrize(
  ("end", "how"),
  [
    ("exit", "its process ended with exit code 3"),
    ("abort", "its process was ended by SIGABRT"),
    ("hang", "it took longer than 2 seconds"),
    ("return", None),
  ],
)
def test_what_a_worker_started_ends_with_it_in_whatever_session(
  open_pool, tmp_path, end, how
):
  path = tmp_path / "pids"
  workers = open_pool("start_children", timeout_seconds=2.0)
  found = call(workers, "start_children", str(path), end)
  assert found == (how and functions.Failure(how))
  pids = json.loads(path.read_text())
  if end == "return":
    assert all(map(is_alive, pids))
    workers.close()
  # Nothing is waited for: all had ended before the call was answered.
  assert not any(map(is_alive, pids))


ORPHANING = """
import sys
from tests.data_pipelines.workers import pool_test
pools = []
for path, end in ((sys.argv[1], "return"), (sys.argv[2], "hang")):
  pools.append(pool_test.make_pool("start_children", timeout_seconds=500.0))
  pool_test.call(pools[-1], "start_children", path, end)
"""


@pytest.mark.multiprocess
def test_nothing_outlives_a_program_that_is_killed(tmp_path):
  """Neither an idle worker nor a busy one, nor what they have started."""
  idle, busy = tmp_path / "idle", tmp_path / "busy"
  program = subprocess.Popen(
    [sys.executable, "-c", ORPHANING, str(idle), str(busy)], cwd=ROOT
  )
  try:
    while not busy.exists():
      assert program.poll() is None
      time.sleep(0.01)
  finally:
    program.send_signal(signal.SIGKILL)
  pids = json.loads(idle.read_text()) + json.loads(busy.read_text())
  program.wait()
  assert len(pids) == 12
  for pid in pids:
    await_end(pid)


def test_an_answer_is_never_unpickled(open_pool, tmp_path):
  path = tmp_path / "made by the bomb"
  workers = open_pool("write_bomb")
  found = call(workers, "write_bomb", str(path))
  assert not path.exists()
  assert isinstance(found, functions.Failure)
  assert call(workers, "builtins:len", "abc") == 3


@pytest.mark.parametrize(
  "junk",
  [
    "x",  # Then the worker's own answer.
    "\xff" * 8,
    "\0" * 7 + "\2[]",
    "\0" * 7 + "\4null",
    "\0" * 7 + "\3{]}",
    "\0" * 6 + "\x4e\x20" + "[" * 20_000,
    "\0" * 7 + '\x0b{"error":1}',
    "\0" * 7 + '\x0b{"result":1',
  ],
)
def test_an_answer_that_is_none_is_the_fault_of_its_call_alone(open_pool, junk):
  workers = open_pool("write_to_connection")
  before = call(workers, "os:getpid")
  found = call(workers, "write_to_connection", junk)
  assert isinstance(found, functions.Failure) and len(found.reason) < 1100
  assert "took longer" not in found.reason
  assert call(workers, "os:getpid") != before
  assert not is_alive(before)


def test_an_answer_to_no_call_is_not_taken_for_the_next_ones(open_pool):
  workers = open_pool("answer_twice")
  assert call(workers, "answer_twice") is None
  time.sleep(1)
  assert call(workers, "builtins:len", "abc") == 3


def test_an_answer_before_the_call_is_read_is_a_failure(open_pool):
  workers = open_pool("answer_early", "size")
  call(workers, "answer_early")
  found = call(workers, "size", "x" * 50_000_000)
  assert found == functions.Failure("it answered before it had read the call")
  assert call(workers, "size", "x") == 1


def test_the_timeout_covers_sending(open_pool):
  workers = open_pool("stop_soon", "size", timeout_seconds=2.0)
  call(workers, "stop_soon")
  time.sleep(0.5)
  start = time.monotonic()
  found = call(workers, "size", "x" * 10_000_000)
  assert found == functions.Failure("it took longer than 2 seconds")
  assert time.monotonic() - start < 10
  assert call(workers, "size", "x" * 10_000_000) == 10_000_000


def test_a_worker_that_was_killed_between_calls_costs_no_call(open_pool):
  workers = open_pool()
  before = call(workers, "os:getpid")
  os.kill(before, signal.SIGKILL)
  time.sleep(0.5)
  assert call(workers, "builtins:len", "abc") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits memory")
def test_a_worker_that_takes_too_much_memory_is_replaced(open_pool):
  workers = open_pool("take_memory", memory_gib=0.5)
  before = call(workers, "os:getpid")
  for pid in (before, before):
    score = pathlib.Path(f"/proc/{pid}/oom_score_adj").read_text()
    assert int(score) == 1000
  found = call(workers, "take_memory", 0.75)
  assert found.reason.startswith("MemoryError: (")
  assert found.reason.endswith(" (a worker may take 0.5 GiB)")
  assert call(workers, "os:getpid") != before
  assert call(workers, "take_memory", 0.25) == 2**28


def test_what_a_call_prints_is_bounded_and_printable(open_pool, caplog):
  caplog.set_level(logging.INFO, "absl")
  workers = open_pool("print_much")
  assert call(workers, "print_much") == "done"
  lines = [record.getMessage() for record in caplog.records]
  assert lines[0] == "A worker printed: first \\x1b[2J"
  assert sum(map(len, lines)) < 20_000
  dropped = re.fullmatch(r"A worker printed (\d+) bytes more\.", lines[-1])
  assert dropped and int(dropped[1]) > hostile.LARGE - 20_000
  caplog.clear()
  assert call(workers, "builtins:len", "abc") == 3
  assert not caplog.records


def test_a_function_may_use_the_alarm(open_pool):
  """Timeouts of libraries, such as those of math-verify, use it."""
  assert call(open_pool("alarm_itself"), "alarm_itself") == "rang"


def test_a_result_that_is_no_json_is_a_failure(open_pool):
  workers = make_pool()
  assert call(workers, "builtins:float", "inf").reason.startswith(
    "its result is not JSON: ValueError"
  )
  workers.close()


def test_a_path_that_names_nothing_is_refused_with_its_setting():
  with pytest.raises(
    ValueError, match=r"^a.b \('os:no_such'\) must name a fun"
  ):
    functions.resolve("os:no_such", setting="a.b")
