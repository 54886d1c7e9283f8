"""The loop stops at any poll, saves, and resumes as if it had not stopped.

With arithmetic in the place of a network; the real one is stopped by
`tests/e2e/preemption_test.py`.
"""

import contextlib
import itertools
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils

from grpo_tpu.config import sections
from grpo_tpu.distributed import preemption
from grpo_tpu.observability import exit_report, goodput
from grpo_tpu.rl import experience, partial_step, train_state
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.train import loop, setup, trainer
from grpo_tpu.train.skipped_updates import SkippedUpdates

NUM_STEPS = 3
SAMPLED = [1, 2, 1]  # Batches of prompts that each step takes.
NEVER = 10**6
IDENTITY = {"data": "a"}


class Arithmetic(trainer.Trainer):
  """Trains on integers; every part of a step writes down that it was done."""

  def __init__(
    self,
    done,
    *,
    num_iterations,
    poll,
    skips=lambda update: False,
    stop_when="",
  ):
    settings = types.SimpleNamespace(
      num_steps=NUM_STEPS,
      num_iterations=num_iterations,
      max_skipped_updates=2,
      stop_rule=sections.StopRule.parse(stop_when),
    )
    self.config = types.SimpleNamespace(
      train=settings,
      data=types.SimpleNamespace(kind="online", prompts_per_step=2),
      samples=types.SimpleNamespace(every_steps=0),
      eval=types.SimpleNamespace(every_steps=1),
      rewards=types.SimpleNamespace(watched=()),
      lora=None,
    )
    self.mesh = self._teacher = self._teacher_embedding = None
    self.collector = self
    self.combination = types.SimpleNamespace(state=dict)
    self.learner = types.SimpleNamespace(
      params=lambda state: state.params,
      update=self._update,
      frozen=None,
      lost_fraction=lambda state: 0.0,
    )
    self.skipped_updates = SkippedUpdates(settings.max_skipped_updates)
    self._done, self._skips, self._poll = done, skips, poll
    self._clock, self._key = goodput.Clock(), None
    self._schedule = lambda update: 0.5**update
    self._shapes = set()
    index = types.SimpleNamespace(usable=range(4))
    self._data = types.SimpleNamespace(train_index=index)
    self.write_samples = lambda step, samples: done.append(("samples", step))

  def resume(self, state, partial=None):
    self.state, self.partial, self._step = state, partial, None
    position = int(state.position) + (partial.num_batches if partial else 0)
    self._prompts = itertools.count(position)

  def compile_ahead(self, state):
    pass

  def _add_logps(self, state, batch):
    return batch

  def collect(self, *args, **options):
    if "position" not in options:
      return super().collect(*args)  # The trainer's own verb.
    step, poll = self._step, options["poll"]
    poll()
    count = SAMPLED[step - 1]
    taken = list(itertools.islice(self._prompts, count))
    assert taken[0] == options["position"]
    poll()
    self._done.append(("sampled", step, taken))
    weight = int(self.state.params["w"])
    ids = jnp.full((2, 1), step + weight, jnp.int32)
    mask = jnp.ones((2, 1, 1), bool)
    batch = TrainBatch(
      ids, jnp.ones(2, jnp.int32), jnp.zeros((2, 0)), ids[:, None], mask
    )
    metrics = {"train/tokens": float(sum(taken) + 1)}
    return experience.Experience(batch, metrics, ["a sample"], count)

  def _update(self, state, batch, frozen, teacher_embedding):
    number = self.partial.updates_done
    old, learnt = int(state.params["w"]), int(batch.prompt_ids[0, 0])
    new = (31 * old + learnt + number) % 9973
    self._done.append(("updated", self._step, number, new))
    skipped = float(self._skips((self._step, number)))
    metrics = {f"loss{number}": jnp.float32(new / 7)}
    count = state.opt_state["count"] + int(1 - skipped)
    return (
      state.replace(params={"w": jnp.int32(new)}, opt_state={"count": count}),
      metrics | {"skipped_updates": skipped},
    )

  def evaluate(self, state):
    self._poll()
    self._poll()
    return {"eval/accuracy": float(state.params["w"])}, []


class Checkpoints:
  """One that saves where it must, and remembers the newest."""

  def __init__(self):
    self.newest = None
    self.is_on_disk = False

  def save(self, step, state, meta, *, metrics=None, partial_step=None, force):
    assert {k: meta[k] for k in IDENTITY} == IDENTITY
    if force:
      evaluation = {} if partial_step else meta["evaluation"]
      self.newest = (step, state, partial_step, evaluation)
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


