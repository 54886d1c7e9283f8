"""Keeps a run alive, on one slice after another."""

import dataclasses
import logging
import time
from collections.abc import Sequence

from data_pipelines.validation import ExitCode
from launch.pod import gcloud, lease, slices, workers
from launch.pod.exits import Exit, Failure

State = slices.State

_LOST = -1  # The process vanished without an exit code.
# The most informative exit code first; None stands for all others (1 and the
# like). A killed host takes the others down, whatever they report. A wrong
# setting explains an error, and an error explains a silent or stuck host, as
# with SIGABRT (134). Preemption is no failure.
_PRIORITY = (
  *(_LOST, 137, 143, ExitCode.BAD_INPUT, None, ExitCode.STUCK, 134),
  *(ExitCode.PREEMPTED, ExitCode.DONE),
)

# Time ends these failures. They are no failed starts.
_WAITING = {Exit.NO_CAPACITY, Exit.TIMEOUT, Exit.NETWORK, Exit.UNAVAILABLE}
# Another start may succeed after these: after QUOTA, once there was a slice.
_FAILED_STARTS = {
  *(Exit.QUOTA, Exit.FAILED, Exit.SUSPENDED, Exit.PREEMPTED),
  *(Exit.WORKER_UNREACHABLE, Exit.WORKER_FAILED),
}
_LONG_WAIT_SECONDS = 600.0
_DEAD = (State.FAILED, State.SUSPENDED, State.PREEMPTED)


def run_exit_code(codes: Sequence[int]) -> int:
  """The code of the host that explains why the run ended."""
  ranks = {code: rank for rank, code in enumerate(_PRIORITY)}
  return min(codes, key=lambda code: ranks.get(code, ranks[None]))


