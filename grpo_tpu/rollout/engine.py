"""The programs of a rollout: read prompts, write some tokens, move rows.

What they hand on is a `State` on the devices; `rollout` decides which runs
next. Each row writes with its own key into its own place of the results, so
neither where it stands nor who stands beside it can change what it says.
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
from grpo_tpu.models.gemma3 import decoding
from grpo_tpu.rollout import sampling


@dataclasses.dataclass(frozen=True)
class Settings:
  """How completions are made; each set of these has programs of its own.

  Attributes:
    config: The model's sizes.
    num_completions: RowState per prompt (`C`).
    max_new_tokens: Tokens per row at most (`T`).
    min_new_tokens: Tokens before which no row stops by itself.
    chunk_tokens: Tokens that rows write before the host looks again.
    temperature: Logits are divided by it; 0 takes the likeliest token.
    top_k: Of `sampling.top_k_top_p`; 0 in training.
    top_p: Of `sampling.top_k_top_p`; 1 in training.
    dtype: Of the matrix products.
    attention: Of the prompts, from `gemma3.attention.choose_implementation`.
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
  """What is completed.

  Attributes:
    ids: Right-padded.
    length: Ids before the padding.
    images: As for `text.prompt_states`.
    index: Each prompt's place in the step's whole batch.
  """

  ids: Int[Array, "U P"]
  length: Int[Array, " U"]
  images: Array
  index: Int[Array, " U"]


class RowState(flax.struct.PyTreeNode):
  """What is known of the row that stands in each place.

  Attributes:
    number: Of the row within its shard; beyond all of them where none stands.
    ids: The token output last.
    length: Tokens output.
    live: Whether it goes on.
    stopped: Whether a stop token ended it.
    limit: Tokens that it may write.
    keys: What it draws with.
  """

  number: Int[Array, "U C"]
  ids: Int[Array, "U C"]
  length: Int[Array, "U C"]
  live: Bool[Array, "U C"]
  stopped: Bool[Array, "U C"]
  limit: Int[Array, "U C"]
  keys: Key[Array, "U C"]


class OutputBuffers(flax.struct.PyTreeNode):
  """The results, every row in the place that it had at the start."""

  ids: Int[Array, "U C T"]
  logps: Float[Array, "U C T"]
  length: Int[Array, "U C"]
  stopped: Bool[Array, "U C"]


class State(flax.struct.PyTreeNode):
  """A rollout between two programs.

  Attributes:
    t: Index of the token output last.
    rows: By their places.
    prompt_length: Of the prompt of each bundle of places.
    cache: Likewise.
    output: By the rows' numbers.
  """

  t: Int[Array, ""]
  rows: RowState
  prompt_length: Int[Array, " U"]
  cache: decoding.Cache
  output: OutputBuffers


class HostView(flax.struct.PyTreeNode):
  """The little that the host looks at: every place, on every process."""

  t: Int[Array, ""]
  live: Bool[Array, "U C"]
  length: Int[Array, "U C"]


