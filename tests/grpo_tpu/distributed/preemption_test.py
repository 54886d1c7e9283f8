"""A poll numbers its calls of JAX and raises when JAX says so."""

import pytest
from jax.experimental import multihost_utils

from grpo_tpu.distributed import preemption


@pytest.fixture
def asked(monkeypatch):
  """The numbers that JAX received; number 3 means preemption."""
  numbers = []

  def reached(number):
    numbers.append(number)
    return number == 3

  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
  return numbers


def test_polls_are_numbered_and_jax_chooses_the_one_that_raises(asked):
  """JAX stops all processes at the poll with the same number."""
  poll = preemption.Poll()
  poll()
  poll()
  with pytest.raises(preemption.Preempted):
    poll()
  assert asked == [1, 2, 3]


def test_each_poll_is_a_sign_of_life(asked):
  """The callback runs before JAX, which may take a while."""
  marked = []
  poll = preemption.Poll(on_poll=lambda: marked.append(len(asked)))
  poll()
  poll()
  with pytest.raises(preemption.Preempted):
    poll()
  assert marked == [0, 1, 2]
