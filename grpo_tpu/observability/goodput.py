"""What the wall time of a run goes into, over all its restarts.

At any time the run is in one phase, so the shares add up to 1. A run that was
killed and goes on carries its sums over by way of `metrics.jsonl`: each line
says how long the run has lasted and what it did in that time.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import psutil

# `other` is what is in none of the others; `lost` are steps that a process did
# and a later one did again; `restart` lies between a process's last step and
# the first of the next, its own start of the first process.
PHASES = (
  *("data", "rollout", "reward", "update", "compile", "evaluate"),
  *("checkpoint", "restart", "lost", "other"),
)
# In these the hosts wait for each other; in the rest a slow one is slow alone.
_TOGETHER = ("rollout", "update", "evaluate")
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Clock:
  """Adds up seconds by phase; one phase inside another interrupts it."""

  def __init__(
    self,
    *,
    now: Callable[[], float] = time.monotonic,
    unix_now: Callable[[], float] = time.time,
    age_seconds: float | None = None,
  ):
    """Stands in phase "restart" since the process started.

    Args:
      now: A clock that nobody sets.
      unix_now: One that agrees with that of the process before, in seconds
        since 1970.
      age_seconds: How long ago the process started; None asks the system.
    """
    if age_seconds is None:
      age_seconds = time.time() - psutil.Process().create_time()
    self._now, self._unix_now = now, unix_now
    self._seconds = dict.fromkeys(PHASES, 0.0)
    self._phase, self._since = "restart", now() - age_seconds
    self._unix_start = unix_now() - age_seconds
    self._last: dict[str, float] = {}

  def resume(self, path: pathlib.Path, resume_step: int) -> None:
    """Takes over the sums of the processes before, of which a file tells.

    Args:
      path: Their `metrics.jsonl`, before the steps to be done again are taken
        out of it.
      resume_step: The last of the steps that are not.
    """
    rows = _timed_rows(path)
    kept = [row for row in rows if row["step"] <= resume_step]
    if not kept:
      return
    run_seconds = kept[-1]["perf/run_seconds"]
    for phase in PHASES:
      share = kept[-1][f"perf/goodput_{phase}"]
      self._seconds[phase] += share * run_seconds
    last, end = kept[-1]["perf/unix_seconds"], rows[-1]["perf/unix_seconds"]
    # Clocks of two machines may differ by a little.
    self._seconds["lost"] += max(end - last, 0.0)
    self._seconds["restart"] += max(self._unix_start - end, 0.0)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """What happens inside is phase `name`."""
    before = self._phase
    self._enter(name)
    try:
      yield
    finally:
      self._enter(before)

  def start_steps(self) -> None:
    """The first step begins: "restart" is over."""
    self._enter("other")
    self._last = dict(self._seconds)

  def _enter(self, name: str) -> None:
    now = self._now()
    self._seconds[self._phase] += now - self._since
    self._phase, self._since = name, now

  def reassign(self, source: str, target: str, seconds: float) -> None:
    """Counts some of the seconds of one phase to another."""
    seconds = min(seconds, self._seconds[source])
    self._seconds[source] -= seconds
    self._seconds[target] += seconds

  def listen_to_compiler(self) -> None:
    """From now on takes compile time out of the phase that it falls into."""
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      # Part of a phase that is still on, whose sum may be below 0 for now.
      self._seconds[self._phase] -= duration_secs
      self._seconds["compile"] += duration_secs

  def shares(self) -> dict[str, float]:
    """By phase, of all the time since the run began; they add up to 1."""
    self._enter(self._phase)
    total = sum(self._seconds.values()) or 1.0
    return {phase: value / total for phase, value in self._seconds.items()}

  def scalars(self) -> dict[str, float]:
    """By the names of `metrics`, until now."""
    shares = self.shares()
    return {
      f"perf/goodput_{phase}": value for phase, value in shares.items()
    } | {
      "perf/run_seconds": sum(self._seconds.values()),
      "perf/unix_seconds": self._unix_now(),
    }

  def alone_seconds(self) -> float:
    """Since the last call, in phases in which no host waits for another."""
    self._enter(self._phase)
    before, self._last = self._last, dict(self._seconds)
    return sum(
      value - before.get(phase, 0.0)
      for phase, value in self._last.items()
      if phase not in _TOGETHER
    )


def summary(shares: Mapping[str, float]) -> str:
  """The shares in words, the largest first, without those below 0.05 %."""
  parts = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
  return ", ".join(f"{p} {100 * x:.1f} %" for p, x in parts if x >= 0.0005)


def _timed_rows(path: pathlib.Path) -> list[dict]:
  """The whole lines of a file that tell of time, if there is such a file."""
  rows = []
  if path.exists():
    for line in path.read_bytes().splitlines():
      with contextlib.suppress(ValueError):
        rows.append(json.loads(line))
  return [row for row in rows if "perf/run_seconds" in row]
