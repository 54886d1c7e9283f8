"""Keeps a run alive, on one slice after another."""

import dataclasses
import logging
import time
from collections.abc import Sequence

from data_pipelines.validation import ExitCode
from launch.pod import gcloud, slices, workers
from launch.pod.exits import Exit, Failure

State = slices.State

_ABORTED = 134  # SIGABRT: JAX ended the process.
_LOST = -1  # The process vanished without an exit code.
_KILLED = (_LOST, 137, 143)

_RESTART_AFTER = (*_KILLED, ExitCode.STUCK, _ABORTED, ExitCode.PREEMPTED)

# Failures of the launcher that may have passed at the next attempt.
_TRANSIENT = (
  *(Exit.NO_CAPACITY, Exit.FAILED, Exit.SUSPENDED, Exit.PREEMPTED),
  *(Exit.TIMEOUT, Exit.WORKER_UNREACHABLE, Exit.WORKER_FAILED, Exit.NETWORK),
)
_DEAD = (State.FAILED, State.SUSPENDED, State.PREEMPTED)

# The most informative exit code first; None stands for all others (1 and the
# like). A killed host takes the others down, whatever they report. A wrong
# setting explains an error, and an error explains a silent or stuck host.
# Preemption is no failure.
_PRIORITY = (
  *(*_KILLED, ExitCode.BAD_INPUT, None, ExitCode.STUCK, _ABORTED),
  *(ExitCode.PREEMPTED, ExitCode.DONE),
)


def run_exit_code(codes: Sequence[int]) -> int:
  """The code of the host that explains why the run ended."""

  def rank(code: int) -> int:
    return _PRIORITY.index(code if code in _PRIORITY else None)

  return min(codes, key=rank)


@dataclasses.dataclass
class Supervisor:
  """Starts a run and restarts it, on one slice after another."""

  cloud: gcloud.Gcloud
  job: workers.Job
  queue_seconds: float  # The longest wait for a slice.
  poll_seconds: float  # The time between two checks.
  # The pause before the first restart without a new step. It doubles with each
  # further one, up to 15 minutes.
  pause_seconds: float
  _step: int = -1
  _restarts: int = 0

  def supervise(self) -> int:
    """Keeps the run alive until it is done or a restart cannot help.

    Returns:
      The exit code of the run: 0, the code of a failure that a restart would
      repeat, or 75 after `stop`.
    """
    limit = int(self.cloud.settings.max_restarts)
    while True:
      try:
        code, was_stopped = self._attempt()
      except Failure as failure:
        if failure.exit not in _TRANSIENT:
          raise
        reason = f"{failure} (exit code {failure.exit}, {failure.exit.name})"
      else:
        if was_stopped or code not in _RESTART_AFTER:
          return code
        reason = f"The run ended with exit code {code}."
      if self._restarts >= limit:
        raise Failure(
          Exit.RESTARTS_SPENT,
          f"{reason}\nMAX_RESTARTS ({limit}) restarts brought no new step.",
        )
      self._restarts += 1
      pause = min(self.pause_seconds * 2.0 ** (self._restarts - 1), 900.0)
      logging.warning(
        "%s\nRestart %d of at most %d without a new step, in %.0f s.",
        *(reason, self._restarts, limit, pause),
      )
      time.sleep(pause)

  def _attempt(self) -> tuple[int, bool]:
    """Runs until the run ends: its exit code, and if `stop` ended it."""
    num_workers = self._ready_slice().num_workers
    statuses = workers.status(self.cloud, num_workers)
    if not any(status.state == "running" for status in statuses):
      self._start(statuses)
    while True:
      time.sleep(0 if self.cloud.dry_run else self.poll_seconds)
      # The API knows of a preemption before ssh fails.
      slices.require_ready(self.cloud)
      status = workers.worker_status(self.cloud, 0)
      if status.step > self._step:
        self._step, self._restarts = status.step, 0
      if status.state != "running":
        return self._wait_for_end(num_workers)

  def _ready_slice(self) -> slices.Slice:
    """Creates the slice if necessary and waits until it is ready."""
    found = slices.find(self.cloud, assumed=State.ABSENT)
    if found.state in _DEAD:
      slices.delete(self.cloud)
    if found.state in (*_DEAD, State.ABSENT):
      slices.create(self.cloud)
    if found.state == State.READY:
      return found
    return slices.wait(
      self.cloud,
      timeout_seconds=self.queue_seconds,
      poll_seconds=self.poll_seconds,
    )

  def _start(self, statuses: Sequence[workers.Status]) -> None:
    version = self.cloud.settings.image or workers.commit()
    if any(status.commit != version for status in statuses):
      logging.info("Setting up %d workers: %s.", len(statuses), version)
      workers.setup(self.cloud, len(statuses))
    workers.run(self.cloud, len(statuses), self.job)
    logging.info("Started the run on %d workers.", len(statuses))

  def _wait_for_end(self, num_workers: int) -> tuple[int, bool]:
    """Waits for all workers: the exit code, and if `stop` ended the run."""
    while True:
      statuses = workers.status(self.cloud, num_workers)
      if not any(status.state == "running" for status in statuses):
        break
      time.sleep(self.poll_seconds)
    codes = [_LOST if x.exit_code is None else x.exit_code for x in statuses]
    if self.cloud.dry_run:
      codes = [ExitCode.DONE]
    logging.info("Exit codes of the workers: %s.", [*map(int, codes)])
    code = run_exit_code(codes)
    if code not in (ExitCode.DONE, ExitCode.BAD_INPUT, *_RESTART_AFTER):
      # A vanishing slice also looks like an error to its last hosts.
      time.sleep(self.poll_seconds)
      slices.require_ready(self.cloud)
    return code, any(status.was_stopped for status in statuses)