@functools.cache
class Engine:
  """What runs a rollout with some settings on some mesh."""

  def __init__(self, settings: Settings, mesh: Mesh):
    """Compiles nothing yet."""
    self._settings, self._mesh = settings, mesh
    self.prefill = compile_cache.AotJit(jax.jit(self._prefill))
    # Tokens are written in place. Moved rows take less memory than the places
    # they leave, and so cannot take over any of it.
    self.decode_chunk = compile_cache.AotJit(
      jax.jit(self._decode_chunk, donate_argnums=1)
    )
    self.move_rows = compile_cache.AotJit(jax.jit(self._move_rows))
    self.results = compile_cache.AotJit(jax.jit(self._results))

  def abstract_state(self, *args: Any) -> State:
    """Shapes and places of what `prefill` makes of such arguments."""
    state, _ = jax.eval_shape(self._prefill, *args)
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(self._mesh, place)
      ),
      state,
      self._places(state),
    )

  def _prefill(
    self,
    params: dict,
    prompts: Prompts,
    limit: Int[Array, "U C"],
    step_key: Key[Array, ""],
  ) -> tuple[State, HostView]:
    """Reads the prompts, and writes the first token of every row."""
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
    number = jnp.arange(limit.size, dtype=jnp.int32) % (limit.size // shards)
    rows = RowState(
      number=number.reshape(shape),
      ids=jnp.full(shape, GEMMA3.pad, jnp.int32),
      length=jnp.zeros(shape, jnp.int32),
      live=jnp.ones(shape, bool),
      stopped=jnp.zeros(shape, bool),
      limit=limit,
      keys=keys,
    )
    t = jnp.zeros((), jnp.int32)
    x = jnp.broadcast_to(x[:, None], (*shape, x.shape[-1]))
    rows, logps = self._extended(params, rows, x, t)
    own = (*shape, settings.max_new_tokens)
    output = OutputBuffers(
      ids=jnp.full(own, GEMMA3.pad, jnp.int32).at[:, :, 0].set(rows.ids),
      logps=jnp.zeros(own, jnp.float32).at[:, :, 0].set(logps),
      length=rows.length,
      stopped=rows.stopped,
    )
    return self._with_host_view(State(t, rows, prompts.length, cache, output))

  def _decode_chunk(
    self, params: dict, state: State, alive: Bool[Array, "U C"]
  ) -> tuple[State, HostView]:
    """Up to `chunk_tokens` more tokens of the rows that are `alive`."""
    settings, before = self._settings, state.t
    num_tokens = min(settings.chunk_tokens, settings.max_new_tokens - 1)
    rows = state.rows.replace(live=state.rows.live & alive)
    chunk = (*rows.ids.shape, num_tokens)

    def goes_on(carry):
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
      rows, new = self._extended(params, rows, x, t + 1)
      place = (0, 0, t - before)
      ids = jax.lax.dynamic_update_slice(ids, rows.ids[..., None], place)
      logps = jax.lax.dynamic_update_slice(logps, new[..., None], place)
      return t + 1, rows, cache, ids, logps

    empty = jnp.full(chunk, GEMMA3.pad, jnp.int32)
    t, rows, cache, ids, logps = jax.lax.while_loop(
      goes_on,
      step,
      (before, rows, state.cache, empty, jnp.zeros(chunk, jnp.float32)),
    )
    output = self._on_shards(
      _put, (state.output, rows, ids, logps), (before + 1,), sharding.BATCH
    )
    return self._with_host_view(
      state.replace(t=t, rows=rows, cache=cache, output=output)
    )

  def _extended(
    self,
    params: dict,
    rows: RowState,
    states: Float[Array, "U C D"],
    t: Int[Array, ""],
  ) -> tuple[RowState, Float[Array, "U C"]]:
    """Rows with token `t` of those that go on, and its log-probability."""
    settings = self._settings
    logits = logprobs.output_logits(
      states,
      params["embedder"]["input_embedding"],
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
    number: Int[Array, "U C"],
    rows: Int[Array, "U C"],
    bundles: Int[Array, " U"],
  ) -> State:
    """Rows, with what is cached of them, in the places of another grid.

    Args:
      state: Before.
      number: Of the row in each new place, beyond all where there is none.
      rows: Old places within a shard, as in `compaction.Move`.
      bundles: Old bundles within a shard, likewise.
    """
    places = self._places(state)

    def moved(state, number, rows, bundles):
      def of_bundles(layer):
        return layer[bundles]

      def of_rows(layer):
        return _flat(layer, 0)[rows]

      # A layer at a time: at once, what is gathered would lie there twice.
      cache = {
        name: jax.lax.map(of_bundles if "prompt" in name else of_rows, x)
        for name, x in vars(state.cache).items()
      }
      old = jax.tree.map(lambda x: _flat(x, 0)[rows], state.rows)
      is_there = number < state.output.length.size
      return State(
        t=state.t,
        rows=old.replace(number=number, live=old.live & is_there),
        prompt_length=state.prompt_length[bundles],
        cache=decoding.Cache(**cache),
        output=state.output,
      )

    batch = sharding.BATCH
    return jax.shard_map(
      moved,
      mesh=self._mesh,
      in_specs=(places, batch, batch, batch),
      out_specs=places,
      check_vma=False,
    )(state, number, rows, bundles)

  def _results(
    self, output: OutputBuffers, cut: Int[Array, "U C"]
  ) -> "Completions":
    """What was output, up to `cut` tokens where a row has more."""
    length = jnp.minimum(output.length, cut)
    t = jnp.arange(output.ids.shape[-1])[None, None]
    mask = t < length[..., None]
    return Completions(
      ids=jnp.where(mask, output.ids, GEMMA3.pad),
      mask=mask,
      logps=jnp.where(mask, output.logps, 0.0),
      stopped=output.stopped | (cut <= output.length),
    )

  def _on_shards(self, function, cut, whole, result):
    """A function of each data shard's own part."""
    return jax.shard_map(
      function,
      mesh=self._mesh,
      in_specs=(*[sharding.BATCH] * len(cut), *[P()] * len(whole)),
      out_specs=result,
      check_vma=False,
    )(*cut, *whole)

  def _with_host_view(self, state: State) -> tuple[State, HostView]:
    """A state where it belongs, and what the host is told of it."""
    state = jax.tree.map(
      lambda x, place: jax.lax.with_sharding_constraint(
        x, NamedSharding(self._mesh, place)
      ),
      state,
      self._places(state),
    )
    view = HostView(state.t, state.rows.live, state.rows.length)
    everywhere = sharding.replicated_sharding(self._mesh)
    return state, jax.lax.with_sharding_constraint(view, everywhere)

  def _places(self, state: State) -> Any:
    """Where each part of a state lies: by data, caches by their heads too."""
    num_kv_heads = self._settings.config.num_kv_heads

    def place(path, x):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if name.startswith("cache/"):
        cache = name.removeprefix("cache/")
        return sharding.cache_spec(self._mesh, cache, num_kv_heads)
      return sharding.BATCH if x.ndim else P()

    return jax.tree_util.tree_map_with_path(place, state)


class Completions(flax.struct.PyTreeNode):
  """What was sampled.

  Attributes:
    ids: Tokens up to and including the stop token; padding after.
    mask: True on sampled tokens, the stop token included.
    logps: Log-probability of each token as the sampler saw it; 0 on padding.
    stopped: Whether a stop token or string came before the length ran out.
  """

  ids: Int[Array, "U C T"]
  mask: Bool[Array, "U C T"]
  logps: Float[Array, "U C T"]
  stopped: Bool[Array, "U C"]


def _put(
  output: OutputBuffers, rows: RowState, ids, logps, first
) -> OutputBuffers:
  """A shard's results with the tokens from `first` on of rows by place."""
  number = rows.number.ravel()
  columns = first + jnp.arange(ids.shape[-1])

  def put(results, new, *columns):
    flat = _flat(results, 0)
    at = (number[:, None], *columns) if columns else number
    flat = flat.at[at].set(_flat(new, 0), mode="drop")
    return flat.reshape(results.shape)

  return OutputBuffers(
    ids=put(output.ids, ids, columns[None]),
    logps=put(output.logps, logps, columns[None]),
    length=put(output.length, rows.length),
    stopped=put(output.stopped, rows.stopped),
  )


def _flat(x: Array, axis: int) -> Array:
  """Bundles and their rows as one axis."""
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
