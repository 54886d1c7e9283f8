"""Samples completions of prompts with the policy that is being trained.

A prompt, with its images, runs through the network once; its completions decode
over the shared cache until every row has ended. Decoding runs on the devices, a
chunk of tokens at a time. Between chunks the host reads which rows are live,
moves them together and emits finished prompts.
`docs/adr/0010-rows-move-together.md` has the reasons.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from grpo_tpu.distributed import activity, hardware, sharding
from grpo_tpu.models.gemma3 import decoding
from grpo_tpu.rollout import compaction, engine

# Takes the token ids of every completion of some prompts, by prompt index.
type OnFinished = Callable[
  [Mapping[int, list[list[int]]], Mapping[int, list[bool]]], None
]
type OnTokens = Callable[[Mapping[int, list[list[int]]]], None]


def no_poll() -> None:
  """Does nothing: the poll of a caller that nothing can interrupt."""


@dataclasses.dataclass(frozen=True)
class StopStrings:
  """Strings that end a completion.

  Attributes:
    strings: Each ends the completion at the first token that completes it.
    decode: Decodes token ids to text. More ids must not change the text before
      them, incomplete characters at its end aside.
  """

  strings: tuple[str, ...]
  decode: Callable[[list[int]], str]

  def find_end(self, ids: list[int], known: int) -> int | None:
    """Number of tokens up to the end of the first stop string, or None.

    The first `known` tokens are known to hold no stop string.
    """
    if not self._contains_any(ids):
      return None
    counts = range(known + 1, len(ids) + 1)
    return next(n for n in counts if self._contains_any(ids[:n]))

  def _contains_any(self, ids: list[int]) -> bool:
    text = self.decode(ids)
    return any(string in text for string in self.strings)


@dataclasses.dataclass(frozen=True)
class RolloutReport:
  """Costs of a rollout; all but the seconds are the same on every host.

  Attributes:
    prefill_seconds: Time until every row had its first token.
    decode_seconds: Time from there to the end.
    tokens: Number of sampled tokens.
    decoded: Number of tokens that decoding sampled: all but each row's first.
    row_steps: Number of tokens that decoding computed, for live rows and for
      cells without one.
    moves: Number of times that rows moved together.
    least_bytes: Bytes that decoding had to read; see
      `decoding.least_bytes_read`.
  """

  prefill_seconds: float
  decode_seconds: float
  tokens: int
  decoded: int
  row_steps: int
  moves: int
  least_bytes: int

  def scalars(self, mesh: Mesh) -> dict[str, float]:
    """The report as metrics, by name."""
    seconds = self.prefill_seconds + self.decode_seconds
    scalars = {
      "perf/prefill_seconds": self.prefill_seconds,
      "perf/decode_seconds": self.decode_seconds,
      "perf/rollout_tokens_per_second": self.tokens / max(seconds, 1e-9),
      "perf/decode_bytes": self.least_bytes,
      "perf/compactions": self.moves,
    }
    if self.row_steps:
      scalars["perf/live_row_share"] = self.decoded / self.row_steps
    devices = mesh.devices.flat
    bandwidth = hardware.hbm_bandwidth(devices[0].device_kind)
    if bandwidth and self.decode_seconds:
      least_seconds = self.least_bytes / (bandwidth * mesh.devices.size)
      scalars["perf/decode_bandwidth_share"] = (
        least_seconds / self.decode_seconds
      )
    return scalars


def sum_reports(reports: Sequence[RolloutReport]) -> RolloutReport:
  """Adds up the reports of successive rollouts."""
  return RolloutReport(
    *map(sum, zip(*map(dataclasses.astuple, reports), strict=True))
  )


def sample_completions(
  params: dict,
  prompts: engine.Prompts,
  step_key: Key[Array, ""],
  *,
  settings: engine.Settings,
  mesh: Mesh,
  stop_strings: StopStrings | None = None,
  row_limits: Int[np.ndarray, "U C"] | None = None,
  poll: Callable[[], None] = no_poll,
  on_finished: OnFinished | None = None,
  on_tokens: OnTokens | None = None,
) -> tuple[engine.Completions, RolloutReport]:
  """Samples `num_completions` completions of each prompt.

  Args:
    params: The policy's parameters.
    prompts: Prompts of all processes, on the mesh.
    step_key: The run's key folded with the step.
    settings: How to sample.
    mesh: The devices.
    stop_strings: Strings that end a completion.
    row_limits: Most tokens of each row of this process, at most
      `max_new_tokens`; None gives every row that many. A row of 0 has no token,
      and neither it nor a short one changes the samples of the others.
    poll: Called between chunks, equally often on every process. An exception
      from it abandons the rollout.
    on_finished: Called between chunks with the token ids of those of this
      process's prompts whose last completion has just ended, and with True for
      each completion that was cut off.
    on_tokens: Called between chunks with the token ids so far of all of this
      process's prompts.
  """
  rollout = _Rollout(params, prompts, settings, mesh, stop_strings)
  total = settings.max_new_tokens
  with activity.doing("rollout", total=total, unit="tokens") as task:
    emit = functools.partial(rollout.emit, on_finished, on_tokens)
    return rollout.run(step_key, row_limits, poll, emit, task)


class _Rollout:
  """The host's side of one rollout."""

  def __init__(
    self,
    params: dict,
    prompts: engine.Prompts,
    settings: engine.Settings,
    mesh: Mesh,
    stop_strings: StopStrings | None,
  ):
    self._params, self._prompts = params, prompts
    self._settings, self._mesh = settings, mesh
    self._stop_strings = stop_strings
    self._engine = engine.Engine(settings, mesh)
    self._shards, shards = sharding.data_shards(mesh)
    per_shard = prompts.ids.shape[0] // shards
    self._grid = compaction.first_grid(
      shards, per_shard, settings.num_completions
    )
    self._shapes = grid_shapes(settings, per_shard)
    shape = (shards, per_shard, settings.num_completions)
    # By row index, as of the host's last look. A cut beyond T is none.
    self._length = np.zeros(shape, np.int32)
    self._live = np.ones(shape, bool)
    self._cut = np.full(shape, settings.max_new_tokens + 1, np.int32)
    self._is_emitted = np.zeros(shape[:2], bool)
    self._row_steps = self._moves = 0

  def run(self, step_key, row_limits, poll, emit, task):
    started = time.perf_counter()
    if row_limits is None:
      num_rows = self._local_part(self._live).shape[0]
      shape = (num_rows, self._settings.num_completions)
      row_limits = np.full(shape, self._settings.max_new_tokens)
    limit = sharding.device_put_batch(self._mesh, row_limits.astype(np.int32))
    poll()
    state, view = self._engine.prefill(
      self._params, self._prompts, limit, step_key
    )
    self._update(state, view)
    prefilled = time.perf_counter()
    while self._live.any():
      emit(state)
      poll()
      state, alive = self._move_together(state)
      before = task.done = int(self._t)
      state, view = self._engine.decode_chunk(self._params, state, alive)
      self._update(state, view)
      self._row_steps += (int(self._t) - before) * self._grid.rows.size
    done = time.perf_counter()
    emit(state)
    completions = self._engine.results(
      state.output, self._device_put(self._cut)
    )
    return completions, self._report(prefilled - started, done - prefilled)

  def _update(self, state: engine.State, view: engine.HostView) -> None:
    """Waits for a compiled function and reads the progress of each row."""
    self._t = int(view.t)
    known = self._length.copy()
    for name, by_row in (("live", self._live), ("length", self._length)):
      by_cell = np.asarray(getattr(view, name)).reshape(self._grid.rows.shape)
      for shard, rows in enumerate(self._grid.rows):
        by_row[shard].ravel()[rows[rows >= 0]] = by_cell[shard][rows >= 0]
    if self._stop_strings:
      self._cut_at_stop_strings(state, known)

  def _cut_at_stop_strings(self, state: engine.State, known: np.ndarray):
    """Ends rows whose new tokens complete a stop string."""
    assert self._stop_strings is not None
    cut = self._local_part(self._cut)
    ids = sharding.local_rows(self._mesh, state.output.ids)
    length, known = self._local_part(self._length), self._local_part(known)
    for row in map(tuple, np.argwhere((length > known) & (cut > length))):
      end = self._stop_strings.find_end(
        ids[row][: length[row]].tolist(), int(known[row])
      )
      if end is not None:
        cut[row] = end
    self._cut = sharding.all_rows(self._mesh, cut).reshape(self._cut.shape)
    self._live &= self._cut > self._length

  def _move_together(
    self, state: engine.State
  ) -> tuple[engine.State, jax.Array]:
    """Moves live rows to the smallest grid; also gives the cells they fill."""
    for move in compaction.moves(
      self._grid,
      self._live_cells(),
      self._shapes,
      self._settings.num_completions,
    ):
      past_the_end = self._live[0].size
      index = np.where(move.grid.rows < 0, past_the_end, move.grid.rows)
      state = self._engine.move_rows(
        state, *map(self._device_put, (index, move.rows, move.bundles))
      )
      self._grid = move.grid
      self._moves += 1
    return state, self._device_put(self._live_cells())

  def _live_cells(self) -> np.ndarray:
    """True for cells that hold a live row, `[shards, u, c]`."""
    live = self._live.reshape(len(self._live), -1)
    rows = self._grid.rows
    flags = np.take_along_axis(live, rows.reshape(len(rows), -1), axis=1)
    return flags.reshape(rows.shape) & (rows >= 0)

  def emit(
    self,
    on_finished: OnFinished | None,
    on_tokens: OnTokens | None,
    state: engine.State,
  ) -> None:
    """Passes on tokens of this process's prompts to those who wait for them."""
    is_new = ~self._live.any(axis=-1) & ~self._is_emitted
    self._is_emitted |= is_new
    finished = np.flatnonzero(self._local_part(is_new))
    if not (on_tokens or (on_finished and finished.size)):
      return
    ids, stopped = sharding.local_rows(
      self._mesh, (state.output.ids, state.output.stopped)
    )
    length, cut = self._local_part(self._length), self._local_part(self._cut)
    truncated = ~stopped & (cut > length)
    length = np.minimum(length, cut)
    tokens = {
      prompt: [row[:n].tolist() for row, n in zip(*each, strict=True)]
      for prompt, each in enumerate(zip(ids, length, strict=True))
      if on_tokens or prompt in finished
    }
    if on_finished and finished.size:
      done = finished.tolist()
      on_finished(
        {prompt: tokens[prompt] for prompt in done},
        {prompt: truncated[prompt].tolist() for prompt in done},
      )
    if on_tokens:
      on_tokens(tokens)

  def _local_part(self, by_shard: np.ndarray) -> np.ndarray:
    """This process's part of `[shards, u, ...]`, its shards concatenated."""
    part = by_shard[list(self._shards)]
    return part.reshape(-1, *part.shape[2:])

  def _device_put(self, by_shard: np.ndarray) -> jax.Array:
    """A global array of `[shards, u, ...]`, which every process has whole."""
    flat = by_shard.reshape(-1, *by_shard.shape[2:])
    return sharding.device_put_whole(self._mesh, flat, sharding.BATCH)

  def _report(
    self, prefill_seconds: float, decode_seconds: float
  ) -> RolloutReport:
    decoded = np.maximum(self._length - 1, 0)
    return RolloutReport(
      prefill_seconds=prefill_seconds,
      decode_seconds=decode_seconds,
      tokens=int(self._length.sum()),
      decoded=int(decoded.sum()),
      row_steps=self._row_steps,
      moves=self._moves,
      least_bytes=decoding.least_bytes_read(
        self._settings.config,
        self._params,
        steps=decoded.astype(np.int64),
        prompt_length=self._prompts.ids.shape[1],
        dtype=self._settings.dtype,
      ),
    )


