"""How the wall time of a run divides into phases, over all its restarts.

The run is in exactly one phase at any time, so the shares add up to 1. A
restarted process reads the sums of the earlier ones from `metrics.jsonl`.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping

import psutil

from data_pipelines.text import untrusted
from grpo_tpu.distributed import collectives, compile_cache
from grpo_tpu.observability import json_lines

# `restart`: from the last step of a process to the first step of the next; for
# the first process, its start. `lost`: steps that a later process repeated.
# `other`: all other time.
PHASES = (
  *("data", "rollout", "reward", "update", "compile", "evaluate"),
  *("checkpoint", "restart", "lost", "other"),
)
_TIMES = (
  *("perf/run_seconds", "perf/unix_seconds"),
  *(f"perf/goodput_{phase}" for phase in PHASES),
)
# In these phases the hosts wait for each other.
_TOGETHER = ("rollout", "update", "evaluate")


class Clock:
  """Adds up seconds by phase; a nested phase interrupts the outer one."""

  def __init__(self):
    """Enters the phase "restart", which began with the process."""
    self._unix_start = psutil.Process().create_time()
    age_seconds = time.time() - self._unix_start
    self._seconds = dict.fromkeys(PHASES, 0.0)
    self._phase, self._since = "restart", time.monotonic() - age_seconds
    self._last: dict[str, float] = {}

  def resume(self, path: pathlib.Path, resume_step: int) -> None:
    """Adds the sums of the earlier processes, whose rows are not cut yet.

    Only rows that hold every time count; the file may be missing. Process 0
    reads it, and tells the others.
    """
    rows = []
    for _, row in json_lines.read_rows(path):
      with contextlib.suppress(ValueError):
        if row is not None:
          for name in _TIMES:
            untrusted.get_field(row, name, float, "a line")
          rows.append(row)
    kept = [row for row in rows if row["step"] <= resume_step]
    found = [kept[-1], rows[-1]["perf/unix_seconds"]] if kept else None
    found = json.loads(collectives.broadcast_string(json.dumps(found)))
    if found is None:
      return
    last, end = found
    for phase in PHASES:
      share = last[f"perf/goodput_{phase}"]
      self._seconds[phase] += share * last["perf/run_seconds"]
    # The clocks of two machines may differ a little.
    self._seconds["lost"] += max(end - last["perf/unix_seconds"], 0.0)
    self._seconds["restart"] += max(self._unix_start - end, 0.0)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the time inside the context to phase `name`."""
    before = self._phase
    self._enter(name)
    try:
      yield
    finally:
      self._enter(before)

  def start_steps(self) -> None:
    """Ends the phase "restart", before the first step."""
    self._enter("other")
    self._last = dict(self._seconds)

  def _enter(self, name: str) -> None:
    now = time.monotonic()
    self._seconds[self._phase] += now - self._since
    self._phase, self._since = name, now

  def reassign(self, source: str, target: str, seconds: float) -> None:
    """Moves seconds from one phase to another, as far as there are any."""
    seconds = min(seconds, self._seconds[source])
    self._seconds[source] -= seconds
    self._seconds[target] += seconds

  def listen_to_compiler(self) -> None:
    """Counts compile time to "compile" and not to the phase around it."""
    compile_cache.on_compile(self._add_compile)

  def _add_compile(self, seconds: float) -> None:
    # The sum of a phase that has not ended may be below 0 for now.
    self._seconds[self._phase] -= seconds
    self._seconds["compile"] += seconds

  def shares(self) -> dict[str, float]:
    """The share of each phase in the time since the run began."""
    self._enter(self._phase)
    total = sum(self._seconds.values()) or 1.0
    return {phase: value / total for phase, value in self._seconds.items()}

  def scalars(self) -> dict[str, float]:
    """The metrics of all time until now."""
    return {f"perf/goodput_{k}": x for k, x in self.shares().items()} | {
      "perf/run_seconds": sum(self._seconds.values()),
      "perf/unix_seconds": time.time(),
    }

  def alone_seconds(self) -> float:
    """Seconds since the last call in which no host waited for another."""
    self._enter(self._phase)
    before, self._last = self._last, dict(self._seconds)
    return sum(
      value - before.get(phase, 0.0)
      for phase, value in self._last.items()
      if phase not in _TOGETHER
    )


def summary(shares: Mapping[str, float]) -> str:
  """The shares as text, the largest first, without those below 0.05 %."""
  parts = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
  return ", ".join(f"{p} {100 * x:.1f} %" for p, x in parts if x >= 0.0005)
