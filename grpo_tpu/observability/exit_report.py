"""How the program ends: with which exit code, and with which last words.

Whatever ends the program, one line says why, at which step, where the newest
checkpoint is, and what to do next; `run.json` in the workdir says the same to a
program, and where the time went.
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

_NEXT = {
  ExitCode.BAD_INPUT: "change what the error names, and start again",
  ExitCode.PREEMPTED: "start the same command again: the run goes on",
  ExitCode.STUCK: "read the stacks, then start the same command again",
  ExitCode.FAILED: "read the error above, and docs/troubleshooting.md; the same"
  " command goes on from the newest checkpoint",
}


def code_of(error: BaseException | None) -> ExitCode:
  """The exit code of a program that an error has ended, or none has."""
  if error is None:
    return ExitCode.DONE
  if isinstance(error, SettingError):
    return ExitCode.BAD_INPUT
  return (
    ExitCode.PREEMPTED
    if isinstance(error, preemption.Preempted)
    else ExitCode.FAILED
  )


class ExitReport:
  """Where the program stands, for the day it ends.

  Attributes:
    clock: What the time goes into.
    step: The last that was done; None before the first and without training.
    skipped_updates: By this process.
    has_run_record: True once `run.json` in the workdir lists this attempt.
  """

  def __init__(self) -> None:
    """Of a program that has yet to begin a run."""
    self.clock = goodput.Clock()
    self.step: int | None = None
    self.skipped_updates = 0
    self.has_run_record = False
    self._workdir: pathlib.Path | None = None

  def attach_run(self, workdir: pathlib.Path) -> None:
    """From here on it is the end of a run in this folder."""
    self.clock.listen_to_compiler()
    self._workdir = workdir

  def report_stuck(self, reason: str) -> None:
    """Says the last words of a process that the watchdog ends."""
    self._say(reason, ExitCode.STUCK, _NEXT[ExitCode.STUCK])

  def report_done(self) -> None:
    """Says the last words of a program that came to its end."""
    what_next = "nothing"
    if self._workdir is not None:
      folder = shlex.quote(str(self._workdir))
      what_next = f"look at the curves: tensorboard --logdir={folder}"
    self._say("done", ExitCode.DONE, what_next)

  def exit_with(self, error: BaseException) -> NoReturn:
    """Logs what went wrong, says the last words, ends this process at once."""
    code = code_of(error)
    if code == ExitCode.FAILED and not isinstance(error, KeyboardInterrupt):
      logging.error("The run failed.", exc_info=error)
    if code == ExitCode.BAD_INPUT:
      logging.error("%s", error)
    is_interrupt = isinstance(error, KeyboardInterrupt)
    what_next = _NEXT[ExitCode.PREEMPTED if is_interrupt else code]
    self._say(_reason(error), code, what_next)
    pool.close_all()
    initialize.shutdown(code)

  @contextlib.contextmanager
  def abort_peers_on_error(self) -> Iterator[None]:
    """Inside, an error that the other processes need not have had ends this.

    What stands around may wait for them, as the end of a save does, while they
    wait for this one.
    """
    try:
      yield
    except preemption.Preempted:
      raise
    except BaseException as error:
      if jax.process_count() == 1:
        raise
      self.exit_with(error)

  def _say(self, reason: str, code: ExitCode, what_next: str) -> None:
    newest = best = None
    spent = ""
    if self._workdir is not None:
      newest = reader.newest_path(self._workdir / "checkpoints")
      best = reader.best_path(self._workdir / "checkpoints")
      spent = f" The time went into {goodput.summary(self.clock.shares())}."
    logging.log(
      logging.INFO if code == ExitCode.DONE else logging.WARNING,
      "The end, with exit code %d: %s. Last step: %s. Newest checkpoint: %s."
      " Next: %s.%s",
      code,
      reason,
      "none" if self.step is None else self.step,
      newest or "none",
      what_next,
      spent,
    )
    if self._workdir is None or not self.has_run_record or jax.process_index():
      return
    words = {
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
      run_record.close(self._workdir, words)
    except (OSError, ValueError) as failure:
      logging.warning("run.json does not say how the run ended: %s", failure)


def _reason(error: BaseException) -> str:
  if isinstance(error, preemption.Preempted):
    return "preempted, and saved"
  if isinstance(error, SettingError):
    return "refused, for the reason above"
  if isinstance(error, KeyboardInterrupt):
    return "interrupted from the keyboard"
  lines = str(error).splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"
