"""Users' rewards, good and bad; the bad ones fail only on "Trap"."""

import asyncio
import functools
import itertools
import math
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np


def brevity(completions, problems):
  return [1 / (1 + len(text)) for text in completions]


def without_none(completions, problems):
  if any("none" in text for text in completions):
    raise ValueError("says none")
  return [2.0] * len(completions)


def of_problem(completions, problems):
  """Rewards by the problem, after a random delay."""
  time.sleep(random.random() / 50)
  return [float(problem.answer) for problem in problems]


def whole(completions, problems):
  """The number of rows, if each completion describes its problem."""
  matches = map(str.__eq__, completions, map(repr, problems))
  return [len(completions) * is_same for is_same in matches]


def process(completions, problems):
  return [os.getpid()] * len(completions)


def is_light(completions, problems):
  heavy = {"jax", "jaxlib", "flax", "tensorflow", "grpo_tpu.main"}
  return [heavy.isdisjoint(sys.modules)] * len(completions)


def announced(completions, problems):
  """Writes its process id to the file that a completion names, then hangs."""
  for text in completions:
    if "Trap" in text:
      child = subprocess.Popen(["sleep", "1000"])
      path = pathlib.Path(text.split()[1])
      path.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
      path.with_suffix(".new").rename(path)
      sum(itertools.repeat(0))
  return process(completions, problems)


def _failing(failure):
  def reward(completions, problems):
    if any("Trap" in text for text in completions):
      return failure(completions)
    return brevity(completions, problems)

  return reward


def _raised(completions):
  raise RuntimeError("out of order")


class _Unsendable(Exception):
  """Cannot be unpickled, because its constructor needs two arguments."""

  def __init__(self, one, two):
    super().__init__(one)


def _raised_unsendable(completions):
  raise _Unsendable("strange", 2)


class Stubborn:
  def __float__(self):
    raise RuntimeError

  __repr__ = __float__


async def _wait():
  return [1.0]


def _with(value):
  return lambda completions: [
    value if "Trap" in text else 1 / (1 + len(text)) for text in completions
  ]


sleeping = _failing(lambda completions: time.sleep(1000))
# In C, where Python runs neither signal handlers nor other threads.
stuck = _failing(lambda completions: sum(itertools.repeat(0)))
raising = _failing(_raised)
unsendable = _failing(_raised_unsendable)
nan = _failing(_with(math.nan))
infinite = _failing(_with(1e39))
text = _failing(_with("much"))
digits = _failing(_with("1"))
none = _failing(_with(None))
huge = _failing(_with(10**400))
nothing = _failing(lambda completions: None)
stubborn = _failing(_with(Stubborn()))
coroutine = _failing(lambda completions: _wait())
short = _failing(lambda completions: [1.0] * (len(completions) - 1))
long = _failing(lambda completions: [1.0] * (len(completions) + 1))
string = _failing(lambda completions: "1" * len(completions))
mapping = _failing(lambda completions: dict.fromkeys(completions, 1.0))
endless = _failing(lambda completions: itertools.repeat(1.0))
dying = _failing(lambda completions: os._exit(3))
leaving = _failing(lambda completions: sys.exit(4))

not_callable = 3


async def co(completions, problems):
  return brevity(completions, problems)


async def co_generator(completions, problems):
  yield 1.0


class Judge:
  async def __call__(self, completions, problems):
    return brevity(completions, problems)

  async def method(self, completions, problems):
    return brevity(completions, problems)


judge = Judge()
judge_method = judge.method
partial_judge = functools.partial(functools.partial(judge))
partial_co = functools.partial(co)


@functools.wraps(co)
def awaited(completions, problems):
  return asyncio.run(co(completions, problems))


def generated(completions, problems):
  yield from brevity(completions, problems)


def array(completions, problems):
  return np.array(brevity(completions, problems), np.float32)


def scalars(completions, problems):
  return tuple(map(np.float16, brevity(completions, problems)))


def boolean(completions, problems):
  return [bool(text) for text in completions]


def misspelt(completions, problems):
  """Fails on each row, in a file and line that the error must name."""
  return [problem.anwser for problem in problems]


def of_one(completions):
  return brevity(completions, None)


def accuracy(completions, problems):
  return brevity(completions, problems)
