"""A profile of a few steps, where TensorBoard's profile plugin looks for it.

Asked for by settings, so that a slow run can be looked at by starting it again:
it goes on from its checkpoint, and its numbers stay what they are.

References:
  https://docs.jax.dev/en/latest/profiling.html
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import jax
from absl import logging


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Which steps are traced.

  Attributes:
    steps: The first and the last of them, as in (10, 12); () for none. A trace
      holds every call of Python and every operation of the devices, so few
      steps make a large one. The first steps compile.
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
  """Traces the steps of one stretch; use as a context manager.

  Trouble with a trace is logged, and never stops the run.
  """

  def __init__(self, folder: str | os.PathLike[str], config: ProfileConfig):
    """Traces nothing yet.

    Args:
      folder: Of the run; a trace goes to `plugins/profile/steps-FIRST-LAST/` in
        it, a file for each host.
      config: Which steps.
    """
    self._folder = folder
    self._first, self._last = config.steps or (0, 0)
    self._is_tracing = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """What happens inside is this step, and is traced if it is to be.

    A run that goes on in the middle of the stretch traces what is left of it.
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
    # The same on every host.
    options.session_id = f"steps-{self._first}-{self._last}"
    # Whatever goes wrong with a trace must not end the run that it looks at.
    try:
      jax.profiler.start_trace(self._folder, profiler_options=options)
    except Exception:
      logging.warning("No trace could be started.", exc_info=True)
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
        "The trace of steps %d to %d is in %s.",
        self._first,
        self._last,
        os.path.join(self._folder, "plugins", "profile"),
      )
