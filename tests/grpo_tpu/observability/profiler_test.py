"""A trace holds the requested steps, where TensorBoard looks for it."""

import jax
import jax.numpy as jnp
import pytest

from grpo_tpu.config import sections
from grpo_tpu.observability import mirror, profiler


@pytest.fixture
def calls(monkeypatch):
  """The calls of JAX's profiler, in order."""
  told = []
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda *_, **__: told.append("start")
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
  return told


def run(steps, wanted, told):
  with profiler.Profiler(mirror.Mirror("W"), wanted) as p:
    for step in steps:
      with p.step(step):
        told.append(step)


@pytest.mark.parametrize(
  ("steps", "wanted", "expected"),
  [
    (range(1, 5), (), [1, 2, 3, 4]),
    (range(1, 5), (2, 3), [1, "start", 2, 3, "stop", 4]),
    (range(1, 3), (1, 1), ["start", 1, "stop", 2]),
    # Resumed inside the range, resumed after it, ended before its last step.
    (range(3, 5), (2, 3), ["start", 3, "stop", 4]),
    (range(4, 6), (2, 3), [4, 5]),
    (range(1, 3), (2, 9), [1, "start", 2, "stop"]),
  ],
)
def test_only_the_requested_steps_are_traced(calls, steps, wanted, expected):
  run(steps, wanted, calls)
  assert calls == expected


def test_a_run_that_fails_in_a_traced_step_keeps_the_trace(calls):
  p = profiler.Profiler(mirror.Mirror("W"), (1, 5))
  with pytest.raises(KeyError), p, p.step(1):
    raise KeyError
  assert calls == ["start", "stop"]


@pytest.mark.parametrize("call", ["start_trace", "stop_trace"])
def test_a_failed_trace_is_logged_and_the_run_continues(
  calls, monkeypatch, caplog, call
):
  def fail(*_, **__):
    raise OSError("disk full")

  monkeypatch.setattr(jax.profiler, call, fail)
  run(range(1, 4), (1, 2), calls)
  assert [x for x in calls if isinstance(x, int)] == [1, 2, 3]
  assert "disk full" in caplog.text and len(caplog.records) == 1


def test_the_plugin_finds_a_real_trace(tmp_path):
  with profiler.Profiler(mirror.Mirror(tmp_path), (2, 2)) as p:
    for step in (1, 2, 3):
      with p.step(step):
        jnp.ones(4).block_until_ready()
  (trace,) = tmp_path.glob("plugins/profile/steps-2-2/*.xplane.pb")
  assert b"step_num" in trace.read_bytes()


@pytest.mark.parametrize("steps", [(1,), (0, 2), (3, 2), (1, 2, 3)])
def test_an_invalid_range_of_steps_is_refused(steps):
  with pytest.raises(ValueError, match=r"profile.steps \(.*=\(10, 12\)"):
    sections.ProfileConfig(steps)
