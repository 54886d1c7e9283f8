"""Rollouts against a loop without a cache, and against the trainer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.distributed import compile_cache, sharding
from grpo_tpu.models import image_features, logprobs
from grpo_tpu.models.gemma3 import text
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl import objective, score
from grpo_tpu.rl.settings import PRESETS
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rollout import compaction, engine, generate
from tests.grpo_tpu import conftest

pytestmark = pytest.mark.usefixtures("quick_compile")
KEY = jax.random.key(11)
GREEDY_SEED = 4
NUM_COMPLETIONS, NUM_TOKENS = 3, 12
PROMPTS = 4


def sampled(tiny, prompts, prompt_index, **settings):
  defaults = {"num_completions": NUM_COMPLETIONS, "max_new_tokens": NUM_TOKENS}
  completions, _ = tiny.sampled(
    prompts, prompt_index, KEY, **defaults | settings
  )
  return jax.device_get(completions)


def bundle_states(tiny, prompts, ids):
  return text.bundle_states(
    tiny.config, tiny.params, *prompts, ids, dtype=jnp.float32, remat="none"
  )


@pytest.fixture(scope="module")
def prompts(tiny):
  return tiny.prompts(PROMPTS)


@pytest.fixture(scope="module")
def completions(tiny, prompts):
  return sampled(tiny, prompts, np.arange(PROMPTS))


def slow_greedy(tiny, prompts):
  """The slow twin: reads prompt and completion again for every token."""
  embedding = tiny.params["embedder"]["input_embedding"]

  @jax.jit
  def likeliest(ids, t):
    state = bundle_states(tiny, prompts, ids)[:, 0, t]
    logits = logprobs.output_logits(state, embedding, temperature=1.0)
    return jnp.argmax(logits, axis=-1)

  ids = np.full((PROMPTS, 1, NUM_TOKENS), GEMMA3.pad, np.int32)
  stopped = np.zeros(PROMPTS, bool)
  for t in range(NUM_TOKENS):
    drawn = np.asarray(likeliest(ids, t))
    ids[~stopped, 0, t] = drawn[~stopped]
    stopped |= np.isin(drawn, [1, 106])
  return ids[:, 0], stopped


def test_greedy_equals_a_loop_without_a_cache(tiny):
  prompts = tiny.prompts(PROMPTS, seed=GREEDY_SEED)
  expected, stopped = slow_greedy(tiny, prompts)
  assert 0 < stopped.sum() < PROMPTS, "both endings must be seen"
  actual = sampled(
    tiny, prompts, np.arange(PROMPTS), num_completions=2, temperature=0.0
  )
  for g in range(2):
    np.testing.assert_array_equal(actual.ids[:, g], expected)
    np.testing.assert_array_equal(actual.stopped[:, g], stopped)


def test_a_row_ends_with_its_first_stop_token_or_is_truncated(completions):
  assert set(completions.stopped.ravel()) == {True, False}
  for ids, mask, logps, stopped in zip(
    completions.ids.reshape(-1, NUM_TOKENS),
    completions.mask.reshape(-1, NUM_TOKENS),
    completions.logps.reshape(-1, NUM_TOKENS),
    completions.stopped.ravel(),
    strict=True,
  ):
    stops = np.flatnonzero(np.isin(ids, [1, 106]))
    assert stopped == (len(stops) > 0)
    length = stops[0] + 1 if stopped else NUM_TOKENS
    np.testing.assert_array_equal(mask, np.arange(NUM_TOKENS) < length)
    assert (ids[length:] == GEMMA3.pad).all()
    assert (logps[length:] == 0).all()
    assert (logps[:length] < 0).all()


def trainer_logps(
  tiny, prompts, ids, temperature, banned_ids=(), params=None, min_new_tokens=0
):
  """Log-probabilities of sampled tokens, as an update computes them."""
  model = ForwardConfig(
    config=tiny.config,
    dtype=jnp.float32,
    remat="full",
    temperature=temperature,
    chunk_size=7,
    train_vision=True,
    banned_ids=banned_ids,
    min_new_tokens=min_new_tokens,
  )
  bundles = TrainBatch(
    *prompts,
    completion_ids=jnp.asarray(ids),
    completion_mask=jnp.asarray(ids > 0),
    sampler_logps=jnp.zeros(ids.shape),  # Scored as sampled.
  )
  logps, entropy = jax.jit(score.token_logps)(
    model, params or tiny.params, bundles
  )
  assert np.isfinite(entropy).all()
  return np.asarray(logps)


def with_and_without_images(tiny):
  """Prompts of mixed lengths; every other one holds no placeholder."""
  ids, length, images = tiny.prompts(PROMPTS)
  text_ids, text_length, _ = tiny.prompts(PROMPTS, num_images=0, seed=2)
  odd = np.arange(PROMPTS) % 2 == 1
  return (
    jnp.where(odd[:, None], text_ids, ids),
    jnp.where(odd, text_length, length),
    images,
  )


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_samplers_logps_are_the_trainers(tiny, temperature):
  """Text rows among rows with images; the first ratio is therefore 1."""
  prompts = with_and_without_images(tiny)
  completions = sampled(
    tiny, prompts, np.arange(PROMPTS), temperature=temperature
  )
  logps = trainer_logps(tiny, prompts, completions.ids, temperature)
  mask = completions.mask
  np.testing.assert_allclose(
    completions.logps[mask], logps[mask], atol=1e-4, rtol=0
  )
  rows = (-1, NUM_TOKENS)
  _, metrics = objective.policy_loss(
    jnp.asarray(logps.reshape(rows)),
    jnp.asarray(completions.logps.reshape(rows)),
    None,
    jnp.linspace(-1.0, 1.0, PROMPTS * NUM_COMPLETIONS),
    jnp.asarray(mask.reshape(rows)),
    config=PRESETS["dapo"],
  )
  assert metrics["ratio"] == pytest.approx(1.0, abs=1e-4)
  assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_banned_token_is_never_drawn_and_has_no_probability(
  tiny, prompts, temperature
):
  """Long embeddings make banned tokens the likeliest or the unlikeliest."""
  banned = (109, 110)
  embedding = tiny.params["embedder"]["input_embedding"]
  rigged = tiny.params | {
    "embedder": tiny.params["embedder"]
    | {"input_embedding": embedding.at[jnp.array(banned)].multiply(20.0)}
  }
  draw = functools.partial(
    sampled,
    tiny,
    prompts,
    np.arange(PROMPTS),
    temperature=temperature,
    params=rigged,
  )
  assert np.isin(draw().ids, banned).mean() > 0.2
  completions = draw(banned_ids=banned)
  assert not np.isin(completions.ids, banned).any()
  logps = trainer_logps(
    tiny, prompts, completions.ids, temperature or 1.0, banned, rigged
  )
  mask = completions.mask
  np.testing.assert_allclose(
    completions.logps[mask], logps[mask], atol=1e-4, rtol=0
  )


def test_rows_of_a_group_differ(completions):
  for group in completions.ids:
    assert len(np.unique(group, axis=0)) > 1


def test_what_a_row_samples_does_not_depend_on_its_batch(
  tiny, prompts, completions
):
  """With other prompts in another order, and with fewer prompts and rows."""
  ids = completions.ids
  others = tiny.prompts(PROMPTS, seed=5)
  mixed = jax.tree.map(
    lambda ours, other: jnp.stack([other[0], ours[2], other[1], ours[0]]),
    prompts,
    others,
  )
  actual = sampled(tiny, mixed, [9, 2, 7, 0])
  np.testing.assert_array_equal(actual.ids[[1, 3]], ids[[2, 0]])
  part = jax.tree.map(lambda x: x[1:3], prompts)
  actual = sampled(tiny, part, [1, 2], num_completions=2)
  np.testing.assert_array_equal(actual.ids, ids[1:3, :2])


def test_the_index_in_the_step_decides_the_draw(tiny, prompts, completions):
  elsewhere = sampled(tiny, prompts, np.arange(PROMPTS) + PROMPTS)
  assert (elsewhere.ids != completions.ids).any(axis=(1, 2)).all()


# On any mesh of up to four data shards, each soon has one row that goes on.
LIMITS = np.array([[1, 4, 12], [12, 2, 3], [5, 1, 1], [2, 12, 1]])


def test_no_schedule_changes_a_row(tiny, prompts, monkeypatch):
  """For any chunk size, grid shapes and mesh, with moves or without."""
  monkeypatch.setattr(compaction, "_FEWEST_ROWS", 1)
  halves = compaction.ladder
  run = functools.partial(
    tiny.sampled,
    prompts,
    np.arange(PROMPTS),
    KEY,
    num_completions=NUM_COMPLETIONS,
    max_new_tokens=NUM_TOKENS,
    row_limits=LIMITS,
  )
  completions, report = run()
  assert report.moves == 0
  completions = jax.device_get(completions)
  for chunk_tokens, shape, ladder in (
    (1, (1, 1, 1), halves),
    (3, (1, 1, 1), halves),
    (2, (2, 2, 1), halves),
    (2, (1, 2, 2), halves),
    # Prompts with many rows left are in several bundles, and stay so.
    (1, (1, 1, 1), lambda *_: [(4, 3), (11, 1), (2, 2), (3, 1)]),
    (2, (1, 2, 1), lambda *_: [(2, 3), (3, 2), (5, 1), (1, 2), (1, 1)]),
  ):
    monkeypatch.setattr(compaction, "ladder", ladder)
    other, report = run(
      chunk_tokens=chunk_tokens, mesh=conftest.mesh_of(*shape)
    )
    assert report.moves > 0
    other = jax.device_get(other)
    for name in ("ids", "mask", "stopped"):
      np.testing.assert_array_equal(
        getattr(other, name), getattr(completions, name)
      )
    np.testing.assert_allclose(
      other.logps, completions.logps, atol=1e-5, rtol=0
    )


def test_cached_features_give_the_same_rows_as_pixels(
  tiny, prompts, completions
):
  """Encoded in this step, or cached in an earlier one."""
  ids, length, images = prompts
  encoder = image_features.ImageEncoder(
    tiny.config.vision,
    conftest.mesh_of(),
    dtype=jnp.dtype(jnp.float32),
    per_shard=1,
    cache_bytes=2**20,
  )
  for num_encoded in (PROMPTS, 0):
    features = encoder.features(
      tiny.params, np.asarray(images), np.ones(PROMPTS, int)
    )
    assert encoder.num_encoded == num_encoded
    seen = sampled(tiny, (ids, length, features), np.arange(PROMPTS))
    np.testing.assert_array_equal(seen.ids, completions.ids)
    np.testing.assert_array_equal(seen.stopped, completions.stopped)


def test_rows_stop_at_their_limits_and_dead_ones_are_left_behind(tiny, prompts):
  """A long tail: every count of the report, by hand."""
  limits = np.ones((PROMPTS, NUM_COMPLETIONS), int)
  limits[0] = NUM_TOKENS
  completions, report = tiny.sampled(
    prompts,
    np.arange(PROMPTS),
    KEY,
    num_completions=NUM_COMPLETIONS,
    max_new_tokens=NUM_TOKENS,
    min_new_tokens=NUM_TOKENS,
    chunk_tokens=4,
    row_limits=limits,
  )
  np.testing.assert_array_equal(completions.mask.sum(-1), limits)
  assert not completions.stopped.any()
  steps = NUM_TOKENS - 1
  assert report.tokens == limits.sum()
  assert report.decoded == NUM_COMPLETIONS * steps
  # 12 places shrink to 4 bundles of 1 row, the fewest that pay.
  assert report.row_steps == 4 * steps
  config = tiny.config
  weights = sum(x.nbytes for x in jax.tree.leaves(tiny.params["layers"]))
  weights += tiny.params["embedder"]["input_embedding"].nbytes
  own = sum(t + 5 * min(t, config.sliding_window) for t in range(1, NUM_TOKENS))
  prompt = 14 + 5 * (config.sliding_window - 1)
  token = 2 * config.num_kv_heads * config.head_dim * 4
  assert report.least_bytes == (
    weights * steps + token * (NUM_COMPLETIONS * own + prompt * steps)
  )


def test_no_row_ends_before_the_least_length_and_the_trainer_agrees(
  tiny, prompts
):
  """A stop token that cannot come is in neither's softmax."""
  least = 8
  completions = sampled(tiny, prompts, np.arange(PROMPTS), min_new_tokens=least)
  mask = completions.mask
  assert not np.isin(completions.ids[..., :least], [1, 106]).any()
  assert completions.stopped.any() and (mask.sum(-1) >= least).all()
  logps = trainer_logps(
    tiny, prompts, completions.ids, 0.7, min_new_tokens=least
  )
  np.testing.assert_allclose(
    completions.logps[mask], logps[mask], atol=1e-4, rtol=0
  )
  plain = trainer_logps(tiny, prompts, completions.ids, 0.7)
  assert np.abs(plain - logps)[..., :least].max() > 1e-3


