"""The loop stops at any poll, saves, and goes on as if it had not stopped.

With arithmetic in the place of a network; the real one is stopped by
`tests/e2e/preemption_test.py`.
"""

import contextlib
import itertools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils

from grpo_tpu.distributed import preemption
from grpo_tpu.observability import exit_report
from grpo_tpu.rl import experience, partial_step, train_state
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.train import loop as train

NUM_STEPS = 3
SAMPLED = [1, 2, 1]  # Batches of prompts that each step takes.
NEVER = 10**6


class Run:
  """What each step does; whatever is done is written down, in its order."""

  checkpoint_meta = {"data": "a"}

  def __init__(self, done, *, num_iterations, skips=lambda update: False):
    settings = types.SimpleNamespace(
      num_steps=NUM_STEPS,
      num_iterations=num_iterations,
      max_skipped_updates=2,
    )
    data = types.SimpleNamespace(kind="online")
    self.config = types.SimpleNamespace(train=settings, data=data)
    self._done, self._skips = done, skips

  def experience(self, state, batches, step, poll):
    assert int(state.step) == step - 1
    poll()
    count = SAMPLED[step - 1]
    taken = list(itertools.islice(batches, count))
    assert taken[0] == int(state.position)
    poll()
    self._done.append(("sampled", step, taken))
    ids = jnp.full((2, 1), step + int(state.params["w"]), jnp.int32)
    mask = jnp.ones((2, 1, 1), bool)
    bundles = TrainBatch(
      ids, jnp.ones(2, jnp.int32), jnp.zeros((2, 0)), ids[:, None], mask
    )
    scalars = {"train/tokens": float(sum(taken) + 1)}
    return experience.Experience(bundles, scalars, [], count)

  def compared(self, state, bundles):
    return bundles

  def updated(self, state, begun, step):
    number = begun.updates_done
    old, learnt = int(state.params["w"]), int(begun.bundles.prompt_ids[0, 0])
    new = (31 * old + learnt + number) % 9973
    self._done.append(("updated", step, number, new))
    begun.scalars[f"train/loss{number}"] = jnp.float32(new / 7)
    begun.skipped.append(float(self._skips((step, number))))
    return state.replace(params={"w": jnp.int32(new)})

  def evaluated(self, state, step, writer, poll):
    poll()
    poll()
    return {"eval/accuracy": float(state.params["w"])}


class Checkpoints:
  """One that saves where it must, and remembers the newest."""

  def __init__(self):
    self.newest = None
    self.is_on_disk = False

  def save(self, step, state, meta, *, metrics=None, partial_step=None, force):
    assert meta == Run.checkpoint_meta
    if force:
      self.newest = (step, state, partial_step)
      self.is_on_disk = False

  def wait(self):
    self.is_on_disk = True

  def scalars(self):
    return {}


def lines_but_for_time(done):
  return [
    (*event[:2], {k: v for k, v in event[2].items() if k[:5] != "perf/"})
    if event[0] == "line"
    else event
    for event in done
  ]


def go_on(run, done, checkpoints, *, on_poll=lambda: None):
  """From the newest checkpoint, or from the start."""
  zero = jnp.zeros((), jnp.int32)
  new = train_state.TrainState(zero, zero, {"w": zero}, ())
  start, state, unfinished = checkpoints.newest or (0, new, None)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  begun = unfinished and partial_step.BegunStep.of(unfinished, place)
  writer = types.SimpleNamespace(
    failures=0,
    write=lambda step, scalars: done.append(("line", step, dict(scalars))),
    write_samples=lambda step, samples, split: done.append((split, step)),
    progress=lambda num_steps: None,
  )
  watch = types.SimpleNamespace(
    mark=on_poll, end_startup=lambda: done.append("started")
  )
  profiler = types.SimpleNamespace(step=lambda step: contextlib.nullcontext())
  ending = exit_report.ExitReport()
  loop = train._Loop(run, writer, checkpoints, watch, ending, profiler)
  batches = itertools.count(train.batches_taken(state, begun))
  loop.go_on(state, start, batches, begun)
  return ending


@pytest.fixture
def notice(monkeypatch):
  """Makes the notice be heard at a poll of the process, and no other."""

  def at(number):
    monkeypatch.setattr(
      multihost_utils,
      "reached_preemption_sync_point",
      lambda tick: tick == number,
    )

  at(NEVER)
  return at


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_stopped_at_any_poll_it_does_all_once_and_in_the_same_order(
  notice, num_iterations
):
  whole, polls = [], []
  run = Run(whole, num_iterations=num_iterations)
  go_on(run, whole, Checkpoints(), on_poll=lambda: polls.append(1))
  # Before a step, twice in its rollout, between its updates, twice in its
  # evaluation.
  assert len(polls) == NUM_STEPS * (1 + 2 + num_iterations - 1 + 2)
  assert whole.count("started") == NUM_STEPS
  for number in range(1, len(polls) + 1):
    done, checkpoints = [], Checkpoints()
    run = Run(done, num_iterations=num_iterations)
    notice(number)
    with pytest.raises(preemption.Preempted):
      go_on(run, done, checkpoints)
    assert checkpoints.is_on_disk
    assert len(done) < len(whole)
    notice(NEVER)
    go_on(run, done, checkpoints)
    assert lines_but_for_time(done) == lines_but_for_time(whole), number


def test_what_is_begun_is_kept_only_once_something_was_learnt(notice):
  """What was sampled is sampled again for nothing, and need not be saved."""
  kept = []
  for number in range(1, 8):
    checkpoints = Checkpoints()
    run = Run([], num_iterations=3)
    notice(number)
    with pytest.raises(preemption.Preempted):
      go_on(run, [], checkpoints)
    step, _, unfinished = checkpoints.newest
    assert step == 0
    kept.append(unfinished and unfinished.updates_done)
  assert kept == [None, None, None, 1, 2, 3, 3]


@pytest.mark.parametrize(
  ("skipped", "is_given_up"),
  [
    ([(1, 0), (2, 0)], False),
    ([(1, 1), (2, 0)], True),
    ([(2, 0), (2, 1)], True),
  ],
  ids=["apart", "over the border of a step", "in one step"],
)
def test_too_many_skipped_in_a_row_end_the_run_before_it_saves_again(
  notice, skipped, is_given_up
):
  done, checkpoints = [], Checkpoints()
  run = Run(done, num_iterations=2, skips=lambda update: update in skipped)
  if not is_given_up:
    assert go_on(run, done, checkpoints).skipped_updates == 2
    lines = [event[2] for event in done if event[0] == "line"]
    assert [line["train/skipped_updates"] for line in lines] == [1, 1, 0]
    return
  with pytest.raises(FloatingPointError, match="2 updates in a row"):
    go_on(run, done, checkpoints)
  assert checkpoints.newest is None
  assert done[-1][0] == "updated"
