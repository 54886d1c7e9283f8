"""A profile of a few steps, for TensorBoard's profile plugin.

A setting asks for it, so a restart can examine a slow run.
"""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from absl import logging

from grpo_tpu.observability import mirror


class Profiler(contextlib.AbstractContextManager["Profiler"]):
  """Traces a range of steps, in a context; its errors never stop the run."""

  def __init__(self, files: mirror.Mirror, steps: Sequence[int]):
    """Prepares a trace of the first to the last step; empty `steps` for none.

    It goes to `plugins/profile/steps-FIRST-LAST/` of the workdir.
    """
    self._files, self._folder = files, files.folder
    if files.is_remote:  # Which copies no trace that is half written.
      self._folder = files.folder / ".trace"
    self._first, self._last = steps or (0, 0)
    self._is_tracing = False

  def __exit__(self, *_: object) -> None:
    self._stop()

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Marks the body as this step, and traces it if it is in the range."""
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
      self._is_tracing = True
    except Exception:
      logging.warning("The trace could not be started.", exc_info=True)
      self._last = 0

  def _stop(self) -> None:
    if not self._is_tracing:
      return
    self._is_tracing = False
    try:
      jax.profiler.stop_trace()
      if self._files.is_remote:
        (self._folder / "plugins").rename(self._files.folder / "plugins")
      text = "Trace of steps %d to %d: %s/plugins/profile"
      logging.info(text, self._first, self._last, self._files.workdir)
    except Exception:
      logging.warning("The trace could not be written.", exc_info=True)
