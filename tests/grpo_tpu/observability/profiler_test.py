"""A trace holds the steps asked for, and lies where TensorBoard looks."""

import jax
import jax.numpy as jnp
import pytest

from grpo_tpu.observability import profiler as profiling


@pytest.fixture
def calls(monkeypatch):
  """What JAX's profiler is told, in order."""
  told = []
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda *_, **__: told.append("start")
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
  return told


def run(steps, wanted, told):
  config = profiling.ProfileConfig(wanted)
  with profiling.Profiler("W", config) as profiler:
    for step in steps:
      with profiler.step(step):
        told.append(step)


@pytest.mark.parametrize(
  ("steps", "wanted", "expected"),
  [
    (range(1, 5), (), [1, 2, 3, 4]),
    (range(1, 5), (2, 3), [1, "start", 2, 3, "stop", 4]),
    (range(1, 3), (1, 1), ["start", 1, "stop", 2]),
    # Gone on in the middle, gone on behind, and ended before the last.
    (range(3, 5), (2, 3), ["start", 3, "stop", 4]),
    (range(4, 6), (2, 3), [4, 5]),
    (range(1, 3), (2, 9), [1, "start", 2, "stop"]),
  ],
)
def test_the_steps_asked_for_are_traced_and_no_other(
  calls, steps, wanted, expected
):
  run(steps, wanted, calls)
  assert calls == expected


def test_a_run_that_fails_in_a_traced_step_leaves_its_trace(calls):
  profiler = profiling.Profiler("W", profiling.ProfileConfig((1, 5)))
  with pytest.raises(KeyError), profiler, profiler.step(1):
    raise KeyError
  assert calls == ["start", "stop"]


@pytest.mark.parametrize("call", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_is_logged_and_the_run_goes_on(
  calls, monkeypatch, caplog, call
):
  def fail(*_, **__):
    raise OSError("disk full")

  monkeypatch.setattr(jax.profiler, call, fail)
  run(range(1, 4), (1, 2), calls)
  assert [x for x in calls if isinstance(x, int)] == [1, 2, 3]
  assert "disk full" in caplog.text and len(caplog.records) == 1


def test_a_real_trace_lies_where_the_plugin_looks(tmp_path):
  config = profiling.ProfileConfig((2, 2))
  with profiling.Profiler(tmp_path, config) as profiler:
    for step in (1, 2, 3):
      with profiler.step(step):
        jnp.ones(4).block_until_ready()
  (trace,) = tmp_path.glob("plugins/profile/steps-2-2/*.xplane.pb")
  assert b"step_num" in trace.read_bytes()


@pytest.mark.parametrize("steps", [(1,), (0, 2), (3, 2), (1, 2, 3)])
def test_what_is_no_stretch_of_steps_is_refused(steps):
  with pytest.raises(ValueError, match=r"profile.steps \(.*=\(10, 12\)"):
    profiling.ProfileConfig(steps)
