"""How the program ended: the exit code, the last log lines and `run.json`.

They say why and at which step it ended, where the newest checkpoint is, what to
do next and where the time went.
"""

import contextlib
import shlex
from collections.abc import Iterator
from typing import NoReturn

import jax
from absl import logging
from etils import epath

from data_pipelines.validation import (
  ExitCode,
  SettingError,
  is_machine_failure,
)
from data_pipelines.workers import pool
from grpo_tpu.checkpoint import reader
from grpo_tpu.distributed import initialize, interrupt, preemption
from grpo_tpu.observability import goodput, mirror, run_record

# TensorBoard would open on its first metrics, by name.
_CURVES = "http://localhost:6006/#custom_scalars"
_RESUME = "run the same command again to resume"


class ExitReport:
  """The progress of the program, and its report at the end.

  Nothing that goes wrong in the report changes the exit code.
  """

  def __init__(self) -> None:
    self.clock = goodput.Clock()
    self.step: int | None = None  # The last step that was done.
    self.skipped_updates = 0  # By this process.
    self.has_run_record = False  # True once `run.json` lists this attempt.
    self.reason = "done"  # Why a run that is done has ended.
    self.what_next = ""  # Advice on the mode's result, such as "open FILE".
    self._workdir: epath.Path | None = None
    self._files: mirror.Mirror | None = None

  def attach_run(self, workdir: epath.Path, files: mirror.Mirror) -> None:
    """Makes this the report of the run that writes these files."""
    self.clock.listen_to_compiler()
    self._workdir, self._files = workdir, files

  def report_stuck(self, reason: str) -> None:
    """Reports that the watchdog ends the process."""
    if self._files is not None:  # The stacks will be in the workdir.
      reason = reason.replace(str(self._files.folder), str(self._workdir))
    self._report(ExitCode.STUCK, reason, f"read the stacks, then {_RESUME}")

  def report_done(self) -> None:
    """Reports that the program has done its work."""
    what_next = self.what_next
    if self._workdir is not None and not what_next:
      folder = shlex.quote(str(self._workdir))
      what_next = f"tensorboard --logdir={folder}  # {_CURVES}"
    self._report(ExitCode.DONE, self.reason, what_next)

  def exit_with(self, error: BaseException) -> NoReturn:
    """Logs the error, reports it and ends this process at once."""
    code, reason, what_next = _describe(error)
    try:
      with _logged_errors("The error could not be shown"):
        if code == ExitCode.BAD_INPUT:
          logging.error("%s", error)
        elif code == ExitCode.FAILED:
          logging.error("The run failed.", exc_info=error)
      self._report(code, reason, what_next)
      with _logged_errors("The workers could not be ended"):
        pool.close_all()
    finally:
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
    newest = best = None
    if self._workdir is not None:
      folder = self._workdir / "checkpoints"
      with _logged_errors(f"{folder} could not be listed"):
        newest, best = reader.newest_path(folder), reader.best_path(folder)
    with _logged_errors("The end could not be shown"):
      self._log_end(code, reason, what_next, f"{newest or 'none'}")
    with _logged_errors("run.json does not say how the run ended"):
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
      workdir = self._workdir if self.has_run_record else None
      if workdir is not None and jax.process_index() == 0:
        run_record.close(workdir, facts)
    if self._files is not None:
      self._files.close()

  def _log_end(
    self, code: ExitCode, reason: str, what_next: str, newest: str
  ) -> None:
    if code == ExitCode.BAD_INPUT:  # The error above has said the rest.
      logging.warning("Next: %s (exit code %d).", what_next, code)
      return
    step = "" if self.step is None else f" at step {self.step}"
    if code == ExitCode.DONE:
      level, lines = logging.INFO, [f"Finished{step} (exit code 0)."]
    else:
      level = logging.WARNING
      lines = [f"Stopped{step} (exit code {code:d}): {reason}."]
    if self._workdir is not None:
      lines.append(f"Checkpoint: {newest}")
    if what_next:
      is_view = code == ExitCode.DONE and not self.what_next
      lines.append(f"{'View' if is_view else 'Next'}: {what_next}")
    if self._workdir is not None:
      lines.append(f"Time: {goodput.summary(self.clock.shares())}")
    for line in lines:
      logging.log(level, "%s", line)


@contextlib.contextmanager
def _logged_errors(message: str) -> Iterator[None]:
  """Logs an error of the body, which must not change the exit code."""
  try:
    yield
  except Exception as error:
    logging.warning("%s: %s: %s", message, type(error).__name__, error)


def _describe(error: BaseException) -> tuple[ExitCode, str, str]:
  """The exit code, the reason of the end in words, and what to do next."""
  if isinstance(error, SettingError) and not is_machine_failure(error):
    reason = "invalid setting, flag or data, see above"
    what_next = "fix what the error names and run the command again"
    return ExitCode.BAD_INPUT, reason, what_next
  if isinstance(error, preemption.Preempted):
    cause = "interrupted" if interrupt.is_pressed() else "preempted"
    return ExitCode.PREEMPTED, f"{cause}, everything is saved", _RESUME
  reason = type(error).__name__
  with contextlib.suppress(Exception):
    reason += f": {(str(error).splitlines() or [''])[0]}"
  what_next = f"read the error and docs/troubleshooting.md, then {_RESUME}"
  return ExitCode.FAILED, reason, what_next
