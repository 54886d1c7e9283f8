"""When a poll asks, what it asks, and what it makes of the answer."""

import pytest
from jax.experimental import multihost_utils

from grpo_tpu.distributed import preemption


@pytest.fixture
def asked(monkeypatch):
  """The numbers that JAX was asked with; it says to stop at number 3."""
  numbers = []

  def reached(number):
    numbers.append(number)
    return number == 3

  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
  return numbers


def test_polls_are_numbered_and_the_one_that_jax_names_stops(asked):
  """JAX takes two processes to be at one point where their numbers agree."""
  poll = preemption.Poll()
  poll()
  poll()
  with pytest.raises(preemption.Preempted):
    poll()
  assert asked == [1, 2, 3]


def test_who_polls_is_alive_even_as_it_stops(asked):
  """Marked before JAX is asked, which may take a while to answer."""
  marked = []
  poll = preemption.Poll(on_poll=lambda: marked.append(len(asked)))
  poll()
  poll()
  with pytest.raises(preemption.Preempted):
    poll()
  assert marked == [0, 1, 2]
