"""The compiled functions of a rollout: prefill, decode a chunk, move rows.

They hand on a `State` that lives on the devices; `generate` decides which one
runs next. Each row draws with its own key and writes to its own row of the
output, so neither its cell in the grid nor its neighbours change its tokens.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.distributed import compile_cache, sharding
from grpo_tpu.models import logprobs
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import decoding, embedding
from grpo_tpu.rollout import sampling


@dataclasses.dataclass(frozen=True)
class Settings:
  """Static choices of a rollout; each set compiles functions of its own.

  Attributes:
    config: Sizes of the network.
    num_completions: Completions per prompt (`C`).
    max_new_tokens: Most tokens of a completion (`T`).
    min_new_tokens: Number of tokens before which no stop token is drawn.
    chunk_tokens: Most tokens of a row between two looks of the host.
    temperature: Divisor of the logits; 0 takes the likeliest token.
    top_k: See `sampling.top_k_top_p`; 0 in training.
    top_p: See `sampling.top_k_top_p`; 1 in training.
    dtype: Type of the matrix products.
    attention: Implementation of attention over the prompts, from
      `gemma3.attention.choose_implementation`.
    banned_ids: Ids of probability 0; see `logprobs.output_logits`.
  """

  config: gemma3_config.ModelConfig
  num_completions: int
  max_new_tokens: int
  chunk_tokens: int
  temperature: float
  dtype: jnp.dtype
  min_new_tokens: int = 0
  top_k: int = 0
  top_p: float = 1.0
  attention: str = "einsum"
  banned_ids: tuple[int, ...] = ()


class Prompts(flax.struct.PyTreeNode):
  """The prompts of a rollout.

  Attributes:
    ids: Token ids, padded on the right.
    length: Number of tokens before the padding.
    images: Pixels or features, as in `text.prompt_states`.
    index: Index of each prompt in the batch of the whole step.
  """

  ids: Int[Array, "U P"]
  length: Int[Array, " U"]
  images: Array
  index: Int[Array, " U"]


class RowState(flax.struct.PyTreeNode):
  """The row in each cell of the grid.

  Attributes:
    index: Index of the row within its shard; past the end for an empty cell.
    ids: Newest token.
    length: Number of tokens so far.
    live: True until the row ends.
    stopped: True if a stop token ended the row.
    limit: Most tokens of the row; a row of 0 never lives.
    keys: Random key of the row.
  """

  index: Int[Array, "U C"]
  ids: Int[Array, "U C"]
  length: Int[Array, "U C"]
  live: Bool[Array, "U C"]
  stopped: Bool[Array, "U C"]
  limit: Int[Array, "U C"]
  keys: Key[Array, "U C"]


class OutputBuffers(flax.struct.PyTreeNode):
  """The tokens of every row, ordered by row index whatever the grid."""

  ids: Int[Array, "U C T"]
  logps: Float[Array, "U C T"]
  length: Int[Array, "U C"]
  stopped: Bool[Array, "U C"]


class State(flax.struct.PyTreeNode):
  """A rollout between two compiled functions.

  Attributes:
    t: Index of the newest token.
    rows: Rows by grid cell.
    prompt_length: Length of the prompt of each bundle in the grid.
    cache: Keys and values by grid cell.
    output: Results by row index.
  """

  t: Int[Array, ""]
  rows: RowState
  prompt_length: Int[Array, " U"]
  cache: decoding.Cache
  output: OutputBuffers


class HostView(flax.struct.PyTreeNode):
  """The small part of a state that every host reads, replicated."""

  t: Int[Array, ""]
  live: Bool[Array, "U C"]
  length: Int[Array, "U C"]


class Completions(flax.struct.PyTreeNode):
  """Sampled completions.

  Attributes:
    ids: Tokens up to and including the stop token; padding after it.
    mask: True on sampled tokens, the stop token included.
    logps: Log-probability of each token as the sampler computed it; 0 on
      padding.
    stopped: True if a stop token or a stop string ended the row, False if its
      length did.
  """

  ids: Int[Array, "U C T"]
  mask: Bool[Array, "U C T"]
  logps: Float[Array, "U C T"]
  stopped: Bool[Array, "U C"]


@functools.cache
class Engine:
  """The compiled functions of a rollout for some settings on some mesh."""

  def __init__(self, settings: Settings, mesh: Mesh):
    """Compiles nothing yet."""
    self._settings, self._mesh = settings, mesh
    self.prefill = compile_cache.AotJit(jax.jit(self._prefill))
    # Tokens are written in place. Moved rows need fewer cells than they leave,
    # so `move_rows` could not reuse the memory of a donated state.
    self.decode_chunk = compile_cache.AotJit(
      jax.jit(self._decode_chunk, donate_argnums=1)
    )
    self.move_rows = compile_cache.AotJit(jax.jit(self._move_rows))
    self.results = compile_cache.AotJit(jax.jit(self._results))

  def abstract_state(self, *args: Any) -> State:
    """Shapes and shardings of the state that `prefill` makes of `args`."""
    state, _ = jax.eval_shape(self._prefill, *args)
    return jax.tree.map(
      lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(self._mesh, spec)
      ),
      state,
      self._specs(state),
    )

  def _prefill(
    self,
    params: dict,
    prompts: Prompts,
    limit: Int[Array, "U C"],
    step_key: Key[Array, ""],
  ) -> tuple[State, HostView]:
    """Reads the prompts and samples the first token of every row."""
    settings = self._settings
    x, cache = decoding.prefill(
      settings.config,
      params,
      prompts.ids,
      prompts.length,
      prompts.images,
      num_completions=settings.num_completions,
      max_new_tokens=settings.max_new_tokens,
      dtype=settings.dtype,
      implementation=settings.attention,
    )
    shape = limit.shape
    keys = sampling.row_keys(step_key, prompts.index, shape[1])
    _, shards = sharding.data_shards(self._mesh)
    index = jnp.arange(limit.size, dtype=jnp.int32) % (limit.size // shards)
    rows = RowState(
      index=index.reshape(shape),
      ids=jnp.full(shape, GEMMA3.pad, jnp.int32),
      length=jnp.zeros(shape, jnp.int32),
      live=limit > 0,
      stopped=jnp.zeros(shape, bool),
      limit=limit,
      keys=keys,
    )
    t = jnp.zeros((), jnp.int32)
    x = jnp.broadcast_to(x[:, None], (*shape, x.shape[-1]))
    rows, logps = self._sample_token(params, rows, x, t)
    full = (*shape, settings.max_new_tokens)
    output = OutputBuffers(
      ids=jnp.full(full, GEMMA3.pad, jnp.int32).at[:, :, 0].set(rows.ids),
      logps=jnp.zeros(full, jnp.float32).at[:, :, 0].set(logps),
      length=rows.length,
      stopped=rows.stopped,
    )
    return self._with_host_view(State(t, rows, prompts.length, cache, output))

  def _decode_chunk(
    self, params: dict, state: State, alive: Bool[Array, "U C"]
  ) -> tuple[State, HostView]:
    """Samples up to `chunk_tokens` more tokens of the rows that are `alive`."""
    settings, before = self._settings, state.t
    num_tokens = min(settings.chunk_tokens, settings.max_new_tokens - 1)
    rows = state.rows.replace(live=state.rows.live & alive)
    chunk = (*rows.ids.shape, num_tokens)

    def any_live(carry):
      t, rows, *_ = carry
      return (t - before < num_tokens) & jnp.any(rows.live)

    def step(carry):
      t, rows, cache, ids, logps = carry
      x, cache = decoding.decode(
        settings.config,
        params,
        cache,
        state.prompt_length,
        rows.ids,
        t,
        dtype=settings.dtype,
      )
      rows, new = self._sample_token(params, rows, x, t + 1)
      start = (0, 0, t - before)
      ids = jax.lax.dynamic_update_slice(ids, rows.ids[..., None], start)
      logps = jax.lax.dynamic_update_slice(logps, new[..., None], start)
      return t + 1, rows, cache, ids, logps

    empty = jnp.full(chunk, GEMMA3.pad, jnp.int32)
    t, rows, cache, ids, logps = jax.lax.while_loop(
      any_live,
      step,
      (before, rows, state.cache, empty, jnp.zeros(chunk, jnp.float32)),
    )
    batch = sharding.BATCH
    output = jax.shard_map(
      _scatter_chunk,
      mesh=self._mesh,
      in_specs=(batch, batch, batch, batch, P()),
      out_specs=batch,
      check_vma=False,
    )(state.output, rows, ids, logps, before + 1)
    return self._with_host_view(
      state.replace(t=t, rows=rows, cache=cache, output=output)
    )

  def _sample_token(
    self,
    params: dict,
    rows: RowState,
    states: Float[Array, "U C D"],
    t: Int[Array, ""],
  ) -> tuple[RowState, Float[Array, "U C"]]:
    """Samples token `t` of the live rows; also gives its log-probability."""
    settings = self._settings
    logits = logprobs.output_logits(
      states,
      embedding.output_embedding(params),
      temperature=settings.temperature or 1.0,
      banned_ids=settings.banned_ids,
    )
    if settings.min_new_tokens:
      is_early = jnp.broadcast_to(
        t < settings.min_new_tokens, logits.shape[:-1]
      )
      logits = logprobs.mask_stop_tokens(logits, is_early)
    if settings.temperature:
      logits = sampling.top_k_top_p(
        logits, top_k=settings.top_k, top_p=settings.top_p
      )
      ids, logps = sampling.sample(logits, rows.keys, t)
    else:
      ids, logps = sampling.greedy(logits)
    ids = jnp.where(rows.live, ids.astype(jnp.int32), GEMMA3.pad)
    stops = rows.live & jnp.isin(ids, jnp.asarray(GEMMA3.stop_ids))
    logps = jnp.where(rows.live, logps, 0.0)
    rows = rows.replace(
      ids=ids,
      length=rows.length + rows.live,
      stopped=rows.stopped | stops,
      live=rows.live & ~stops & (t + 1 < rows.limit),
    )
    return rows, logps

  def _move_rows(
    self,
    state: State,
    index: Int[Array, "U C"],
    rows: Int[Array, "U C"],
    bundles: Int[Array, " U"],
  ) -> State:
    """Moves rows, with their caches, to the cells of another grid.

    Args:
      state: The rollout in the old grid.
      index: Row index of each new cell; past the end for an empty cell.
      rows: Old cell, within the shard, of each new cell; see `compaction.Move`.
      bundles: Old bundle, within the shard, of each new bundle.
    """
    specs = self._specs(state)

    def move_shard(state, index, rows, bundles):
      def take_bundles(layer):
        return layer[bundles]

      def take_rows(layer):
        return _flatten_cells(layer)[rows]

      # A layer at a time: gathered at once, all layers would exist twice.
      cache = {
        name: jax.lax.map(take_bundles if "prompt" in name else take_rows, x)
        for name, x in vars(state.cache).items()
      }
      old = jax.tree.map(lambda x: _flatten_cells(x)[rows], state.rows)
      is_occupied = index < state.output.length.size
      return State(
        t=state.t,
        rows=old.replace(index=index, live=old.live & is_occupied),
        prompt_length=state.prompt_length[bundles],
        cache=decoding.Cache(**cache),
        output=state.output,
      )

    batch = sharding.BATCH
    return jax.shard_map(
      move_shard,
      mesh=self._mesh,
      in_specs=(specs, batch, batch, batch),
      out_specs=specs,
      check_vma=False,
    )(state, index, rows, bundles)

  def _results(
    self, output: OutputBuffers, cut: Int[Array, "U C"]
  ) -> Completions:
    """The completions, each shortened to `cut` tokens if it has more."""
    length = jnp.minimum(output.length, cut)
    t = jnp.arange(output.ids.shape[-1])[None, None]
    mask = t < length[..., None]
    return Completions(
      ids=jnp.where(mask, output.ids, GEMMA3.pad),
      mask=mask,
      logps=jnp.where(mask, output.logps, 0.0),
      stopped=output.stopped | (cut <= output.length),
    )

  def _with_host_view(self, state: State) -> tuple[State, HostView]:
    """Constrains the state's shardings and adds the part that hosts read."""
    state = jax.tree.map(
      lambda x, spec: jax.lax.with_sharding_constraint(
        x, NamedSharding(self._mesh, spec)
      ),
      state,
      self._specs(state),
    )
    view = HostView(state.t, state.rows.live, state.rows.length)
    everywhere = sharding.replicated_sharding(self._mesh)
    return state, jax.lax.with_sharding_constraint(view, everywhere)

  def _specs(self, state: State) -> Any:
    """Partition specs of a state: over data shards, caches over heads too."""
    num_kv_heads = self._settings.config.num_kv_heads

    def spec(path, x):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if name.startswith("cache/"):
        cache = name.removeprefix("cache/")
        return sharding.cache_spec(self._mesh, cache, num_kv_heads)
      return sharding.BATCH if x.ndim else P()

    return jax.tree_util.tree_map_with_path(spec, state)


def _scatter_chunk(
  output: OutputBuffers, rows: RowState, ids, logps, first
) -> OutputBuffers:
  """Writes a chunk, whose first token has index `first`, to the output rows."""
  index = rows.index.ravel()
  columns = first + jnp.arange(ids.shape[-1])

  def scatter(results, new, *columns):
    flat = _flatten_cells(results)
    where = (index[:, None], *columns) if columns else index
    flat = flat.at[where].set(_flatten_cells(new), mode="drop")
    return flat.reshape(results.shape)

  return OutputBuffers(
    ids=scatter(output.ids, ids, columns[None]),
    logps=scatter(output.logps, logps, columns[None]),
    length=scatter(output.length, rows.length),
    stopped=scatter(output.stopped, rows.stopped),
  )


def _flatten_cells(x: Array) -> Array:
  """Merges the axes of bundles and of their rows."""
  return x.reshape(-1, *x.shape[2:])