def compile_ahead(
  params: dict,
  prompts: engine.Prompts,
  step_key: jax.ShapeDtypeStruct,
  *,
  settings: engine.Settings,
  mesh: Mesh,
) -> None:
  """Compiles everything that a rollout of such prompts may run.

  The arrays are given as shapes and shardings, the prompts of all processes.
  """
  functions = engine.Engine(settings, mesh)
  _, shards = sharding.data_shards(mesh)
  per_shard = prompts.ids.shape[0] // shards

  def array(dtype, bundles, *width):
    return sharding.abstract_batch(mesh, dtype, shards * bundles, *width)

  shape = per_shard, settings.num_completions
  limit = array(np.int32, *shape)
  state, _ = functions.prefill.prepare(params, prompts, limit, step_key)
  functions.results.prepare(state.output, limit)
  if settings.max_new_tokens == 1:
    return
  state, _ = functions.decode_chunk.prepare(params, state, array(bool, *shape))
  for bundles, width in grid_shapes(settings, per_shard)[1:]:
    index = array(np.int32, bundles, width)
    state = functions.move_rows.prepare(
      state, index, index, array(np.int32, bundles)
    )
    alive = array(bool, bundles, width)
    state, _ = functions.decode_chunk.prepare(params, state, alive)


def num_programs(settings: engine.Settings, num_prompts: int) -> int:
  """The number of programs that `compile_ahead` compiles for one shape.

  `num_prompts` are those of a shard.
  """
  if settings.max_new_tokens == 1:
    return 2
  return 1 + 2 * len(grid_shapes(settings, num_prompts))


def grid_shapes(
  settings: engine.Settings, num_prompts: int
) -> list[tuple[int, int]]:
  """Grid shapes of a shard, largest first; one if a single chunk is enough."""
  shapes = compaction.ladder(num_prompts, settings.num_completions)
  is_one_chunk = settings.chunk_tokens >= settings.max_new_tokens - 1
  return shapes[:1] if is_one_chunk else shapes
