"""Completions of prompts, sampled by the policy that is being trained.

A prompt, with its image, runs through the network once; its completions decode
over the shared cache until every row has stopped. The loop runs on the devices,
some tokens at a time. In between the host looks which rows go on, moves them
together, and hands out what is finished. `docs/adr/0010-rows-move-together.md`
has the reasons.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from grpo_tpu.distributed import hardware, sharding
from grpo_tpu.rollout import compaction, engine


def no_poll() -> None:
  """For callers that nothing can interrupt."""


@dataclasses.dataclass(frozen=True)
class StopStrings:
  """Strings that end a completion, for those who read it as text.

  Attributes:
    strings: Any of which ends it, at the first token that completes one.
    decode: What reads ids. Further ids must not change what it has read,
      broken characters at the end aside.
  """

  strings: tuple[str, ...]
  decode: Callable[[list[int]], str]

  def cut(self, ids: list[int], known: int) -> int | None:
    """Tokens up to the end of the first string, if there is one.

    Args:
      ids: Of a completion.
      known: How many of them are known to hold none.
    """
    if not self._holds(ids):
      return None
    counts = range(known + 1, len(ids) + 1)
    return next(n for n in counts if self._holds(ids[:n]))

  def _holds(self, ids: list[int]) -> bool:
    text = self.decode(ids)
    return any(string in text for string in self.strings)


@dataclasses.dataclass(frozen=True)
class RolloutReport:
  """What a rollout took; all but seconds is the same on every host.

  Attributes:
    prefill_seconds: Until every row had its first token.
    decode_seconds: From there on.
    tokens: Written, over all rows.
    decoded: Those that decoding wrote: all but each row's first.
    row_steps: Tokens that places, with live rows or not, were computed for
      while decoding.
    moves: Times that rows moved together.
    least_bytes: That decoding had to read: for each token the weights, once,
      and the caches of live rows and their prompts.
  """

  prefill_seconds: float
  decode_seconds: float
  tokens: int
  decoded: int
  row_steps: int
  moves: int
  least_bytes: int

  def scalars(self, mesh: Mesh) -> dict[str, float]:
    """By the names of `metrics`."""
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
  """Of rollouts one after the other."""
  return RolloutReport(
    *map(sum, zip(*map(dataclasses.astuple, reports), strict=True))
  )


type OnFinished = Callable[[Mapping[int, list[list[int]]]], None]


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
) -> tuple[engine.Completions, RolloutReport]:
  """Samples `num_completions` completions of each prompt.

  Args:
    params: The policy.
    prompts: Of all processes, on the mesh.
    step_key: The run's key folded with the step.
    settings: How to sample.
    mesh: Where arrays lie.
    stop_strings: Strings that end a completion.
    row_limits: Most tokens of each row of this process, up to
      `max_new_tokens`, which is what None means for all.
    poll: Called between chunks, equally often on every process. It may raise,
      which abandons the rollout.
    on_finished: Called between chunks with the ids of all completions of
      those of this process's prompts that are complete, and were not before.
  """
  return _Rollout(
    params, prompts, settings=settings, mesh=mesh, stop_strings=stop_strings
  ).run(step_key, row_limits, poll, on_finished)


class _Rollout:
  """One rollout, as the host sees it."""

  def __init__(
    self,
    params: dict,
    prompts: engine.Prompts,
    *,
    settings: engine.Settings,
    mesh: Mesh,
    stop_strings: StopStrings | None,
  ):
    self._params, self._prompts = params, prompts
    self._settings, self._mesh, self._stop_strings = (
      settings,
      mesh,
      stop_strings,
    )
    self._engine = engine.Engine(settings, mesh)
    self._shards, shards = sharding.data_shards(mesh)
    per_shard = prompts.ids.shape[0] // shards
    self._grid = compaction.first_grid(
      shards, per_shard, settings.num_completions
    )
    self._ladder = ladder(settings, per_shard)
    shape = (shards, per_shard, settings.num_completions)
    # By number of the row: as far as the host has looked; no cut is beyond T.
    self._length = np.zeros(shape, np.int32)
    self._live = np.ones(shape, bool)
    self._cut = np.full(shape, settings.max_new_tokens + 1, np.int32)
    self._handed_out = np.zeros(shape[:2], bool)
    self._row_steps = self._moves = 0

  def run(self, step_key, row_limits, poll, on_finished):
    started = time.perf_counter()
    if row_limits is None:
      rows = (self._mine(self._live).shape[0], self._settings.num_completions)
      row_limits = np.full(rows, self._settings.max_new_tokens)
    limit = sharding.device_put_batch(self._mesh, row_limits.astype(np.int32))
    poll()
    state, view = self._engine.prefill(
      self._params, self._prompts, limit, step_key
    )
    self._look(state, view)
    prefilled = time.perf_counter()
    while self._live.any():
      if on_finished:
        self._hand_out(state, on_finished)
      poll()
      state, alive = self._moved(state)
      before = int(self._t)
      state, view = self._engine.decode_chunk(self._params, state, alive)
      self._look(state, view)
      self._row_steps += (int(self._t) - before) * self._grid.rows.size
    done = time.perf_counter()
    if on_finished:
      self._hand_out(state, on_finished)
    completions = self._engine.results(state.output, self._put(self._cut))
    return completions, self._report(prefilled - started, done - prefilled)

  def _look(self, state: engine.State, view: engine.HostView) -> None:
    """Waits for a program, and notes how far each row has come."""
    self._t = int(view.t)
    known = self._length.copy()
    for name, noted in (("live", self._live), ("length", self._length)):
      seen = np.asarray(getattr(view, name)).reshape(self._grid.rows.shape)
      for shard, rows in enumerate(self._grid.rows):
        noted[shard].ravel()[rows[rows >= 0]] = seen[shard][rows >= 0]
    if self._stop_strings:
      self._cut_off(state, known)

  def _cut_off(self, state: engine.State, known: np.ndarray) -> None:
    """Ends rows whose text has come to hold a stop string."""
    assert self._stop_strings is not None
    cut = self._mine(self._cut)
    ids = sharding.local_rows(self._mesh, state.output.ids)
    length, known = self._mine(self._length), self._mine(known)
    for row in np.argwhere((length > known) & (cut > length)):
      at = tuple(row)
      found = self._stop_strings.cut(
        ids[at][: length[at]].tolist(), int(known[at])
      )
      if found is not None:
        cut[at] = found
    everyones = sharding.all_rows(self._mesh, cut)
    self._cut = everyones.reshape(self._cut.shape)
    self._live &= self._cut > self._length

  def _moved(self, state: engine.State) -> tuple[engine.State, jax.Array]:
    """The state once rows have moved as far together as they can."""
    for move in compaction.moves(
      self._grid, self._in_place(), self._ladder, self._settings.num_completions
    ):
      none = self._live[0].size
      number = np.where(move.grid.rows < 0, none, move.grid.rows)
      state = self._engine.move_rows(
        state, *map(self._put, (number, move.rows, move.bundles))
      )
      self._grid = move.grid
      self._moves += 1
    return state, self._put(self._in_place())

  def _in_place(self) -> np.ndarray:
    """Which places hold a row that goes on, `[shards, u, c]`."""
    live = self._live.reshape(len(self._live), -1)
    rows = self._grid.rows
    flags = np.take_along_axis(live, rows.reshape(len(rows), -1), axis=1)
    return flags.reshape(rows.shape) & (rows >= 0)

  def _hand_out(self, state: engine.State, on_finished: OnFinished) -> None:
    """Tells of this process's prompts whose rows have all ended."""
    new = ~self._live.any(axis=-1) & ~self._handed_out
    self._handed_out |= new
    mine = np.flatnonzero(self._mine(new))
    if not mine.size:
      return
    ids = sharding.local_rows(self._mesh, state.output.ids)
    length = np.minimum(self._mine(self._length), self._mine(self._cut))
    on_finished(
      {
        int(prompt): [
          row[:n].tolist()
          for row, n in zip(ids[prompt], length[prompt], strict=True)
        ]
        for prompt in mine
      }
    )

  def _mine(self, by_shard: np.ndarray) -> np.ndarray:
    """This process's part of `[shards, u, ...]`, shards laid end to end."""
    mine = by_shard[list(self._shards)]
    return mine.reshape(-1, *mine.shape[2:])

  def _put(self, by_shard: np.ndarray) -> jax.Array:
    """A global array of `[shards, u, ...]`, which every process has whole."""
    flat = by_shard.reshape(-1, *by_shard.shape[2:])
    return sharding.device_put_whole(self._mesh, flat, sharding.BATCH)

  def _report(
    self, prefill_seconds: float, decode_seconds: float
  ) -> RolloutReport:
    return RolloutReport(
      prefill_seconds=prefill_seconds,
      decode_seconds=decode_seconds,
      tokens=int(self._length.sum()),
      decoded=int((self._length - 1).sum()),
      row_steps=self._row_steps,
      moves=self._moves,
      least_bytes=self._least_bytes(),
    )

  def _least_bytes(self) -> int:
    """As `RolloutReport` says, prompts taken as long as they are padded to."""
    config = self._settings.config
    weights = (
      self._params["layers"],
      self._params["embedder"]["input_embedding"],
    )
    num_global = sum(config.global_layers)
    num_local = config.num_layers - num_global
    window, padded = config.sliding_window, self._prompts.ids.shape[1]
    token = 2 * config.num_kv_heads * config.head_dim
    token *= self._settings.dtype.itemsize
    steps = (self._length - 1).astype(np.int64)
    # The i-th step of a row reads i of its own tokens, or a window of them.
    own = steps * (steps + 1) // 2
    beyond = np.maximum(steps - window, 0)
    in_window = own - beyond * (beyond + 1) // 2
    prompts = steps.max(axis=-1).sum() * (
      num_global * padded + num_local * min(padded, window - 1)
    )
    cached = num_global * own.sum() + num_local * in_window.sum() + prompts
    read = sum(x.nbytes for x in jax.tree.leaves(weights))
    return int(steps.max() * read + cached * token)


