"""Plans where rows stand while they decode, and how few cells are enough.

A shard's rows fill a grid: bundles of equal width, each over the cache of one
prompt. When enough rows have ended, the live ones move together: into narrower
bundles, of which a prompt with many live rows gets several, and at last into
fewer bundles. A row keeps its index, and with it its key and its row of the
output. Each data shard moves its own rows only, and all take the same shape.

Pure NumPy. Every host plans from the same flags, so all plan the same.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

# With fewer rows a shard saves nothing: reading the weights costs the same.
_FEWEST_ROWS = 4


class Grid(NamedTuple):
  """The rows in the cells of each shard.

  Attributes:
    rows: Index of the row within its shard, `-1` in an empty cell; row `r` is
      completion `r % C` of the shard's prompt `r // C`.
    prompts: Prompt of each bundle, within its shard.
  """

  rows: Int[np.ndarray, "shards u c"]
  prompts: Int[np.ndarray, "shards u"]

  @property
  def shape(self) -> tuple[int, int]:
    """Number of bundles of a shard, and their width."""
    return self.rows.shape[1], self.rows.shape[2]


class Move(NamedTuple):
  """A move from one grid to the next.

  Attributes:
    grid: The next grid.
    rows: Old cell, `u * width + c`, of the row that moves to each new cell;
      arbitrary for an empty cell.
    bundles: Old bundle whose prompt each new bundle takes over.
  """

  grid: Grid
  rows: Int[np.ndarray, "shards u c"]
  bundles: Int[np.ndarray, "shards u"]


def ladder(num_prompts: int, num_completions: int) -> list[tuple[int, int]]:
  """Grid shapes of a shard, from all rows down.

  First bundles get narrower, by halves, so that the prompts' caches stay as
  they are; then there are fewer bundles.
  """
  shapes = [(num_prompts, num_completions)]
  while shapes[-1][0] * shapes[-1][1] > _FEWEST_ROWS:
    bundles, width = shapes[-1]
    if width > 1:
      shapes.append((bundles, -(-width // 2)))
    else:
      shapes.append((-(-bundles // 2), 1))
  return shapes


def first_grid(shards: int, num_prompts: int, num_completions: int) -> Grid:
  """The grid with every row in the bundle of its prompt."""
  shape = (num_prompts, num_completions)
  rows = np.arange(num_prompts * num_completions, dtype=np.int32)
  prompts = np.arange(num_prompts, dtype=np.int32)
  return Grid(
    np.broadcast_to(rows.reshape(shape), (shards, *shape)),
    np.broadcast_to(prompts, (shards, num_prompts)),
  )


def moves(
  grid: Grid,
  live: Bool[np.ndarray, "shards u c"],
  shapes: list[tuple[int, int]],
  num_completions: int,
) -> list[Move]:
  """Moves down the ladder, one shape at a time, as far as live rows fit.

  One shape at a time needs one compiled function per pair of neighbours.
  `shapes` come from `ladder`; `num_completions` is `C`, that of the start.
  """
  steps = []
  for shape in shapes[shapes.index(grid.shape) + 1 :]:
    step = _plan_move(grid, live, shape, num_completions)
    if step is None:
      break
    steps.append(step)
    grid, live = step.grid, step.grid.rows >= 0
  return steps


def _plan_move(
  grid: Grid,
  live: Bool[np.ndarray, "shards u c"],
  shape: tuple[int, int],
  num_completions: int,
) -> Move | None:
  """The move of live rows to a new shape, in order; None if they do not fit."""
  shards = len(grid.rows)
  rows = np.full((shards, *shape), -1, np.int32)
  cells = np.zeros((shards, *shape), np.int32)
  prompts = np.zeros((shards, shape[0]), np.int32)
  bundles = np.zeros((shards, shape[0]), np.int32)
  for shard in range(shards):
    old_cells = np.flatnonzero(live[shard].ravel())
    row_index = grid.rows[shard].ravel()[old_cells]
    old_cells = old_cells[np.argsort(row_index, kind="stable")]
    row_index = np.sort(row_index)
    bundle = 0
    for prompt in np.unique(row_index // num_completions):
      is_its = row_index // num_completions == prompt
      for start in range(0, int(is_its.sum()), shape[1]):
        if bundle == shape[0]:
          return None
        part = slice(start, start + shape[1])
        width = len(row_index[is_its][part])
        rows[shard, bundle, :width] = row_index[is_its][part]
        cells[shard, bundle, :width] = old_cells[is_its][part]
        prompts[shard, bundle] = prompt
        bundles[shard, bundle] = old_cells[is_its][start] // grid.shape[1]
        bundle += 1
    # Spare bundles need some prompt; nobody reads their results.
    prompts[shard, bundle:] = grid.prompts[shard, 0]
  return Move(Grid(rows, prompts), cells, bundles)
