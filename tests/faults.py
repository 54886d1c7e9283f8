"""The program, with a fault that strikes one host at one point of one step.

    FAULT=kill@3:1:update python tests/faults.py -m grpo_tpu.main --config=...

`FAULT` is KIND@STEP:HOST[:POINT[+SECONDS]]. KINDs: "kill" and "stop" send this
process SIGKILL and SIGSTOP, "term" sends SIGTERM and waits until all hosts know
of it, so that the next common poll is the one at which they stop, "raise"
raises, "hang" turns in a circle, "slow" sleeps for two seconds, "nan" pays its
completions of the step so much that their gradient is not finite. POINTs:
"rollout" (the default) and "update" as they begin, "decode" between two polls
of a rollout, "save" as soon as a save has been handed over; a signal may come
so many SECONDS after. Nothing in the program knows of it: this wraps what it
wants to disturb, and where `FAULT` is not set, wraps nothing.

It takes the place of an interpreter: `GRPO_TPU_PYTHON=tests/faults.sh`, which
runs `PYTHON` on it.
"""

import dataclasses
import functools
import inspect
import os
import pathlib
import re
import runpy
import signal
import sys
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_FORM = re.compile(
  r"(kill|stop|term|raise|hang|nan|slow)@(\d+):(\d+)(?::(rollout|decode|update|save)"
  r"(?:\+(\d+(?:\.\d+)?))?)?"
)


@dataclasses.dataclass(frozen=True)
class Fault:
  """What is to happen, where, when and to whom."""

  kind: str
  step: int
  host: int
  point: str = "rollout"
  seconds: float = 0.0

  @classmethod
  def of(cls, text: str) -> "Fault":
    match = _FORM.fullmatch(text)
    assert match, f"FAULT ({text!r}) must be KIND@STEP:HOST[:POINT[+SECONDS]]"
    kind, step, host, point, seconds = match.groups()
    return cls(
      kind, int(step), int(host), point or cls.point, float(seconds or 0)
    )

  def __str__(self) -> str:
    place = f"{self.kind}@{self.step}:{self.host}:{self.point}"
    return f"{place}+{self.seconds:g}" if self.seconds else place

  def strike(self) -> None:
    print(f"FAULT {self} strikes", file=sys.stderr, flush=True)
    if self.kind == "slow":
      time.sleep(2)
      return
    if self.kind == "term":
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(4)
      return
    if self.kind == "raise":
      raise RuntimeError(f"injected: {self}")
    while self.kind == "hang":
      pass
    if self.seconds:
      strike = functools.partial(os.kill, os.getpid(), SIGNALS[self.kind])
      timer = threading.Timer(self.seconds, strike)
      timer.daemon = True
      timer.start()
    else:
      os.kill(os.getpid(), SIGNALS[self.kind])


def install(fault: Fault) -> None:
  """Wraps the point of the program where the fault is to strike."""
  if int(os.environ.get("JAX_PROCESS_ID", "0")) != fault.host:
    return
  from grpo_tpu.checkpoint import checkpointer
  from grpo_tpu.distributed import preemption
  from grpo_tpu.rl import experience
  from grpo_tpu.train.trainer import Trainer

  if fault.kind == "nan":
    _poison(experience.Collector, Trainer, fault.step)
    return
  if fault.point == "decode":
    _strike_between_polls(preemption, Trainer, fault)
    return
  owner, name = {
    "rollout": (Trainer, "_collect"),
    "update": (Trainer, "_update_once"),
    "save": (checkpointer.Checkpoints, "save"),
  }[fault.point]
  inner = getattr(owner, name)

  @functools.wraps(inner)
  def wrapped(*args, **kwargs):
    strikes = _step(inner, args, kwargs) == fault.step
    if strikes and fault.point != "save":
      fault.strike()
    result = inner(*args, **kwargs)
    if strikes and fault.point == "save":
      fault.strike()
    return result

  setattr(owner, name, wrapped)


def _strike_between_polls(preemption: Any, trainer: Any, fault: Fault) -> None:
  """Strikes after the poll that comes before the first tokens are decoded."""
  sample, poll = trainer._collect, preemption.Poll.__call__
  polls = []

  @functools.wraps(sample)
  def sampled(*args, **kwargs):
    is_due = _step(sample, args, kwargs) == fault.step
    polls[:] = [0] if is_due else []
    return sample(*args, **kwargs)

  @functools.wraps(poll)
  def polled(self):
    poll(self)
    if polls:
      polls[0] += 1
      # The first comes before the prompts are read.
      if polls[0] == 2:
        fault.strike()

  trainer._collect, preemption.Poll.__call__ = sampled, polled


def _poison(collector: Any, trainer: Any, step: int) -> None:
  """Pays this host's completions of a step so much that no float holds the sum.

  A reward that is NaN would stay out of the statistics.
  """
  sample, group_rewards = trainer._collect, collector.group_rewards
  now = {"step": 0}

  @functools.wraps(sample)
  def sampled(*args, **kwargs):
    now["step"] = _step(sample, args, kwargs)
    return sample(*args, **kwargs)

  @functools.wraps(group_rewards)
  def poisoned(*args, **kwargs):
    rewards, valid = group_rewards(*args, **kwargs)
    if now["step"] == step:
      print(f"FAULT nan@{step} strikes", file=sys.stderr, flush=True)
      total = rewards["total"]
      rewards["total"] = total * 0 + 3e38
      rewards["total"][:, 0] = 2e38
    return rewards, valid

  trainer._collect, collector.group_rewards = sampled, poisoned


def _step(inner: Any, args: tuple, kwargs: dict) -> int:
  return inspect.signature(inner).bind(*args, **kwargs).arguments["step"]


if __name__ == "__main__":
  sys.path[0] = str(ROOT)
  flag, module, *arguments = sys.argv[1:]
  assert flag == "-m", "takes the place of an interpreter: -m MODULE ..."
  sys.argv = [module, *arguments]
  if os.environ.get("FAULT") and module == "grpo_tpu.main":
    install(Fault.of(os.environ["FAULT"]))
  runpy.run_module(module, run_name="__main__", alter_sys=True)