@pytest.mark.parametrize("chunk_tokens", [1, 5, NUM_TOKENS])
def test_a_stop_string_ends_a_row_at_the_token_that_completes_it(
  tiny, prompts, completions, chunk_tokens
):
  """Ids read as hex digits; a string within one token, and across two."""

  def decode(ids):
    return "".join(f"{i:x}." for i in ids)

  middle = completions.ids[2, 1, 3:5]
  assert (middle > 0).all()
  strings = (decode([completions.ids[0, 0, 2]]), f"{middle[0]:x}.{middle[1]:x}")
  actual = sampled(
    tiny,
    prompts,
    np.arange(PROMPTS),
    chunk_tokens=chunk_tokens,
    stop_strings=generate.StopStrings(strings, decode),
  )
  num_cut = 0
  for row, written, ids, mask, stopped in zip(
    rows_of(completions.ids),
    rows_of(completions.mask),
    rows_of(actual.ids),
    rows_of(actual.mask),
    actual.stopped.ravel(),
    strict=True,
  ):
    length = written.sum()
    holding = [
      n
      for n in range(1, length + 1)
      if any(string in decode(row[:n].tolist()) for string in strings)
    ]
    end = holding[0] if holding else length
    num_cut += end < length
    np.testing.assert_array_equal(mask, np.arange(NUM_TOKENS) < end)
    np.testing.assert_array_equal(ids[:end], row[:end])
    assert not ids[end:].any()
    assert stopped == (bool(holding) or row[length - 1] in (1, 106))
  assert num_cut >= 2


