"""Compares moving rows into a smaller grid with refilling free slots.

    python benchmarks/schedules.py [--prompts=8 --completions=8 ...]

This is a simulation with costs that are measured here, in CPU seconds: a chunk
of tokens at each grid shape, a move to each shape, and reading a prompt. Moves
are planned by the rollout's own planner. Refilling does not exist, so it is
assumed to be ideal: between chunks a free slot takes a row of any prompt at no
cost; a prompt is read as cheaply as in the whole batch; and the last rows
shrink to their number at no cost.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rollout as workload

from grpo_tpu.distributed import sharding
from grpo_tpu.rollout import compaction, engine


class Costs(NamedTuple):
  """Measured CPU seconds.

  Attributes:
    chunk: Seconds of each chunk of tokens, by the number of slots.
    move: Seconds of a move, by the new number of slots.
    prefill: Seconds to read one prompt.
  """

  chunk: dict[int, list[float]]
  move: dict[int, float]
  prefill: float

  def per_token(self, slots: float, chunk_tokens: int) -> float:
    """Seconds of one token, interpolated between measured numbers of slots."""
    known = sorted(self.chunk)
    means = [statistics.mean(self.chunk[n]) / chunk_tokens for n in known]
    return float(np.interp(slots, known, means))


def main() -> None:
  """Measures, simulates and prints."""
  args = workload.parser(__doc__).parse_args()
  params, prompts, settings, mesh = workload.make(args)
  with jax.set_mesh(mesh):
    costs = _measure(args, params, prompts, settings, mesh)
  print(f"{'slots':>8}{'ms a token':>12}{'of all':>8}{'ms to move':>12}")
  most = max(costs.chunk)
  for slots in sorted(costs.chunk, reverse=True):
    token = costs.per_token(slots, args.chunk_tokens)
    share = token / costs.per_token(most, args.chunk_tokens)
    move = 1e3 * costs.move.get(slots, 0)
    print(f"{slots:8}{1e3 * token:12.2f}{share:8.2f}{move:12.1f}")
  print(f"reading a prompt: {1e3 * costs.prefill:.1f} ms\n")
  slots = [n for n in sorted(costs.chunk, reverse=True) if n < most][:3]
  names = ["none", "moved", *(f"refilled {n}" for n in slots)]
  print(f"{'CPU s':16}" + "".join(f"{name:>13}" for name in names))
  for name, lengths in _lengths(args).items():
    found = [
      _moving_seconds(args, costs, np.full_like(lengths, lengths.max())),
      _moving_seconds(args, costs, lengths),
      *(_refilling_seconds(args, costs, lengths, n) for n in slots),
    ]
    print(f"{name:16}" + "".join(f"{x:13.2f}" for x in found))


def _lengths(args) -> dict[str, np.ndarray]:
  """Tokens of each row, by the name of the distribution."""
  rng = np.random.default_rng(0)
  most, shape = args.completion_length, (args.prompts, args.completions)
  geometric = rng.geometric(4 / most, shape)
  return {
    "long tail": workload.long_tail(args),
    "uniform": rng.integers(1, most + 1, shape),
    "geometric": np.minimum(geometric, most),
    "equal": np.full(shape, most),
  }


def _moving_seconds(args, costs: Costs, lengths: np.ndarray) -> float:
  """Seconds of a rollout that moves rows as the planner says."""
  shape = lengths.shape
  shapes = compaction.ladder(*shape)
  grid = compaction.first_grid(1, *shape)
  seconds, t = args.prompts * costs.prefill, 0
  while True:
    live = (lengths.ravel()[grid.rows] > t + 1) & (grid.rows >= 0)
    if not live.any():
      return seconds
    for move in compaction.moves(grid, live, shapes, shape[1]):
      grid = move.grid
      seconds += costs.move[grid.rows.size]
    chunk = costs.chunk[grid.rows.size][t // args.chunk_tokens]
    rows = grid.rows[grid.rows >= 0]
    steps = min(args.chunk_tokens, int(lengths.ravel()[rows].max()) - 1 - t)
    seconds += chunk * steps / args.chunk_tokens
    t += args.chunk_tokens


def _refilling_seconds(
  args, costs: Costs, lengths: np.ndarray, slots: int
) -> float:
  """Seconds of a rollout in which free slots take the next rows."""
  waiting = list(lengths.ravel() - 1)
  running: list[int] = []
  seconds = args.prompts * costs.prefill
  while waiting or running:
    free = slots - len(running)
    running = [x for x in running + waiting[:free] if x > 0]
    waiting = waiting[free:]
    steps = min(args.chunk_tokens, max(running, default=0))
    slots = slots if waiting else len(running)
    seconds += steps * costs.per_token(slots, args.chunk_tokens)
    running = [x - steps for x in running if x > steps]
  return seconds


def _measure(args, params, prompts, settings, mesh) -> Costs:
  """Times grids of each shape from the first token to the last."""
  programs = engine.Engine(settings, mesh)
  shapes = compaction.ladder(args.prompts, args.completions)
  limits = np.full(shapes[0], args.completion_length, np.int32)
  limit = sharding.device_put_batch(mesh, limits)
  prefill, move, chunk = [], {}, {}
  for _ in range(args.repeats + 1):
    (state, _), seconds = _time(
      programs.prefill, params, prompts, limit, jax.random.key(0)
    )
    prefill.append(seconds / args.prompts)
    for bundles, width in shapes:
      slots = bundles * width
      if slots < limits.size:
        rows = np.arange(slots, dtype=np.int32).reshape(bundles, width)
        grid = sharding.device_put_batch(
          mesh, (rows, rows, np.arange(bundles, dtype=np.int32))
        )
        state, seconds = _time(programs.move_rows, state, *grid)
        move.setdefault(slots, []).append(seconds)
      alive = sharding.device_put_batch(mesh, np.ones((bundles, width), bool))
      now, each = jax.tree.map(jnp.copy, state), []
      for _ in range(1, args.completion_length, args.chunk_tokens):
        (now, _), seconds = _time(programs.decode_chunk, params, now, alive)
        each.append(seconds)
      chunk.setdefault(slots, []).append(each)
  # The first repeat compiled, so it is left out.
  return Costs(
    chunk={
      slots: [statistics.median(x) for x in zip(*runs[1:], strict=True)]
      for slots, runs in chunk.items()
    },
    move={slots: statistics.median(x[1:]) for slots, x in move.items()},
    prefill=statistics.median(prefill[1:]),
  )


def _time(program: Callable, *args: Any) -> tuple[Any, float]:
  started = time.process_time()
  result = jax.block_until_ready(program(*args))
  return result, time.process_time() - started


if __name__ == "__main__":
  main()
