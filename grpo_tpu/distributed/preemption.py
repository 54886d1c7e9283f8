"""Preemption: all processes stop at the same point after a notice.

SIGTERM to any process of a run is the notice. JAX receives it, tells the other
processes and picks the poll at which all of them stop. A Python handler for
SIGTERM would turn that off. The first Ctrl-C sends this process SIGTERM.

References:
  `jax.experimental.multihost_utils.reached_preemption_sync_point`
"""

from collections.abc import Callable

from jax.experimental import multihost_utils


class Preempted(Exception):
  """All processes of the run must save and exit."""


class Poll:
  """Checks for a preemption; all processes must poll equally often.

  JAX compares the numbers of the polls. Nobody else may call it in between:
  `checkpoint` keeps Orbax from calling it with the numbers of its steps.
  """

  def __init__(self, on_poll: Callable[[], None] = lambda: None):
    """Begins to count polls; each calls `on_poll`, as a sign of life."""
    self._tick, self._on_poll = 0, on_poll

  def __call__(self) -> None:
    """Raises `Preempted` at the same poll of every process, or returns."""
    self._tick += 1
    self._on_poll()
    if multihost_utils.reached_preemption_sync_point(self._tick):
      raise Preempted("this machine will be taken away")
