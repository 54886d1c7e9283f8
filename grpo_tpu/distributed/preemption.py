"""The notice that this machine will be taken away, heard by all hosts at once.

SIGTERM to any process of a run is the notice. JAX hears it, tells the other
processes, and picks the point, the same for all, at which every one of them
stops: their next common poll. Setting a Python handler for SIGTERM would turn
that off.

References:
  `jax.experimental.multihost_utils.reached_preemption_sync_point`
"""

from collections.abc import Callable

from jax.experimental import multihost_utils


class Preempted(Exception):
  """This process, and every other one of the run, is to save and to end."""


class Poll:
  """Asks whether to stop; all processes must ask equally often.

  JAX compares how often each has asked, so nobody else may ask it in between:
  `checkpoint` keeps Orbax from asking with the numbers of its steps.
  """

  def __init__(self, on_poll: Callable[[], None] = lambda: None):
    """Makes the first poll the next one.

    Args:
      on_poll: Called at each poll: whoever polls is alive.
    """
    self._tick = 0
    self._on_poll = on_poll

  def __call__(self) -> None:
    """Returns, or raises `Preempted` at the same poll of every process."""
    self._tick += 1
    self._on_poll()
    if multihost_utils.reached_preemption_sync_point(self._tick):
      raise Preempted("this machine will be taken away")