def test_finished_prompts_are_emitted_once_and_complete(tiny, prompts):
  """Prompts are emitted as they end, with the same ids as in the results."""
  parts, polls, seen = [], [], []
  completions = sampled(
    tiny,
    prompts,
    np.arange(PROMPTS),
    # Few and long, so that some prompts are done before others.
    num_completions=1,
    max_new_tokens=40,
    chunk_tokens=1,
    on_finished=lambda *new: parts.append(new),
    on_tokens=seen.append,
    poll=lambda: polls.append(len(parts)),
  )
  assert len(parts) > 1 and len(polls) > 2
  assert sorted(p for part, _ in parts for p in part) == list(range(PROMPTS))
  for part, truncated in parts:
    for prompt, rows in part.items():
      assert truncated[prompt] == (~completions.stopped[prompt]).tolist()
      for ids, row, mask in zip(
        rows, completions.ids[prompt], completions.mask[prompt], strict=True
      ):
        assert ids == row[mask].tolist()
  # Those of every prompt, a token longer at each look until the row ends.
  assert len(seen) == len(polls)
  for prompt, mask in enumerate(completions.mask):
    kept = completions.ids[prompt][mask].tolist()
    assert [ids[prompt] for ids in seen] == [
      [kept[: look + 1]] for look in range(len(seen))
    ]


