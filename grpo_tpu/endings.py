"""How the program ends: with which exit code, and with which last words.

Whatever ends a run, one line says why, at which step, and where the newest
checkpoint is; `summary.json` in the workdir says the same to a program, and
where the time went.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NoReturn

import jax
from absl import logging

from grpo_tpu import (
  archive,
  distributed,
  goodput,
  preemption,
  watchdog,
)
from grpo_tpu import config as run_config
from grpo_tpu.rewards import scoring

DONE = 0
BAD_REQUEST = 64  # EX_USAGE of sysexits.h.
PREEMPTED = 75  # EX_TEMPFAIL: start it again.
STUCK = watchdog.EXIT_CODE
FAILED = 1


def code_of(error: BaseException | None) -> int:
  """The exit code of a program that an error has ended, or none has."""
  if error is None:
    return DONE
  if isinstance(error, run_config.SettingError):
    return BAD_REQUEST
  return PREEMPTED if isinstance(error, preemption.Preempted) else FAILED


class Ending:
  """Where the program stands, for the day it ends.

  Attributes:
    clock: What the time goes into.
    step: The last that was done; None before the first and without training.
    skipped_updates: By this process.
  """

  def __init__(self) -> None:
    """Of a program that has yet to begin a run."""
    self.clock = goodput.Clock()
    self.step: int | None = None
    self.skipped_updates = 0
    self._workdir: pathlib.Path | None = None

  def of_run(self, workdir: pathlib.Path) -> None:
    """From here on it is the end of a run in this folder."""
    self.clock.listen_to_compiler()
    self._workdir = workdir

  def stuck(self, reason: str) -> None:
    """Says the last words of a process that the watchdog ends."""
    self._say(reason, STUCK)

  def done(self) -> None:
    """Says the last words of a run that came to its end."""
    self._say("done", DONE)

  def end(self, error: BaseException) -> NoReturn:
    """Logs what went wrong, says the last words, ends this process at once."""
    code = code_of(error)
    if code == FAILED and not isinstance(error, KeyboardInterrupt):
      logging.error("The run failed.", exc_info=error)
    if code == BAD_REQUEST:
      logging.error("%s", error)
    if code != BAD_REQUEST or self._workdir is not None:
      self._say(_reason(error), code)
    scoring.close()
    distributed.leave(code)

  @contextlib.contextmanager
  def at_once_if_others_wait(self) -> Iterator[None]:
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
      self.end(error)

  def _say(self, reason: str, code: int) -> None:
    newest = None
    if self._workdir is not None:
      newest = archive.newest_path(self._workdir / "checkpoints")
    shares = self.clock.shares()
    logging.log(
      logging.INFO if code == DONE else logging.WARNING,
      "The end, with exit code %d: %s. Last step: %s. Newest checkpoint: %s."
      " The time went into %s.",
      code,
      reason,
      "none" if self.step is None else self.step,
      newest or "none",
      goodput.summary(shares),
    )
    if self._workdir is None or jax.process_index():
      return
    words = {
      "reason": reason,
      "exit_code": code,
      "step": self.step,
      "newest_checkpoint": newest and str(newest),
      "skipped_updates": self.skipped_updates,
      "wall_seconds": self.clock.scalars()["perf/run_seconds"],
      "goodput": shares,
    }
    try:
      unfinished = self._workdir / ".summary.json.tmp"
      unfinished.write_text(json.dumps(words, indent=2) + "\n")
      os.replace(unfinished, self._workdir / "summary.json")
    except OSError as failure:
      logging.warning("summary.json could not be written: %s", failure)


def _reason(error: BaseException) -> str:
  if isinstance(error, preemption.Preempted):
    return "preempted; start the same command again to go on"
  if isinstance(error, KeyboardInterrupt):
    return "interrupted from the keyboard"
  lines = str(error).splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"
