"""A run is restarted if that can help, and not for ever."""

import dataclasses
import itertools

import pytest

from launch.pod import exits, lease, slices, supervision, workers
from tests.launch.pod import fake_cloud

Exit = exits.Exit
READY = slices.State.READY
STATUS = workers.Status("none", None, False, "a commit", -1, -1)
RUNNING = dataclasses.replace(STATUS, state="running")


DRY = exits.Failure(Exit.NO_CAPACITY, "no capacity")
OFFLINE = exits.Failure(Exit.NETWORK, "no network")
BUSY = exits.Failure(Exit.UNAVAILABLE, "INTERNAL")
TAKEN = exits.Failure(Exit.PREEMPTED, "taken away")
ABSENT = slices.State.ABSENT


def ended(code: int | None, **changes) -> workers.Status:
  state = "lost" if code is None else "ended"
  return dataclasses.replace(STATUS, state=state, exit_code=code, **changes)


class World:
  """A slice of two workers that follows a script.

  Attributes:
    lives: For each start, the statuses of the workers at each check, or a
      failure that the check raises. Further starts end with 0.
    done: The actions so far, in order.
  """

  dry_run = False
  zone = "europe-west4-b"

  def __init__(self, monkeypatch, lives, *, state=READY, **changes):
    self.settings = fake_cloud.settings(**changes)
    self.lives = [list(life) for life in lives]
    self.done: list[str] = []
    self.pauses: list[float] = []
    self.state = state
    self.refusals: list = []  # What the next creations raise.
    self.now = 0.0
    self.script: list = []
    for name in ("find", "create", "delete", "require_ready"):
      monkeypatch.setattr(slices, name, getattr(self, name))
    for name in ("status", "worker_status", "setup", "run"):
      monkeypatch.setattr(workers, name, getattr(self, name))
    monkeypatch.setattr(workers, "commit", lambda: "a commit")
    monkeypatch.setattr(supervision.time, "sleep", self.sleep)
    monkeypatch.setattr(supervision.time, "monotonic", lambda: self.now)

  def sleep(self, seconds):
    self.pauses.append(seconds)
    self.now += seconds

  def find(self, cloud, assumed):
    return slices.Slice(self.state, "", True, "", 2, True)

  def create(self, cloud):
    if self.refusals:
      raise self.refusals.pop(0)
    self.done.append("create")
    self.state = READY

  def delete(self, cloud):
    self.done.append("delete")
    self.state = slices.State.ABSENT

  def setup(self, cloud, num_workers):
    self.done.append("setup")

  def run(self, cloud, num_workers, job):
    self.done.append("run")
    self.script = self.lives.pop(0) if self.lives else [[ended(0)] * 2]

  def require_ready(self, cloud):
    if self.script and isinstance(self.script[0], exits.Failure):
      failure = self.script.pop(0)
      gone = slices.State.PREEMPTED
      self.state = gone if failure.exit == Exit.PREEMPTED else READY
      raise failure
    return self.find(cloud, READY)

  def worker_status(self, cloud, worker):
    return self.script[0][worker]

  def status(self, cloud, num_workers):
    if not self.script:
      return [STATUS] * 2
    if len(self.script) == 1:
      return self.script[0]
    return self.script.pop(0)

  def supervise(self, held=None) -> int:
    job = workers.Job("configs/smoke.py", ())
    seconds = (9.0, 7.0, 30.0)  # For a slice, between checks, before a start.
    return supervision.Supervisor(self, job, *seconds, held).supervise()

  def fails(self, held=None) -> Exit:
    with pytest.raises(exits.Failure) as raised:
      self.supervise(held)
    return raised.value.exit


def life(*codes, step=-1):
  """A life that reaches a step and ends with these codes on the two workers."""
  return [[ended(code, step=step) for code in codes]]


@pytest.mark.parametrize(
  "lives, code, runs",
  [
    ([life(0, 0)], 0, 1),
    *[([life(code, code)], 0, 2) for code in (75, 76, 134, 137, None)],
    # A wrong setting is not tried again, and a stopped run is not restarted.
    ([life(64, 64)], 64, 1),
    ([[[ended(75, was_stopped=True)] * 2]], 75, 1),
    # At the start, another process may still hold the TPU, or a host was lost
    # in a restore.
    *[([life(code, 1)], 0, 2) for code in (1, 139)],
    *[([life(code, 1)] * 3, code, 2) for code in (1, 139)],
    # An error after new steps would repeat.
    ([life(75, 75, step=3), life(1, 1, step=5)], 1, 2),
  ],
)
def test_a_run_is_restarted_if_that_can_help(monkeypatch, lives, code, runs):
  world = World(monkeypatch, lives)
  assert world.supervise() == code
  assert world.done == ["run"] * runs


