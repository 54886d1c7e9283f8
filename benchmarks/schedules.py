"""What rows that move together cost beside slots that are refilled.

    python benchmarks/schedules.py [--prompts=8 --completions=8 ...]

A simulation on measured costs: what a chunk of tokens costs at each shape that
rows take, what a move to it costs, and what reading a prompt does, all timed
here, in CPU seconds. Moves are then planned by the rollout's own planner.
Refilling is not built, and is taken at its best: between two chunks a free slot
takes a row of any prompt, for nothing; a prompt is read as cheaply as in the
whole batch; and the last rows shrink for nothing, to just their number.
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
  """CPU seconds.

  Attributes:
    chunk: Of each chunk of tokens, by the number of places.
    move: To so many places.
    prefill: Of a prompt.
  """

  chunk: dict[int, list[float]]
  move: dict[int, float]
  prefill: float

  def per_token(self, places: float, chunk_tokens: int) -> float:
    """Of any number of places, between those measured."""
    known = sorted(self.chunk)
    means = [statistics.mean(self.chunk[n]) / chunk_tokens for n in known]
    return float(np.interp(places, known, means))


def main() -> None:
  """Measures, simulates, prints."""
  args = workload.parser(__doc__).parse_args()
  params, prompts, settings, mesh = workload.made(args)
  with jax.set_mesh(mesh):
    costs = _costs(args, params, prompts, settings, mesh)
  print(f"{'places':>8}{'ms a token':>12}{'of all':>8}{'ms to move':>12}")
  most = max(costs.chunk)
  for places in sorted(costs.chunk, reverse=True):
    token = costs.per_token(places, args.chunk_tokens)
    share = token / costs.per_token(most, args.chunk_tokens)
    move = 1e3 * costs.move.get(places, 0)
    print(f"{places:8}{1e3 * token:12.2f}{share:8.2f}{move:12.1f}")
  print(f"reading a prompt: {1e3 * costs.prefill:.1f} ms\n")
  slots = [n for n in sorted(costs.chunk, reverse=True) if n < most][:3]
  names = ["none", "moved", *(f"refilled {n}" for n in slots)]
  print(f"{'CPU s':16}" + "".join(f"{name:>13}" for name in names))
  for name, lengths in _lengths(args).items():
    found = [
      _moved(args, costs, np.full_like(lengths, lengths.max())),
      _moved(args, costs, lengths),
      *(_refilled(args, costs, lengths, n) for n in slots),
    ]
    print(f"{name:16}" + "".join(f"{x:13.2f}" for x in found))


def _lengths(args) -> dict[str, np.ndarray]:
  """Tokens of each row, by what they are like."""
  rng = np.random.default_rng(0)
  most, shape = args.completion_length, (args.prompts, args.completions)
  geometric = rng.geometric(4 / most, shape)
  return {
    "long tail": workload.long_tail(args),
    "uniform": rng.integers(1, most + 1, shape),
    "geometric": np.minimum(geometric, most),
    "all alike": np.full(shape, most),
  }


def _moved(args, costs: Costs, lengths: np.ndarray) -> float:
  """As the rollout plans it."""
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


def _refilled(args, costs: Costs, lengths: np.ndarray, slots: int) -> float:
  """So many slots, each of which takes the next row when its own ends."""
  waiting = list(lengths.ravel() - 1)
  running: list[int] = []
  seconds = args.prompts * costs.prefill
  while waiting or running:
    taken, waiting = (
      waiting[: slots - len(running)],
      waiting[slots - len(running) :],
    )
    running = [x for x in running + taken if x > 0]
    steps = min(args.chunk_tokens, max(running, default=0))
    places = slots if waiting else len(running)
    seconds += steps * costs.per_token(places, args.chunk_tokens)
    running = [x - steps for x in running if x > steps]
  return seconds


def _costs(args, params, prompts, settings, mesh) -> Costs:
  """Runs rows of each shape from the first token to the last."""
  programs = engine.Engine(settings, mesh)
  shapes = compaction.ladder(args.prompts, args.completions)
  limits = np.full(shapes[0], args.completion_length, np.int32)
  limit = sharding.device_put_batch(mesh, limits)
  prefill, move, chunk = [], {}, {}
  for _ in range(args.repeats + 1):
    (state, _), seconds = _timed(
      programs.prefill, params, prompts, limit, jax.random.key(0)
    )
    prefill.append(seconds / args.prompts)
    for bundles, width in shapes:
      places = bundles * width
      if places < limits.size:
        rows = np.arange(places, dtype=np.int32).reshape(bundles, width)
        grid = sharding.device_put_batch(
          mesh, (rows, rows, np.arange(bundles, dtype=np.int32))
        )
        state, seconds = _timed(programs.move_rows, state, *grid)
        move.setdefault(places, []).append(seconds)
      alive = sharding.device_put_batch(mesh, np.ones((bundles, width), bool))
      now, each = jax.tree.map(jnp.copy, state), []
      for _ in range(1, args.completion_length, args.chunk_tokens):
        (now, _), seconds = _timed(programs.decode_chunk, params, now, alive)
        each.append(seconds)
      chunk.setdefault(places, []).append(each)
  # What ran first compiled.
  return Costs(
    chunk={
      places: [statistics.median(x) for x in zip(*runs[1:], strict=True)]
      for places, runs in chunk.items()
    },
    move={places: statistics.median(x[1:]) for places, x in move.items()},
    prefill=statistics.median(prefill[1:]),
  )


def _timed(program: Callable, *args: Any) -> tuple[Any, float]:
  started = time.process_time()
  result = jax.block_until_ready(program(*args))
  return result, time.process_time() - started


if __name__ == "__main__":
  main()