def test_a_poll_that_raises_abandons_the_rollout(tiny, prompts):
  calls = iter(range(10))

  def poll():
    if next(calls) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    sampled(tiny, prompts, np.arange(PROMPTS), chunk_tokens=1, poll=poll)
  assert next(calls) == 3


def test_functions_compiled_ahead_are_the_ones_that_run(
  tiny, prompts, monkeypatch
):
  """For every shape of the ladder, without another compilation."""
  monkeypatch.setattr(compaction, "_FEWEST_ROWS", 1)
  mesh = conftest.mesh_of(1, 2, 1)
  settings = engine.Settings(
    config=tiny.config,
    num_completions=NUM_COMPLETIONS,
    max_new_tokens=NUM_TOKENS,
    chunk_tokens=2,
    temperature=0.9,
    dtype=jnp.dtype(jnp.float32),
  )
  params = jax.tree.map(
    jax.device_put, tiny.params, sharding.param_shardings(mesh, tiny.params)
  )
  placed = engine.Prompts(
    *map(np.asarray, prompts), np.arange(PROMPTS, dtype=np.int32)
  )
  placed = sharding.device_put_batch(mesh, placed)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    (params, placed),
  )
  key = jax.eval_shape(lambda: KEY)
  generate.compile_ahead(*shapes, key, settings=settings, mesh=mesh)
  counter = compile_cache.CompileCounter()
  with jax.set_mesh(mesh):
    _, report = generate.sample_completions(
      params,
      placed,
      KEY,
      settings=settings,
      mesh=mesh,
      row_limits=LIMITS,
    )
  assert report.moves >= 2
  assert counter.scalars()["perf/compilations"] == 0


def rows_of(x):
  return x.reshape(-1, NUM_TOKENS)