def test_an_error_counts_only_if_the_slice_still_exists(monkeypatch):
  """The last hosts fail before the API reports the preemption."""
  world = World(monkeypatch, [life(1, 1)])
  calls = itertools.count()

  def require_ready(cloud):
    if next(calls) == 1:
      world.state = slices.State.PREEMPTED
      raise TAKEN

  monkeypatch.setattr(slices, "require_ready", require_ready)
  assert world.supervise() == 0
  assert world.done == ["run", "delete", "create", "run"]


@pytest.mark.parametrize("state", [*supervision._DEAD])
def test_the_rest_of_a_dead_slice_is_deleted(monkeypatch, state):
  world = World(monkeypatch, [], state=state)
  assert world.supervise() == 0
  assert world.done == ["delete", "create", "run"]


@pytest.mark.parametrize("losses", [[], [OFFLINE, [RUNNING] * 2]])
def test_an_existing_run_is_watched_and_not_started(monkeypatch, losses):
  world = World(monkeypatch, [])
  world.script = [[RUNNING] * 2, *losses, [ended(0)] * 2]
  assert world.supervise() == 0
  assert world.done == []


def test_hours_without_capacity_and_two_preemptions_are_survived(monkeypatch):
  """Neither counts as a failed start; a pause is 15 minutes at most."""
  lives = [[TAKEN], [TAKEN]]
  world = World(monkeypatch, lives, state=ABSENT, MAX_RESTARTS="2")
  world.refusals = [DRY, OFFLINE, BUSY, *[DRY] * 20]
  assert world.supervise() == 0
  assert world.now > 3 * 3600 and max(world.pauses) == 900
  assert world.done == [
    *("create", "run", "delete", "create", "run", "delete", "create", "run")
  ]


def test_a_queue_that_fails_for_capacity_is_no_failed_start(monkeypatch):
  stock = exits.Failure(Exit.FAILED, "the request failed: stockout")
  world = World(monkeypatch, [], state=ABSENT, MAX_RESTARTS="0")
  world.refusals = [stock] * 9
  assert world.supervise() == 0
  world.state, world.refusals = ABSENT, [exits.Failure(Exit.FAILED, "why")]
  assert world.fails() == Exit.RESTARTS_SPENT


def test_a_request_that_fails_after_a_long_wait_is_no_failed_start(monkeypatch):
  world = World(monkeypatch, [], state=ABSENT, MAX_RESTARTS="0")
  create, left = world.create, [1, 2, 3]

  def expires(cloud):
    if not left:
      return create(cloud)
    left.pop()
    world.now += 6 * 3600
    raise exits.Failure(Exit.FAILED, "the request is no longer valid")

  monkeypatch.setattr(slices, "create", expires)
  assert world.supervise() == 0


def test_a_zone_that_is_late_gives_way_to_the_next(monkeypatch):
  pending = slices.State.PENDING
  world = World(monkeypatch, [], state=pending, ZONE="a-b1-c,d-e1-f")
  assert world.supervise() == 0
  assert world.done == ["delete", "create", "run"]


class Held:
  """A lease whose sleeps end with what the test says."""

  def __init__(self, world, *ends):
    self.world, self.ends = world, list(ends)
    self.record = lease.Record("me", "here")

  def renew(self):
    pass

  def sleep(self, seconds):
    self.world.sleep(seconds)
    if self.ends and (end := self.ends.pop(0)):
      raise end


def test_a_request_to_stop_ends_the_run_and_the_wait_for_a_slice(monkeypatch):
  world = World(monkeypatch, [])
  world.script = [[RUNNING] * 2] * 9
  stopped: list[bool] = []
  monkeypatch.setattr(
    workers, "stop", lambda cloud, count, kill: stopped.append(kill)
  )
  assert world.supervise(Held(world, None, lease.Stopped())) == 75
  assert stopped == [False]
  world = World(monkeypatch, [], state=slices.State.PENDING)
  assert world.supervise(Held(world, lease.Stopped())) == 75
  assert world.done == [] and stopped == [False]


