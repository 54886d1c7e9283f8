"""A profile of a few steps, for TensorBoard's profile plugin.

A setting asks for it, so a slow run can be examined by a restart: the run resumes
from its checkpoint and its results do not change.

References:
  https://docs.jax.dev/en/latest/profiling.html
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Self

import jax
from absl import logging


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """The steps to trace.

  Attributes:
    steps: The first and the last step, as in (10, 12); () for none. A trace
      holds every Python call and every device operation, so a few steps make a
      large file. The first steps of a run compile.
  """

  steps: tuple[int, ...]

  def __post_init__(self):
    if self.steps and not (
      len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]
    ):
      raise ValueError(
        f"profile.steps ({self.steps!r}) must be a first step and a last one, "
        "counted from 1, or empty for none; set profile.steps=(10, 12)."
      )


class Profiler:
  """Traces one range of steps; use as a context manager.

  An error of the trace is logged and never stops the run.
  """

  def __init__(self, folder: str | os.PathLike[str], config: ProfileConfig):
    """Prepares the trace.

    Args:
      folder: The workdir. The trace goes to `plugins/profile/steps-FIRST-LAST/`
        below it, one file per host.
      config: The steps to trace.
    """
    self._folder = folder
    self._first, self._last = config.steps or (0, 0)
    self._is_tracing = False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Marks the body as this step, and traces it if the step is in the range.

    A run that resumes inside the range traces the rest of it.
    """
    is_wanted = self._first <= step <= self._last
    if is_wanted and not self._is_tracing:
      self._start()
    with jax.profiler.StepTraceAnnotation("step", step_num=step):
      yield
    if step == self._last:
      self._stop()

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    # Every host uses the same name.
    options.session_id = f"steps-{self._first}-{self._last}"
    try:
      jax.profiler.start_trace(self._folder, profiler_options=options)
    except Exception:
      logging.warning("The trace could not be started.", exc_info=True)
      self._last = 0
    else:
      self._is_tracing = True

  def _stop(self) -> None:
    if not self._is_tracing:
      return
    self._is_tracing = False
    try:
      jax.profiler.stop_trace()
    except Exception:
      logging.warning("The trace could not be written.", exc_info=True)
    else:
      logging.info(
        "Trace of steps %d to %d: %s",
        *(self._first, self._last),
        os.path.join(self._folder, "plugins", "profile"),
      )
