"""A step that lasts long says what it is at; one that does not says nothing."""

import time

import pytest

from grpo_tpu.distributed import activity, compile_cache

SOON = 0.5


@pytest.fixture
def said(caplog):
  caplog.set_level("INFO", logger="absl")
  with activity.reporting(SOON):
    yield lambda: caplog.messages
  assert not activity._tasks


def test_a_long_task_says_its_parts_at_intervals(said):
  with activity.doing("Step 3"):
    with activity.doing("rollout", total=1024, unit="tokens") as task:
      task.done = 512
      time.sleep(2.5 * SOON)
  assert set(said()) == {"Step 3: rollout, 512 of 1024 tokens"}
  assert 1 <= len(said()) <= 2


def test_short_tasks_say_nothing_however_many(said):
  for step in range(12):
    with activity.doing(f"Step {step}"), activity.doing("rollout"):
      time.sleep(SOON / 8)
  time.sleep(2 * SOON)  # And nothing is said while nothing is done.
  assert said() == []


def test_a_task_that_raises_is_over(said):
  with pytest.raises(KeyError), activity.doing("Step 1"):
    raise KeyError
  time.sleep(2 * SOON)
  assert said() == []


def test_items_count_even_if_the_loop_ends_early():
  for item in activity.count_parts("evaluation", "abc", unit="batches"):
    if item == "b":
      assert str(activity._tasks[0]) == "evaluation, 1 of 3 batches"
      break
  assert not activity._tasks


def test_compiling_ahead_counts_the_programs():
  import jax
  import jax.numpy as jnp

  program = compile_cache.AotJit(jax.jit(lambda x: x + 1))
  with activity.doing("Compiling", total=2, unit="programs") as task:
    for size in (3, 4):
      program.prepare(jax.ShapeDtypeStruct((size,), jnp.float32))
  assert str(task) == "Compiling, 2 of 2 programs"


def test_a_first_call_that_compiles_says_so():
  import jax
  import jax.numpy as jnp

  seen = []

  @jax.jit
  def double(x):
    seen.append([str(task) for task in activity._tasks])
    return 2 * x

  program = compile_cache.AotJit(double)
  program(jnp.ones(3))
  program(jnp.ones(3))
  assert seen == [["compiling double"]]
