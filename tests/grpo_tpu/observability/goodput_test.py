"""Where the time goes: all of it, once, over restarts too."""

import json
import random

import pytest

from grpo_tpu.observability import goodput


class Time:
  """A clock that moves when it is told to."""

  def __init__(self, now: float = 1000.0):
    self.now = now

  def __call__(self) -> float:
    return self.now


def new_clock(time, *, age_seconds=0.0):
  return goodput.Clock(now=time, unix_now=time, age_seconds=age_seconds)


def test_every_second_is_in_one_phase():
  """Of a random walk through phases, one inside another."""
  time, rng = Time(), random.Random(0)
  clock = new_clock(time, age_seconds=7.0)
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


def test_compiling_is_taken_out_of_the_phase_it_falls_into():
  time = Time()
  clock = new_clock(time)
  clock.start_steps()
  with clock.phase("update"):
    time.now += 10
    clock._listen("/jax/core/compile/backend_compile_duration", 8.0)
    clock._listen("/jax/some/other/event", 3.0)
  shares = clock.shares()
  assert (shares["compile"], shares["update"]) == pytest.approx((0.8, 0.2))


def test_a_restart_carries_the_sums_over_and_counts_what_was_lost(tmp_path):
  """Steps 1 and 2 took 10 s each; 2 is done again, after 5 s of nothing."""
  path, time = tmp_path / "metrics.jsonl", Time()
  first = new_clock(time)
  first.start_steps()
  with path.open("w") as file:
    for step in (1, 2):
      with first.phase("update"):
        time.now += 10
      file.write(json.dumps({"step": step} | first.scalars()) + "\n")
    file.write('{"step": 3, "torn')
  time.now += 5
  second = new_clock(time)
  time.now += 3
  second.resume(path, 1)
  second.start_steps()
  time.now += 2
  seconds = {k: v * 30 for k, v in second.shares().items() if v}
  assert seconds == pytest.approx(
    {"update": 10, "lost": 10, "restart": 8, "other": 2}
  )


def test_only_what_a_host_does_alone_makes_it_slow():
  time = Time()
  clock = new_clock(time)
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