def train(done, checkpoints, *, on_poll=lambda: None, is_new=False, **options):
  """From the newest checkpoint, or from the start."""
  zero = jnp.zeros((), jnp.int32)
  new = train_state.TrainState(zero, zero, {"w": zero}, {"count": zero})
  step, state, saved, evaluated = checkpoints.newest or (0, new, None, {})
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  partial = saved and partial_step.PartialStep.from_data(saved, sharding)
  arithmetic = Arithmetic(
    done, poll=preemption.Poll(on_poll=on_poll), **options
  )
  arithmetic.resume(state, partial)
  writer = types.SimpleNamespace(
    failures=0,
    write=lambda step, scalars: done.append(("line", step, dict(scalars))),
    write_samples=lambda step, samples, split: done.append((split, step)),
    log_progress=lambda num_steps: None,
    flush=lambda: None,
  )
  watch = types.SimpleNamespace(
    mark=on_poll, end_startup=lambda: done.append("started")
  )
  profiler = types.SimpleNamespace(step=lambda step: contextlib.nullcontext())
  report = exit_report.ExitReport()
  files = types.SimpleNamespace(failures=0, folder=pathlib.Path("none"))
  run = setup.Run(
    *(arithmetic, IDENTITY, checkpoints, files),
    *(writer, watch, report, profiler),
  )

  @contextlib.contextmanager
  def start(*_):
    run.begin(None if is_new else step, evaluated)
    yield run
    run.finish()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setup, "start", start)
    loop.train(arithmetic.config, "", None, report)
  return report


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
  train(
    whole,
    Checkpoints(),
    num_iterations=num_iterations,
    on_poll=lambda: polls.append(1),
  )
  # Before a step, twice in its rollout, between its updates, twice in its
  # evaluation.
  assert len(polls) == NUM_STEPS * (1 + 2 + num_iterations - 1 + 2)
  assert whole.count("started") == NUM_STEPS
  for number in range(1, len(polls) + 1):
    done, checkpoints = [], Checkpoints()
    notice(number)
    with pytest.raises(preemption.Preempted):
      train(done, checkpoints, num_iterations=num_iterations)
    assert checkpoints.is_on_disk
    assert len(done) < len(whole)
    notice(NEVER)
    train(done, checkpoints, num_iterations=num_iterations)
    assert lines_but_for_time(done) == lines_but_for_time(whole), number


def test_it_stops_where_the_target_is_first_met_however_often_it_is_stopped(
  notice,
):
  whole, polls = [], []
  checkpoints = Checkpoints()
  train(whole, checkpoints, num_iterations=1, on_poll=lambda: polls.append(1))
  values = [x[2]["eval/accuracy"] for x in whole if x[0] == "line"]
  assert values == sorted(set(values))
  target = {"num_iterations": 1, "stop_when": f"eval/accuracy >= {values[1]}"}
  wanted = whole[: next(i for i, x in enumerate(whole) if x[:2] == ("line", 2))]
  for number in range(1, len(polls) + 1):
    done, checkpoints = [], Checkpoints()
    notice(number)
    with contextlib.suppress(preemption.Preempted):
      train(done, checkpoints, **target)
    notice(NEVER)
    report = train(done, checkpoints, **target)
    assert checkpoints.newest[0] == report.step == 2
    assert "train.stop_when (eval/accuracy >= " in report.reason
    done = [x for x in lines_but_for_time(done) if x != "started"]
    expected = [x for x in lines_but_for_time(wanted) if x != "started"]
    assert done[: len(expected)] == expected
    assert done[-1][:2] == ("line", 2)
    # Started again it does nothing more; with another target it continues.
    train(done, checkpoints, **target)
    assert done[-1][:2] == ("line", 2)
    train(done, checkpoints, **target | {"stop_when": "eval/accuracy <= -1"})
    again = [x for x in lines_but_for_time(done) if x != "started"]
    assert again == [x for x in lines_but_for_time(whole) if x != "started"]


def test_an_epoch_is_a_pass_over_the_usable_problems(notice):
  """Two of the four in each batch, and four batches in three steps."""
  done = []
  train(done, Checkpoints(), num_iterations=1)
  epochs = [x[2]["data/epoch"] for x in done if x[0] == "line"]
  assert epochs == [0.5, 1.5, 2.0]


def test_a_target_that_the_start_meets_takes_no_step(notice):
  done, checkpoints = [], Checkpoints()
  options = {"num_iterations": 1, "stop_when": "eval/accuracy <= 0"}
  assert train(done, checkpoints, is_new=True, **options).step == 0
  assert checkpoints.newest[0] == 0
  assert train(done, checkpoints, **options).step == 0
  assert [x[:2] for x in done] == [("eval", 0), ("line", 0)]


def test_a_partial_step_is_saved_only_after_its_first_update(notice):
  """Before that, the same completions can be sampled again."""
  kept = []
  for number in range(1, 8):
    checkpoints = Checkpoints()
    notice(number)
    with pytest.raises(preemption.Preempted):
      train([], checkpoints, num_iterations=3)
    step, _, unfinished, _ = checkpoints.newest
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
  options = {"num_iterations": 2, "skips": lambda update: update in skipped}
  if not is_given_up:
    assert train(done, checkpoints, **options).skipped_updates == 2
    lines = [event[2] for event in done if event[0] == "line"]
    assert [line["train/skipped_updates"] for line in lines] == [1, 1, 0]
    # The optimizer has counted one update of each of the first two steps.
    assert [line["train/learning_rate"] for line in lines] == [1, 0.5, 0.25]
    return
  with pytest.raises(FloatingPointError, match="2 updates in a row"):
    train(done, checkpoints, **options)
  assert checkpoints.newest is None
  assert done[-1][0] == "updated"
