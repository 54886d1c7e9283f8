import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from data_pipelines.sources import processes


def square(batch):
  time.sleep(0.01 * (batch[0] % 3))
  return [each**2 for each in batch]


def die_of_37(batch):
  if 37 in batch:
    os.kill(os.getpid(), signal.SIGKILL)
  return square(batch)


def hang_at_37(batch):
  if 37 in batch:
    time.sleep(1000)
  return square(batch)


def fail(batch):
  raise ZeroDivisionError(f"in {batch[0]}")


BATCHES = [list(range(start, start + 8)) for start in range(0, 80, 8)]
SQUARES = [each**2 for each in range(80)]


def lost(record, how):
  return f"{record} {how}"


def mapped(function, num_workers=2, batches=BATCHES):
  return list(
    processes.map_in_order(
      function, batches, num_workers=num_workers, lost=lost
    )
  )


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_are_in_order_whatever_the_number_of_processes(num_workers):
  assert mapped(square, num_workers) == SQUARES


@pytest.mark.parametrize(
  "function, how",
  [
    (die_of_37, "was ended by SIGKILL"),
    (hang_at_37, "took longer than 3 seconds"),
  ],
)
def test_a_process_costs_the_record_that_it_dies_of(monkeypatch, function, how):
  monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 3.0)
  expected = SQUARES[:37] + [f"37 {how}"] + SQUARES[38:]
  assert mapped(function) == expected


def test_a_bug_is_raised():
  with pytest.raises(ZeroDivisionError, match="in 0"):
    mapped(fail)


def test_few_batches_are_read_ahead_and_all_ends_with_the_iteration():
  read = []

  def batches():
    for batch in BATCHES:
      read.append(batch)
      yield batch

  before = threading.active_count()
  results = processes.map_in_order(square, batches(), num_workers=1, lost=lost)
  assert next(results) == 0
  assert len(read) <= 4
  results.close()
  assert threading.active_count() == before


PROGRAM = """
import contextlib
import signal
import sys
# A shell's background jobs inherit that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from data_pipelines.sources import processes
from tests.data_pipelines.sources import processes_test
results = processes.map_in_order(
  processes_test.hang_at_37, processes_test.BATCHES, num_workers=2, lost=None
)
with contextlib.closing(results):
  print(next(results), flush=True)
  assert "jax" not in sys.modules and "tensorflow" not in sys.modules
  list(results)
"""


def test_ctrl_c_reaches_the_main_process_alone():
  with subprocess.Popen(
    [sys.executable, "-c", PROGRAM],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
    text=True,
  ) as process:
    assert process.stdout.readline() == "0\n"
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
  assert process.returncode == -signal.SIGINT
  assert said.count("KeyboardInterrupt") == 1
