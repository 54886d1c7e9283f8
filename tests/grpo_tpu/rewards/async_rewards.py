"""Users' rewards that are awaited or have a set-up; bad ones fail on "Trap"."""

import asyncio
import itertools
import json
import os
import random
import sys
import time

from tests.grpo_tpu.rewards.user_rewards import brevity

_in_flight, _most = 0, 0
_barriers = {}  # By their size; the calls of a process have one event loop.
_tries = {}


async def _meet(number):
  """Ends when as many calls have met."""
  barrier = _barriers.setdefault(number, asyncio.Barrier(number))
  await barrier.wait()


async def of_problem(completion, problem):
  await asyncio.sleep(random.random() / 20)
  return float(problem.answer)


async def six_at_once(completion, problem):
  """Ends when six calls have met; the most that were in flight so far."""
  global _in_flight, _most
  _in_flight += 1
  _most = max(_most, _in_flight)
  await _meet(6)
  await asyncio.sleep(0.1)
  _in_flight -= 1
  return _most


async def rubric(completion, problem):
  """1 if the completion is the JSON of a column of the user's own."""
  return json.loads(completion) == problem.metadata["rubric"]


async def by_32(completion, problem):
  """Ends when 32 calls have met."""
  await _meet(32)
  return 1.0


async def flaky(completion, problem):
  """Fails at the first two tries of every tenth problem."""
  _tries[problem.pid] = _tries.get(problem.pid, 0) + 1
  if int(problem.answer) % 10 == 3 and _tries[problem.pid] < 3:
    raise ConnectionError("503 Service Unavailable")
  return float(problem.answer)


async def process(completion, problem):
  await asyncio.sleep(0.01)
  return os.getpid()


def _failing(fail):
  async def reward(completion, problem):
    await asyncio.sleep(0.01)
    if "Trap" in completion:
      return await fail()
    await asyncio.sleep(0.05)
    return brevity([completion], None)[0]

  return reward


def _raising(make):
  async def fail():
    raise make()

  return _failing(fail)


def _doing(action):
  async def fail():
    return action()

  return _failing(fail)


async def _wait_long():
  await asyncio.sleep(1000)


async def _ignore_cancellation():
  while True:
    try:
      await asyncio.sleep(1000)
    except asyncio.CancelledError:
      pass


async def _cancel_itself():
  asyncio.current_task().cancel()
  return 1.0


async def _cancel_everything():
  for task in asyncio.all_tasks():
    task.cancel()
  await asyncio.sleep(1)


async def _leak():
  leaked = asyncio.create_task(_wait_long())
  asyncio.get_running_loop().call_later(0.01, leaked.set_name, "leaked")
  raise RuntimeError("left a task")


async def _stop_loop():
  asyncio.get_running_loop().stop()
  await asyncio.sleep(0.1)
  raise RuntimeError("stopped the loop")


class Foreign(BaseException):
  """Not an `Exception`, as those of some libraries."""


hanging = _failing(_wait_long)
stubborn = _failing(_ignore_cancellation)
cancelling = _failing(_cancel_itself)
cancelling_all = _failing(_cancel_everything)
leaking = _failing(_leak)
stopping = _failing(_stop_loop)
blocking = _doing(lambda: time.sleep(1000))
stuck = _doing(lambda: sum(itertools.repeat(0)))
dying = _doing(lambda: os._exit(3))
leaving = _doing(lambda: sys.exit(4))
nan = _doing(lambda: float("nan"))
listed = _doing(lambda: [1.0])
awaitable = _doing(lambda: _wait_long().close())
eating = _doing(lambda: len(bytearray(100 * 2**30)))
cancelled = _raising(asyncio.CancelledError)
interrupting = _raising(KeyboardInterrupt)
foreign = _raising(Foreign)
grouped = _raising(lambda: BaseExceptionGroup("two", [Foreign()]))
timing_out = _raising(TimeoutError)


async def positional(completion, problem, /):
  return 1.0


async def of_lists(completions, problems):
  return brevity(completions, problems)


async def yielding(completion, problem):
  yield 1.0


class Loaded:
  """Counts its calls; `load` must have come first, and once."""

  number = itertools.count(1)

  def __init__(self):
    self.made, self.loads, self.calls = next(self.number), 0, 0

  def load(self):
    self.loads += 1

  def _count(self):
    self.calls += 1
    return self.calls if self.made == self.loads == 1 else -1


class Listed(Loaded):
  def __call__(self, completions, problems):
    return [self._count() for _ in completions]


class Awaited(Loaded):
  async def load(self):
    await asyncio.sleep(0.1)
    self.loop = asyncio.get_running_loop()
    super().load()

  async def __call__(self, completion, problem):
    assert self.loop is asyncio.get_running_loop()
    await asyncio.sleep(0.01)
    return self._count()


class Unloadable:
  def load(self):
    raise FileNotFoundError("no weights here")

  def __call__(self, completions, problems):
    return brevity(completions, problems)


class AwaitedUnloadable:
  async def load(self):
    raise FileNotFoundError("no weights here")

  async def __call__(self, completion, problem):
    return 1.0


class Named:
  def __init__(self, name):
    self.name = name

  __call__ = Unloadable.__call__


class Uncalled:
  pass


class LoadedFrom(Unloadable):
  def load(self, path):
    pass
