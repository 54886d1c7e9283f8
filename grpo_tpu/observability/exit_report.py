"""How the program ended: the exit code, the last log lines and `run.json`.

The last lines of the log say why the program ended and at which step, where the
newest checkpoint is, what to do next and where the time went. `run.json` in the
workdir holds the same facts for programs.
"""

import contextlib
import pathlib
import shlex
from collections.abc import Iterator
from typing import NoReturn

import jax
from absl import logging

from data_pipelines.validation import ExitCode, SettingError
from data_pipelines.workers import pool
from grpo_tpu.checkpoint import reader
from grpo_tpu.distributed import initialize, preemption
from grpo_tpu.observability import goodput, run_record

_RESUME = "run the same command again to resume"


class ExitReport:
  """The progress of the program, and its report at the end."""

  def __init__(self) -> None:
    self.clock = goodput.Clock()
    self.step: int | None = None  # The last step that was done.
    self.skipped_updates = 0  # By this process.
    self.has_run_record = False  # True once `run.json` lists this attempt.
    self._workdir: pathlib.Path | None = None

  def attach_run(self, workdir: pathlib.Path) -> None:
    """Makes this the report of the run in `workdir`."""
    self.clock.listen_to_compiler()
    self._workdir = workdir

  def report_stuck(self, reason: str) -> None:
    """Reports that the watchdog ends the process."""
    self._report(ExitCode.STUCK, reason, f"read the stacks, then {_RESUME}")

  def report_done(self) -> None:
    """Reports that the program has done its work."""
    view = ""
    if self._workdir is not None:
      view = f"tensorboard --logdir={shlex.quote(str(self._workdir))}"
    self._report(ExitCode.DONE, "done", view)

  def exit_with(self, error: BaseException) -> NoReturn:
    """Logs the error, reports it and ends this process at once."""
    code, reason, what_next = _describe(error)
    if code == ExitCode.BAD_INPUT:
      logging.error("%s", error)
    elif code == ExitCode.FAILED and not isinstance(error, KeyboardInterrupt):
      logging.error("The run failed.", exc_info=error)
    self._report(code, reason, what_next)
    pool.close_all()
    initialize.shutdown(code)

  @contextlib.contextmanager
  def abort_peers_on_error(self) -> Iterator[None]:
    """Ends all processes if the body raises an error in this one alone.

    The exit of an outer context, such as the wait for a save, may wait for the
    other processes, while they wait for this one.
    """
    try:
      yield
    except preemption.Preempted:
      raise
    except BaseException as error:
      if jax.process_count() == 1:
        raise
      self.exit_with(error)

  def _report(self, code: ExitCode, reason: str, what_next: str) -> None:
    step = "" if self.step is None else f" at step {self.step}"
    if code == ExitCode.DONE:
      level, label = logging.INFO, "View"
      lines = [f"Finished{step} (exit code 0)."]
    else:
      level, label = logging.WARNING, "Next"
      lines = [f"Stopped{step} (exit code {code:d}): {reason}."]
    newest = best = None
    if self._workdir is not None:
      newest = reader.newest_path(self._workdir / "checkpoints")
      best = reader.best_path(self._workdir / "checkpoints")
      lines.append(f"Checkpoint: {newest or 'none'}")
    if what_next:
      lines.append(f"{label}: {what_next}")
    if self._workdir is not None:
      lines.append(f"Time: {goodput.summary(self.clock.shares())}")
    for line in lines:
      logging.log(level, "%s", line)
    if self._workdir is None or not self.has_run_record or jax.process_index():
      return
    facts = {
      "reason": reason,
      "exit_code": code,
      "step": self.step,
      "newest_checkpoint": newest and str(newest),
      "best_checkpoint": best and str(best),
      "next": what_next,
      "skipped_updates": self.skipped_updates,
      "wall_seconds": self.clock.scalars()["perf/run_seconds"],
      "goodput": self.clock.shares(),
    }
    try:
      run_record.close(self._workdir, facts)
    except (OSError, ValueError) as error:
      logging.warning("run.json does not say how the run ended: %s", error)


def _describe(error: BaseException) -> tuple[ExitCode, str, str]:
  """The exit code for an error, the reason in words, and what to do next."""
  if isinstance(error, SettingError):
    reason = "invalid setting, flag or data, see above"
    what_next = "fix what the error names and run the command again"
    return ExitCode.BAD_INPUT, reason, what_next
  if isinstance(error, preemption.Preempted):
    return ExitCode.PREEMPTED, "preempted, everything is saved", _RESUME
  if isinstance(error, KeyboardInterrupt):
    return ExitCode.FAILED, "interrupted from the keyboard", _RESUME
  first_line = (str(error).splitlines() or [""])[0]
  what_next = f"read the error and docs/troubleshooting.md, then {_RESUME}"
  return ExitCode.FAILED, f"{type(error).__name__}: {first_line}", what_next