@dataclasses.dataclass
class Supervisor:
  """Starts a run and restarts it, on one slice after another."""

  cloud: gcloud.Gcloud
  job: workers.Job
  queue_seconds: float  # The longest wait for a slice.
  poll_seconds: float  # The time between two checks.
  # The first pause before a restart without a new step, and between failures
  # that only time ends. It doubles each time, up to 15 minutes.
  pause_seconds: float
  held: lease.Lease | None = None  # None without a bucket.
  _step: int = -1
  _restarts: int = 0  # Starts without a new step.
  _waits: int = 0  # Failures that only time ends, since the last ready slice.
  _errors: int = 0  # Runs that ended with an error before a new step.
  _made_step: bool = False  # This attempt made a new step.
  _has_slice: bool = False  # This attempt has a ready slice.
  _had_slice: bool = False  # An attempt had one.

  def supervise(self) -> int:
    """Keeps the run alive while a restart may help; returns its exit code."""
    try:
      return self._supervise()
    except lease.Stopped:
      logging.info("`stop` ends the supervision.")
    found = slices.find(self.cloud, assumed=State.READY)
    if found.state == State.READY:
      statuses = workers.status(self.cloud, found.num_workers)
      if any(x.state == "running" and not x.was_stopped for x in statuses):
        workers.stop(self.cloud, found.num_workers, kill=False)
    return ExitCode.PREEMPTED

  def _supervise(self) -> int:
    limit = int(self.cloud.settings.max_restarts)
    while True:
      is_failed_start, start = True, time.monotonic()
      try:
        code, was_stopped = self._attempt()
        if was_stopped or not self._may_repeat(code):
          return code
        reason = f"The run ended with exit code {code}."
      except Failure as failure:
        code = failure.exit
        if code == Exit.FAILED:
          # The reason of a request that failed is an error of the API, too.
          code = gcloud.classify_error(str(failure))
          code = Exit.FAILED if code == Exit.GCLOUD else code
        is_known = code in _WAITING | _FAILED_STARTS
        if not is_known or (code == Exit.QUOTA and not self._had_slice):
          raise Failure(code, str(failure)) from failure
        reason = f"{failure} (exit code {code}, {code.name})"
        # A request that fails after a long wait was not served in time.
        is_quick = time.monotonic() - start < _LONG_WAIT_SECONDS
        is_refused = is_quick and code in (Exit.QUOTA, Exit.FAILED)
        is_failed_start = code in _FAILED_STARTS
        is_failed_start &= self._has_slice or is_refused
      if is_failed_start and self._restarts >= limit:
        reason += f"\nMAX_RESTARTS ({limit}) restarts brought no new step."
        raise Failure(Exit.RESTARTS_SPENT, reason)
      self._restarts += is_failed_start
      self._waits += not is_failed_start
      doublings = (self._restarts if is_failed_start else self._waits) - 1
      pause = min(self.pause_seconds * 2.0 ** min(doublings, 20), 900.0)
      logging.warning(
        "%s\nThe next attempt is in %.0f s, after %d of at most %d failed"
        " starts without a new step.",
        *(reason, pause, self._restarts, limit),
      )
      self._sleep(pause)

  def _may_repeat(self, code: int) -> bool:
    """True if another start may do better than a run with this exit code."""
    if code in _PRIORITY:
      return code not in (ExitCode.DONE, ExitCode.BAD_INPUT)
    # A machine may fail at the start, as when its TPU is still held.
    self._errors += 1
    return self._errors == 1 and not self._made_step

  def _attempt(self) -> tuple[int, bool]:
    """Runs until the run ends: its exit code, and if `stop` ended it."""
    self._has_slice = self._made_step = False
    if self.held:
      self.held.renew()
    num_workers = self._ready_slice().num_workers
    self._has_slice = self._had_slice = True
    self._waits = 0
    statuses = workers.status(self.cloud, num_workers)
    if not any(status.state == "running" for status in statuses):
      version = self.cloud.settings.image or workers.commit()
      if any(status.commit != version for status in statuses):
        logging.info("Setting up %d workers: %s.", num_workers, version)
        workers.setup(self.cloud, num_workers)
      workers.run(self.cloud, num_workers, self.job)
      logging.info("Started the run on %d workers.", num_workers)
    while True:
      self._sleep(0 if self.cloud.dry_run else self.poll_seconds)
      # The API knows of a preemption before ssh fails.
      found = slices.require_ready(self.cloud)
      if self.held:
        self.held.record.note(self.cloud.zone, found.create_time)
      status = workers.worker_status(self.cloud, 0)
      if status.step > self._step:
        if self._step >= 0:  # An earlier supervisor may have seen the first.
          self._made_step = True
          self._restarts = self._errors = 0
        self._step = status.step
      if status.state != "running":
        return self._wait_for_end(num_workers)

  def _sleep(self, seconds: float) -> None:
    (self.held.sleep if self.held else time.sleep)(seconds)

  def _ready_slice(self) -> slices.Slice:
    """Creates the slice if necessary and waits until it is ready."""
    found = slices.find(self.cloud, assumed=State.ABSENT)
    if found.state in _DEAD:
      self._had_slice = True
      slices.delete(self.cloud)
    if found.state in (State.ABSENT, *_DEAD):
      slices.create(self.cloud)
    try:
      limits = (self.queue_seconds, self.poll_seconds)
      return slices.wait(self.cloud, *limits, self._sleep)
    except Failure as failure:
      if failure.exit == Exit.TIMEOUT and len(self.cloud.settings.zones) > 1:
        slices.delete(self.cloud)  # Another zone may be quicker.
      raise

  def _wait_for_end(self, num_workers: int) -> tuple[int, bool]:
    """Waits for all workers: the exit code, and if `stop` ended the run."""
    while True:
      statuses = workers.status(self.cloud, num_workers)
      if not any(status.state == "running" for status in statuses):
        break
      self._sleep(self.poll_seconds)
    codes = [_LOST if x.exit_code is None else x.exit_code for x in statuses]
    if self.cloud.dry_run:
      codes = [ExitCode.DONE]
    logging.info("Exit codes of the workers: %s.", [*map(int, codes)])
    code = run_exit_code(codes)
    if code not in _PRIORITY:
      # A vanishing slice also looks like an error to its last hosts.
      self._sleep(self.poll_seconds)
      slices.require_ready(self.cloud)
    return code, any(status.was_stopped for status in statuses)