def test_a_lease_that_is_lost_ends_the_supervision_alone(monkeypatch):
  world = World(monkeypatch, [])
  world.script = [[RUNNING] * 2] * 9
  lost = Held(world, exits.Failure(Exit.BUSY, "taken over"))
  assert world.fails(lost) == Exit.BUSY and world.done == []


def test_a_slice_that_never_comes_is_waited_for_again(monkeypatch):
  """The longest wait for a slice is no failed start."""
  world = World(monkeypatch, [], state=slices.State.PENDING, MAX_RESTARTS="0")
  find = world.find
  looks = itertools.count()

  def arrives(cloud, assumed):
    if next(looks) == 30:
      world.state = READY
    return find(cloud, assumed)

  monkeypatch.setattr(slices, "find", arrives)
  assert world.supervise() == 0
  assert world.done == ["run"] and world.now > 30 * 7


def test_quota_may_be_short_after_a_preemption(monkeypatch):
  short = exits.Failure(Exit.QUOTA, "exhausted")
  world = World(monkeypatch, [[TAKEN]], MAX_RESTARTS="3")
  world.refusals = [short] * 2
  assert world.supervise() == 0
  assert world.done == ["run", "delete", "create", "run"]
  world = World(monkeypatch, [[TAKEN]], MAX_RESTARTS="3")
  world.refusals = [short] * 9
  assert world.fails() == Exit.RESTARTS_SPENT
  world = World(monkeypatch, [], state=ABSENT)
  world.refusals = [short]
  assert world.fails() == Exit.QUOTA


@pytest.mark.parametrize(
  "kind", [Exit.NOT_ALLOWED, Exit.NOT_OURS, Exit.ABSENT, Exit.GCLOUD]
)
def test_lasting_failures_end_the_supervision(monkeypatch, kind):
  """A slice that someone deleted is not created again."""
  world = World(monkeypatch, [[exits.Failure(kind, "no")]])
  assert world.fails() == kind
  assert world.done == ["run"]


def test_a_new_commit_is_sent_before_a_run_starts(monkeypatch):
  world = World(monkeypatch, [])
  monkeypatch.setattr(workers, "commit", lambda: "another commit")
  world.supervise()
  assert world.done == ["setup", "run"]


def test_restarts_without_a_new_step_are_limited_and_slower_each_time(
  monkeypatch,
):
  world = World(monkeypatch, [life(75, 75, step=4)] * 9, MAX_RESTARTS="3")
  assert world.fails() == Exit.RESTARTS_SPENT
  # The first life reached step 4, the others no new step.
  assert world.done == ["run"] * 4
  assert [p for p in world.pauses if p >= 30] == [30, 60, 120]


def test_a_new_step_resets_the_count_of_restarts(monkeypatch):
  lives = [life(75, 75, step=step) for step in range(20)]
  world = World(monkeypatch, lives, MAX_RESTARTS="1")
  assert world.supervise() == 0
  assert world.done == ["run"] * 21
  assert {p for p in world.pauses if p >= 30} == {30}


def test_pauses_grow_to_a_quarter_of_an_hour(monkeypatch):
  world = World(monkeypatch, [life(75, 75)] * 200, MAX_RESTARTS="199")
  with pytest.raises(exits.Failure):
    world.supervise()
  pauses = [pause for pause in world.pauses if pause >= 30]
  assert pauses[:5] == [30, 60, 120, 240, 480]
  assert pauses[5:] == [900] * 194


@pytest.mark.parametrize(
  "codes, why",
  [
    ([0, 0], 0),
    ([75, 75], 75),
    ([75, 0], 75),
    ([134, 75], 134),
    ([76, 134], 76),
    ([1, 134], 1),
    ([134, 1, 75], 1),
    ([1, 64], 64),
    ([1, 137, 134], 137),
    ([-1, 1], -1),
    ([139, 134], 139),
  ],
)
def test_one_exit_code_explains_the_end_of_all_hosts(codes, why):
  assert supervision.run_exit_code(codes) == why
  assert supervision.run_exit_code(codes[::-1]) == why
