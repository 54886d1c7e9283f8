"""Every second counts once, over restarts too."""

import json
import random
import types

import jax
import pytest

from grpo_tpu.observability import goodput

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Time:
  """The clocks that the test sets, in place of the system's."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    clocks = dict.fromkeys(("time", "monotonic"), lambda: self.now)
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(**clocks))
    self._monkeypatch = monkeypatch

  def start_clock(self, *, age_seconds=0.0):
    """The clock of a process that began so long ago."""
    start = self.now - age_seconds
    process = types.SimpleNamespace(create_time=lambda: start)
    self._monkeypatch.setattr(goodput.psutil, "Process", lambda: process)
    return goodput.Clock()


@pytest.fixture
def time(monkeypatch):
  return Time(monkeypatch)


def test_every_second_is_in_one_phase(time):
  """Random nested phases."""
  rng = random.Random(0)
  clock = time.start_clock(age_seconds=7.0)
  expected = dict.fromkeys(goodput.PHASES, 0.0) | {"restart": 7.0}

  def walk(depth, phase):
    for _ in range(rng.randrange(4)):
      seconds = rng.random()
      time.now += seconds
      expected[phase] += seconds
      if depth:
        inner = rng.choice(goodput.PHASES)
        with clock.phase(inner):
          walk(depth - 1, inner)

  clock.start_steps()
  for _ in range(20):
    walk(4, "other")
  total = sum(expected.values())
  shares = clock.shares()
  assert sum(shares.values()) == pytest.approx(1)
  assert shares == pytest.approx({k: v / total for k, v in expected.items()})
  assert clock.scalars()["perf/run_seconds"] == pytest.approx(total)


def test_compile_time_does_not_count_to_the_phase_around_it(time):
  clock = time.start_clock()
  clock.listen_to_compiler()
  clock.start_steps()
  with clock.phase("update"):
    time.now += 10
    for event, seconds in ((COMPILE_EVENT, 8.0), ("/jax/other/event", 3.0)):
      jax.monitoring.record_event_duration_secs(event, seconds)
  shares = clock.shares()
  assert (shares["compile"], shares["update"]) == pytest.approx((0.8, 0.2))


def test_a_restart_keeps_the_sums_and_counts_lost_steps(time, tmp_path):
  """Steps 1 and 2 take 10 s each; step 2 is repeated after a pause of 5 s."""
  path = tmp_path / "metrics.jsonl"
  first = time.start_clock()
  first.start_steps()
  with path.open("w") as file:
    for step in (1, 2):
      with first.phase("update"):
        time.now += 10
      file.write(json.dumps({"step": step} | first.scalars()) + "\n")
    for foreign in (
      *("5", "[1]", "{}", '{"step": 9}', "[" * 10**6),
      '{"step": 9, "perf/run_seconds": 1}',
      json.dumps({"step": 9} | dict.fromkeys(first.scalars(), "a")),
      json.dumps({"step": 9} | dict.fromkeys(first.scalars(), None)),
      json.dumps({"step": 9} | dict.fromkeys(first.scalars(), 10**400)),
    ):
      file.write(f"{foreign}\n")
    file.write('{"step": 3, "torn')
  time.now += 5
  second = time.start_clock()
  time.now += 3
  second.resume(path, 1)
  second.start_steps()
  time.now += 2
  seconds = {k: v * 30 for k, v in second.shares().items() if v}
  assert seconds == pytest.approx(
    {"update": 10, "lost": 10, "restart": 8, "other": 2}
  )


def test_only_the_work_of_a_host_alone_makes_it_slow(time):
  clock = time.start_clock()
  clock.start_steps()
  for phase, seconds in (("rollout", 50), ("data", 3), ("reward", 4)):
    with clock.phase(phase):
      time.now += seconds
  assert clock.alone_seconds() == pytest.approx(7)
  time.now += 1
  assert clock.alone_seconds() == pytest.approx(1)


def test_the_summary_names_the_largest_share_first():
  shares = {"data": 0.2, "update": 0.7996, "lost": 0.0004}
  assert goodput.summary(shares) == "update 80.0 %, data 20.0 %"
