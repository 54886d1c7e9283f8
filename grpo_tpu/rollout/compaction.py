"""Which rows stand where while they decode, and how few places will do.

Rows of one prompt stand in bundles of equal width over the prompt's cache. When
enough of them have stopped, the others move together: into narrower bundles,
of which a prompt with many rows left gets several, and at last into fewer.
A row keeps its number, and with it its key and its place in the results. Each
data shard moves its own rows only, and all take the same shape.

Pure NumPy. Every host plans from the same flags, so all plan the same.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

# Fewer rows than these cost a shard no less: weights are read all the same.
_FEWEST_ROWS = 4


class Grid(NamedTuple):
  """Rows by their places, shard by shard.

  Attributes:
    rows: Number of the row within its shard, `-1` where none stands; row `r` is
      the completion `r % C` of the shard's prompt `r // C`.
    prompts: Prompt of each bundle, within its shard.
  """

  rows: Int[np.ndarray, "shards u c"]
  prompts: Int[np.ndarray, "shards u"]

  @property
  def shape(self) -> tuple[int, int]:
    """Bundles of a shard, and rows of a bundle."""
    return self.rows.shape[1], self.rows.shape[2]


class Move(NamedTuple):
  """From one grid to the next.

  Attributes:
    grid: The next one.
    rows: Place in the old grid, `u * width + c`, of what comes to stand in each
      place of the new one; anything where no row does.
    bundles: Bundle of the old grid whose prompt each new one takes over.
  """

  grid: Grid
  rows: Int[np.ndarray, "shards u c"]
  bundles: Int[np.ndarray, "shards u"]


def ladder(num_prompts: int, num_completions: int) -> list[tuple[int, int]]:
  """Shapes that a shard's rows may take, from all of them down.

  First bundles get narrower, by halves, so that the prompts' caches stay as
  they are; then there are fewer of them.
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
  """Every row in its prompt's bundle."""
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
  """Steps down the ladder, one shape at a time, as far as live rows fit.

  One at a time, so that there is one program for each pair of neighbours.

  Args:
    grid: Where rows stand now.
    live: Which of these go on.
    shapes: From `ladder`.
    num_completions: Rows of each prompt at the start (`C`).
  """
  steps = []
  for shape in shapes[shapes.index(grid.shape) + 1 :]:
    step = _move(grid, live, shape, num_completions)
    if step is None:
      break
    steps.append(step)
    grid, live = step.grid, step.grid.rows >= 0
  return steps


def _move(
  grid: Grid,
  live: Bool[np.ndarray, "shards u c"],
  shape: tuple[int, int],
  num_completions: int,
) -> Move | None:
  """Live rows in a grid of the shape, in order; None if they do not fit."""
  shards = len(grid.rows)
  rows = np.full((shards, *shape), -1, np.int32)
  places = np.zeros((shards, *shape), np.int32)
  prompts = np.zeros((shards, shape[0]), np.int32)
  bundles = np.zeros((shards, shape[0]), np.int32)
  for shard in range(shards):
    standing = np.flatnonzero(live[shard].ravel())
    numbers = grid.rows[shard].ravel()[standing]
    standing = standing[np.argsort(numbers, kind="stable")]
    numbers = np.sort(numbers)
    bundle = 0
    for prompt in np.unique(numbers // num_completions):
      its = numbers // num_completions == prompt
      for start in range(0, int(its.sum()), shape[1]):
        if bundle == shape[0]:
          return None
        some = slice(start, start + shape[1])
        width = len(numbers[its][some])
        rows[shard, bundle, :width] = numbers[its][some]
        places[shard, bundle, :width] = standing[its][some]
        prompts[shard, bundle] = prompt
        bundles[shard, bundle] = standing[its][start] // grid.shape[1]
        bundle += 1
    # Spare bundles keep a prompt that exists, and nobody reads what they make.
    prompts[shard, bundle:] = grid.prompts[shard, 0]
  return Move(Grid(rows, prompts), places, bundles)
