"""Keeping a run going, on one slice after another."""

import dataclasses
import logging
import time
from collections.abc import Sequence

from data_pipelines.validation import ExitCode
from launch.pod import exits, gcloud, slices, workers

Exit = exits.Exit

# The program's own codes; see docs/preemption-and-failures.md.
_ABORTED = 134
_LOST = -1  # Gone without a word.
_KILLED = (_LOST, 137, 143)

_AGAIN = (*_KILLED, ExitCode.STUCK, _ABORTED, ExitCode.PREEMPTED)

# What a new try may find mended.
_PASSING = (
  Exit.NO_CAPACITY,
  Exit.FAILED,
  Exit.SUSPENDED,
  Exit.PREEMPTED,
  Exit.TIMEOUT,
  Exit.WORKER_UNREACHABLE,
  Exit.WORKER_FAILED,
  Exit.NETWORK,
)
_GONE = (
  slices.Condition.FAILED,
  slices.Condition.SUSPENDED,
  slices.Condition.PREEMPTED,
)


def verdict(codes: Sequence[int]) -> int:
  """The code that says why a run ended, of those of its hosts.

  One that was killed drags the others with it, whatever they say; then comes an
  error, which the others report as what it did to them; being preempted is no
  failure, and is said only where nothing else is.

  Args:
    codes: Of each host; -1 for one that is gone without a code.
  """
  order = (
    *_KILLED,
    ExitCode.BAD_INPUT,
    ExitCode.STUCK,
    _ABORTED,
    ExitCode.PREEMPTED,
    ExitCode.DONE,
  )
  others = [code for code in codes if code not in order]
  killed = [code for code in _KILLED if code in codes]
  rest = [code for code in order[len(_KILLED) :] if code in codes]
  # Code 1 and the like stand behind 64, which names the setting.
  named = [code for code in rest if code == ExitCode.BAD_INPUT]
  return [*killed, *named, *others, *rest][0]


@dataclasses.dataclass(frozen=True)
class Patience:
  """How long to wait for what.

  Attributes:
    queue_seconds: For a slice to come.
    poll_seconds: Between two looks.
    pause_seconds: Before a restart; twice as long before each further one that
      had no new step before it, up to a quarter of an hour.
  """

  queue_seconds: float
  poll_seconds: float
  pause_seconds: float

  def pause(self, restarts: int) -> float:
    """Seconds before a restart.

    Args:
      restarts: Which one it is, of those without a new step; the first is 1.
    """
    return min(self.pause_seconds * 2.0 ** (restarts - 1), 900.0)


class Supervisor:
  """Starts a run and watches it, on one slice after another."""

  def __init__(
    self, cloud: gcloud.Gcloud, job: workers.Job, patience: Patience
  ):
    self._cloud = cloud
    self._job = job
    self._patience = patience
    self._step = -1
    self._restarts = 0

  def supervise(self) -> int:
    """Keeps the run going until it is done, or cannot be helped.

    Returns:
      The exit code of the run: 0, or that of a failure which would come again;
      75 if it was ended by `stop`.

    Raises:
      Failure: Of the slice or of gcloud, that will not pass by itself; or there
        were MAX_RESTARTS in a row without a new step.
    """
    most = int(self._cloud.settings.max_restarts)
    while True:
      try:
        code, stopped = self._attempt()
      except exits.Failure as failure:
        if failure.exit not in _PASSING:
          raise
        reason = f"{failure} ({failure.exit.name}, {failure.exit.value})"
      else:
        if stopped or code not in _AGAIN:
          return code
        reason = f"The run ended with exit code {code}."
      if self._restarts >= most:
        raise exits.Failure(
          Exit.RESTARTS_SPENT,
          f"{reason}\nMAX_RESTARTS ({most}) in a row have brought no new step.",
        )
      self._restarts += 1
      pause = self._patience.pause(self._restarts)
      logging.warning(
        "%s\nRestart %d of at most %d without a new step, in %.0f s.",
        *(reason, self._restarts, most, pause),
      )
      time.sleep(pause)

  def _attempt(self) -> tuple[int, bool]:
    """One life of the run: its exit code, and whether `stop` ended it."""
    found = self._slice()
    statuses = workers.status(self._cloud, found.num_workers)
    if not any(status.state == "running" for status in statuses):
      self._start(found.num_workers, statuses)
    while True:
      time.sleep(0 if self._cloud.dry_run else self._patience.poll_seconds)
      # Asked first: it knows of a preemption before ssh does.
      slices.require_ready(self._cloud)
      status = workers.status_of(self._cloud, 0)
      if status.step > self._step:
        self._step, self._restarts = status.step, 0
      if status.state == "running":
        continue
      return self._ended(found.num_workers)

  def _slice(self) -> slices.Slice:
    """A slice that is ready; what is left of one that was taken is deleted."""
    absent = slices.Condition.ABSENT
    found = slices.look(self._cloud, assumed=absent)
    if found.condition in _GONE:
      logging.warning("%s", slices.delete(self._cloud))
    if found.condition in (*_GONE, absent):
      logging.info("%s", slices.create(self._cloud))
    if found.condition == slices.Condition.READY:
      return found
    return slices.wait(
      self._cloud,
      timeout_seconds=self._patience.queue_seconds,
      poll_seconds=self._patience.poll_seconds,
    )

  def _start(
    self, num_workers: int, statuses: Sequence[workers.Status]
  ) -> None:
    of = self._cloud.settings
    wanted = of.image or workers.commit()
    if any(status.commit != wanted for status in statuses):
      logging.info("Setting up %d workers with %s.", num_workers, wanted)
      workers.setup(self._cloud, num_workers)
    workers.run(self._cloud, num_workers, self._job)
    logging.info("The run has started on %d workers.", num_workers)

  def _ended(self, num_workers: int) -> tuple[int, bool]:
    """How the run ended on all workers, once it has on all."""
    while True:
      statuses = workers.status(self._cloud, num_workers)
      if any(status.state == "running" for status in statuses):
        time.sleep(self._patience.poll_seconds)
        continue
      codes = [
        _LOST if status.exit_code is None else status.exit_code
        for status in statuses
      ]
      if self._cloud.dry_run:
        codes = [int(ExitCode.DONE)]
      logging.info("The workers ended with %s.", codes)
      code = verdict(codes)
      if code not in (ExitCode.DONE, ExitCode.BAD_INPUT, *_AGAIN):
        # It may be what the end of a slice looks like from inside.
        time.sleep(self._patience.poll_seconds)
        slices.require_ready(self._cloud)
      return code, any(status.stopped for status in statuses)
