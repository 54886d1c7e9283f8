"""Users' rewards, good and bad; the bad ones fail only on "Trap"."""

import itertools
import math
import os
import pathlib
import random
import subprocess
import sys
import time


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
nothing = _failing(lambda completions: None)
short = _failing(lambda completions: [1.0] * (len(completions) - 1))
long = _failing(lambda completions: [1.0] * (len(completions) + 1))
dying = _failing(lambda completions: os._exit(3))
leaving = _failing(lambda completions: sys.exit(4))

not_callable = 3


def of_one(completions):
  return brevity(completions, None)


def accuracy(completions, problems):
  return brevity(completions, problems)