def compile_ahead(
  params: dict,
  prompts: engine.Prompts,
  step_key: jax.ShapeDtypeStruct,
  *,
  settings: engine.Settings,
  mesh: Mesh,
) -> None:
  """Compiles every program that a rollout of such prompts may need.

  Args:
    params: Shapes and places, as those of the rest.
    prompts: Of all processes.
    step_key: As it will be.
    settings: How to sample.
    mesh: Where arrays lie.
  """
  programs = engine.Engine(settings, mesh)
  place, (_, shards) = sharding.batch_sharding(mesh), sharding.data_shards(mesh)
  per_shard = prompts.ids.shape[0] // shards

  def array(dtype, bundles, *width):
    shape = (shards * bundles, *width)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  shape = per_shard, settings.num_completions
  limit = array(np.int32, *shape)
  state, _ = programs.prefill.prepare(params, prompts, limit, step_key)
  programs.results.prepare(state.output, limit)
  if settings.max_new_tokens == 1:
    return
  state, _ = programs.decode_chunk.prepare(params, state, array(bool, *shape))
  for bundles, width in ladder(settings, per_shard)[1:]:
    number = array(np.int32, bundles, width)
    state = programs.move_rows.prepare(
      state, number, number, array(np.int32, bundles)
    )
    alive = array(bool, bundles, width)
    state, _ = programs.decode_chunk.prepare(params, state, alive)


def ladder(
  settings: engine.Settings, num_prompts: int
) -> list[tuple[int, int]]:
  """Shapes that a shard's rows take; one where a single chunk ends them all."""
  shapes = compaction.ladder(num_prompts, settings.num_completions)
  is_one_chunk = settings.chunk_tokens >= settings.max_new_tokens - 1
  return shapes[:1] if is_one_chunk else shapes
