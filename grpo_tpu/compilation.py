"""How many programs were compiled, and how long that took."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Counter:
  """Counts this process's compilations from its making on."""

  def __init__(self):
    self._count, self._seconds = 0, 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _EVENT:
      self._count += 1
      self._seconds += duration_secs

  def scalars(self) -> dict[str, float]:
    """By the names of `metrics`, since the last call."""
    scalars = {
      "perf/compilations": self._count,
      "perf/compile_seconds": self._seconds,
    }
    self._count, self._seconds = 0, 0.0
    return scalars
