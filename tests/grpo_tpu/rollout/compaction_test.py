"""After a move all live rows are there, in order, with their prompts."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from grpo_tpu.rollout import compaction


@st.composite
def grids(draw):
  shards = draw(st.integers(1, 3))
  prompts, completions = draw(st.integers(1, 6)), draw(st.integers(1, 7))
  share = draw(st.floats(0, 1))
  rng = np.random.default_rng(draw(st.integers(0, 1000)))
  live = rng.random((shards, prompts, completions)) < share
  return live, rng


@hypothesis.given(grids())
def test_moves_keep_every_live_row_beside_its_prompt(drawn):
  """Two moves, with some rows ending in between."""
  live, rng = drawn
  shards, prompts, completions = live.shape
  shapes = compaction.ladder(prompts, completions)
  grid = compaction.first_grid(shards, prompts, completions)
  for _ in range(2):
    for move in compaction.moves(grid, live, shapes, completions):
      for shard in range(shards):
        alive = np.sort(grid.rows[shard][live[shard]])
        rows = move.grid.rows[shard]
        is_there = rows >= 0
        np.testing.assert_array_equal(np.sort(rows[is_there]), alive)
        came_from = grid.rows[shard].ravel()[move.rows[shard]]
        np.testing.assert_array_equal(came_from[is_there], rows[is_there])
        np.testing.assert_array_equal(
          move.grid.prompts[shard], grid.prompts[shard][move.bundles[shard]]
        )
        own = np.broadcast_to(move.grid.prompts[shard][:, None], rows.shape)
        np.testing.assert_array_equal(
          rows[is_there] // completions, own[is_there]
        )
      assert move.grid.shape in shapes
      assert move.grid.rows[0].size < grid.rows[0].size
      grid, live = move.grid, move.grid.rows >= 0
    live = live & (rng.random(live.shape) < 0.5)


def test_rows_of_many_prompts_fit_by_their_number():
  """One row of each of eight prompts needs an eighth of the cells."""
  live = np.zeros((1, 8, 8), bool)
  live[0, :, 3] = True
  grid = compaction.first_grid(1, 8, 8)
  *_, last = compaction.moves(grid, live, compaction.ladder(8, 8), 8)
  assert last.grid.shape == (8, 1)


def test_a_shape_is_left_only_when_the_rows_of_every_shard_fit():
  live = np.zeros((2, 4, 4), bool)
  live[1] = True
  grid = compaction.first_grid(2, 4, 4)
  assert not compaction.moves(grid, live, compaction.ladder(4, 4), 4)
