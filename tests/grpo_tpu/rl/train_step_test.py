"""An update is the same however its batch is cut, and learns from what counts.

The optimizer is plain descent with a rate of 1, so that the change of the
parameters is the gradient; it keeps the gradient too, not rounded against the
parameters. Laws of the batch are held with a bigram in place of the network,
which compiles at once; the rest with the network.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_tpu.models import logprobs
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl import (
  diagnostics,
  score,
  shaping,
  train_state,
  train_step,
)
from grpo_tpu.rl.settings import PRESETS, PairLossConfig
from grpo_tpu.rl.train_batch import TrainBatch

pytestmark = pytest.mark.usefixtures("quick_compile")
PROMPTS, NUM_COMPLETIONS, NUM_TOKENS = 4, 2, 6
TX = optax.sgd(1.0, momentum=0.0)
OBJECTIVES = {
  "dapo": dataclasses.replace(PRESETS["dapo"], tis_cap=1.1),
  "grpo": dataclasses.replace(PRESETS["grpo"], beta=0.1),
  "demonstrations": None,
  "pairs": PairLossConfig(
    label_smoothing=0.1, centering=0.01, margin=0.2, ties=True
  ),
}


def make_model(tiny, *, train_vision):
  return ForwardConfig(
    config=tiny.config,
    dtype=jnp.float32,
    remat="full",
    temperature=0.7,
    chunk_size=10,
    train_vision=train_vision,
  )


def bigram_logps(model, params, bundles):
  """As `token_logps`, of a model that sees one token and a constant tower."""
  embedding = params["embedder"]["input_embedding"]
  last = bundles.prompt_length[:, None] - 1
  first = jnp.take_along_axis(bundles.prompt_ids, last, axis=1)[:, None]
  ids = bundles.completion_ids
  first = jnp.broadcast_to(first, (*ids.shape[:2], 1))
  previous = jnp.concatenate([first, ids[..., :-1]], axis=-1)
  tower = params["vision_encoder"]["bias"][None, None, None]
  return logprobs.per_token_logps(
    embedding[previous] @ params["mix"] + tower,
    ids,
    embedding,
    temperature=model.temperature,
    chunk_size=model.chunk_size,
  )


@pytest.fixture(scope="module")
def bigram():
  rng = np.random.default_rng(0)
  return {
    "embedder": {
      "input_embedding": jnp.asarray(rng.normal(0, 1, (130, 8)), jnp.float32)
    },
    "mix": jnp.asarray(rng.normal(0, 0.3, (8, 8)), jnp.float32),
    "vision_encoder": {"bias": jnp.full(8, 0.1)},
  }


def make_bundles(tiny, params, seed, num_prompts, lengths):
  """Off policy, no pictures, with masks as long as `lengths` says."""
  rng = np.random.default_rng(seed)
  shape = (num_prompts, len(lengths[0]), NUM_TOKENS)
  bundles = TrainBatch(
    *tiny.prompts(num_prompts, num_images=0),
    completion_ids=jnp.asarray(rng.integers(0, 130, shape), jnp.int32),
    completion_mask=jnp.asarray(np.arange(NUM_TOKENS) < lengths[..., None]),
    advantages=jnp.asarray(rng.normal(0, 1, shape[:2]), jnp.float32),
  )
  logps, _ = bigram_logps(make_model(tiny, train_vision=True), params, bundles)

  def near():
    return logps + 0.2 * rng.normal(0, 1, shape).astype(np.float32)

  return bundles.replace(
    old_per_token_logps=near(),
    ref_per_token_logps=near(),
    sampler_logps=near(),
  )


@pytest.fixture(scope="module")
def bundles(tiny, bigram):
  """Masks are ragged and leave a row empty."""
  lengths = np.array([[6, 1], [3, 5], [0, 2], [4, 6]])
  return make_bundles(tiny, bigram, 1, PROMPTS, lengths)


@pytest.fixture(scope="module")
def groups(tiny, bigram):
  """Twelve groups of three with everything that bundles can hold."""
  rng = np.random.default_rng(4)
  bundles = make_bundles(tiny, bigram, 5, 12, rng.integers(0, 7, (12, 3)))
  counted = jnp.arange(12) % 5 != 0
  return bundles.replace(
    completion_mask=bundles.completion_mask & counted[:, None, None],
    token_weights=jnp.asarray(rng.uniform(0, 2, (12, 3, 6)), jnp.float32),
    counted=jnp.broadcast_to(counted[:, None], (12, 3)),
    preferred=jnp.asarray(rng.random((12, 3, 3)) < 0.3),
  )


@pytest.fixture(scope="module")
def step(tiny, bigram):
  """`step(objective, parts, bundles)`: the state after, and metrics."""

  @functools.cache
  def made(name, num_microbatches, train_vision, **settings):
    return train_step.make_train_step(
      make_model(tiny, train_vision=train_vision),
      TX,
      config=OBJECTIVES[name],
      num_microbatches=num_microbatches,
      **settings,
    )

  def run(name, num_microbatches, bundles, *, train_vision=True, **settings):
    state = new_state(bigram)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(score, "token_logps", bigram_logps)
      after, metrics = made(name, num_microbatches, train_vision, **settings)(
        state, bundles
      )
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params)), (
      "the update did not take the state's memory over"
    )
    return after, metrics

  return run


@pytest.fixture(scope="module")
def update(step):
  """As `step`, of the parameters alone."""

  def run(*args, **kwargs):
    after, metrics = step(*args, **kwargs)
    return after.params, metrics

  return run


@pytest.fixture(scope="module")
def gradient(step):
  """As `step`, of the gradient."""

  def run(*args, **kwargs):
    after, metrics = step(*args, **kwargs)
    return optax.tree.get(after.opt_state, "trace"), metrics

  return run


def new_state(params):
  params = jax.tree.map(jnp.copy, params)  # The update eats its state.
  return train_state.TrainState(
    step=jnp.zeros((), jnp.int32),
    position=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=TX.init(params),
  )


def assert_trees_close(actual, expected, atol):
  for (path, got), want in zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(
      got, want, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize("name", ["dapo", "grpo", "demonstrations"])
def test_two_hundred_random_cuts_give_one_gradient_and_metrics(
  gradient, groups, name
):
  expected, expected_metrics = jax.device_get(gradient(name, 1, groups))
  groups = jax.device_get(groups)
  rng = np.random.default_rng(0)
  for _ in range(200):
    order = rng.permutation(12)
    shuffled = jax.tree.map(lambda x, order=order: x[order], groups)
    num_microbatches = int(rng.choice([1, 3, 12]))
    actual, metrics = jax.device_get(gradient(name, num_microbatches, shuffled))
    error = jax.tree.map(np.subtract, actual, expected)
    assert tree_norm(error) < 1e-5 * tree_norm(expected)
    assert_trees_close(metrics, expected_metrics, atol=1e-6)


def tree_norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


def test_demonstrations_cost_their_mean_negative_logp(
  tiny, bigram, update, bundles
):
  """And descent along the gradient of that."""
  mask = bundles.completion_mask

  @jax.value_and_grad
  def nll(params):
    model = make_model(tiny, train_vision=True)
    logps, _ = bigram_logps(model, params, bundles)
    return -jnp.mean(logps, where=mask)

  value, gradient = nll(bigram)
  params, metrics = update("demonstrations", 2, bundles)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["nll"], value, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-4
  )
  expected = jax.tree.map(jnp.subtract, bigram, gradient)
  assert_trees_close(params, expected, atol=1e-5)
  assert metrics["tokens"] == mask.sum()


@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_what_stands_in_a_masked_row_changes_nothing(update, bundles, name):
  """One row of a bundle, and a bundle with its prompt."""
  mask = bundles.completion_mask.at[0, 1].set(False).at[3].set(False)
  bundles = bundles.replace(completion_mask=mask)
  expected, expected_metrics = update(name, 1, bundles)
  rows = ~mask.any(axis=-1)
  garbage = bundles.replace(
    prompt_ids=bundles.prompt_ids.at[3].set(111),
    prompt_length=bundles.prompt_length.at[3].set(1),
    completion_ids=jnp.where(rows[..., None], 112, bundles.completion_ids),
    advantages=jnp.where(rows, 1e3, bundles.advantages),
    old_per_token_logps=jnp.where(mask, bundles.old_per_token_logps, jnp.nan),
    ref_per_token_logps=jnp.where(mask, bundles.ref_per_token_logps, -jnp.inf),
    sampler_logps=jnp.where(mask, bundles.sampler_logps, jnp.nan),
  )
  actual, metrics = update(name, 1, garbage)
  assert_trees_close(actual, expected, atol=1e-6)
  assert_trees_close(metrics, expected_metrics, atol=1e-6)


def test_a_batch_of_nothing_leaves_the_parameters_alone(
  bigram, update, bundles
):
  nothing = bundles.replace(
    completion_mask=jnp.zeros_like(bundles.completion_mask)
  )
  params, metrics = update("dapo", 1, nothing)
  assert_trees_close(params, bigram, atol=0)
  assert metrics["loss"] == metrics["tokens"] == metrics["entropy"] == 0


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_scores_come_back_in_the_order_of_the_bundles(
  tiny, bigram, bundles, monkeypatch, num_microbatches
):
  model = make_model(tiny, train_vision=True)
  monkeypatch.setattr(score, "token_logps", bigram_logps)
  scores = score.score_batch(
    model, bigram, bundles, num_microbatches=num_microbatches
  )
  expected = bigram_logps(model, bigram, bundles)
  assert_trees_close(scores, expected, atol=1e-6)


def test_bundles_not_counted_leave_the_batch_as_it_is_without_them(
  gradient, bundles
):
  """Under "grpo", which divides by the number of rows."""
  kept = np.array([0, 2])
  mask = bundles.completion_mask.at[np.array([1, 3])].set(False)
  counted = jnp.zeros(mask.shape[:2], bool).at[kept].set(True)
  bundles = bundles.replace(completion_mask=mask, counted=counted)
  actual, metrics = gradient("grpo", 2, bundles)
  without = jax.tree.map(lambda x: x[kept], bundles.replace(counted=None))
  expected, expected_metrics = gradient("grpo", 1, without)
  assert_trees_close(actual, expected, atol=1e-7)
  assert_trees_close(metrics, expected_metrics, atol=1e-6)


@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_tokens_of_no_weight_leave_the_gradient_of_the_kl(
  gradient, bundles, name
):
  weightless = bundles.replace(
    token_weights=jnp.zeros(bundles.completion_mask.shape)
  )
  indifferent = bundles.replace(advantages=jnp.zeros_like(bundles.advantages))
  actual, metrics = gradient(name, 2, weightless)
  expected, _ = gradient(name, 2, indifferent)
  assert_trees_close(actual, expected, atol=1e-7)
  beta = OBJECTIVES[name].beta
  assert (metrics["grad_norm"] > 0) == (beta > 0)


def test_the_entropy_bonus_descends_along_the_mean_entropy(
  tiny, bigram, gradient, bundles
):
  bonus = 0.3

  @jax.value_and_grad
  def entropy(params):
    model = make_model(tiny, train_vision=True)
    _, entropies = bigram_logps(model, params, bundles)
    return jnp.mean(entropies, where=bundles.completion_mask)

  value, expected = entropy(bigram)
  plain, plain_metrics = gradient("grpo", 2, bundles)
  actual, metrics = gradient("grpo", 2, bundles, entropy_bonus=bonus)
  np.testing.assert_allclose(metrics["entropy"], value, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["loss"], plain_metrics["loss"] - bonus * value, rtol=1e-5
  )
  added = jax.tree.map(jnp.subtract, actual, plain)
  expected = jax.tree.map(lambda x: -bonus * x, expected)
  assert_trees_close(added, expected, atol=1e-6)


def test_outliers_leave_the_loss_but_stay_rows_of_the_divisor(
  tiny, bigram, gradient, groups
):
  """As rows without a token do, for a loss that divides by the rows."""
  bounds = {"ratio_bounds": (0.9, 1.1), "off_policy_bound": 0.1}
  logps, _ = bigram_logps(make_model(tiny, train_vision=True), bigram, groups)
  mask = groups.completion_mask
  is_outlier = mask.any(-1) & shaping.is_outlier(
    *(logps, groups.old_per_token_logps, groups.sampler_logps),
    *(mask, groups.advantages),
    **bounds,
  )
  assert 4 < is_outlier.sum() < mask.any(-1).sum() - 4
  without = groups.replace(completion_mask=mask & ~is_outlier[..., None])
  expected, _ = gradient("grpo", 1, without)
  for num_microbatches in (1, 3):
    actual, metrics = gradient("grpo", num_microbatches, groups, **bounds)
    assert_trees_close(actual, expected, atol=1e-6)
    share = is_outlier.sum() / mask.any(-1).sum()
    np.testing.assert_allclose(metrics["outlier_fraction"], share, rtol=1e-6)


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_sampler_weights_are_the_odds_of_old_and_sampler_up_to_the_cap(
  update, bundles, correction
):
  """Of each token, or of a row's geometric mean for all of its tokens."""
  _, metrics = update("dapo", 1, bundles, sampler_correction=correction)
  mask = np.asarray(bundles.completion_mask)
  gap = np.asarray(bundles.old_per_token_logps - bundles.sampler_logps)
  if correction == "sequence":
    gap = gap.copy()
    for row in np.ndindex(gap.shape[:2]):
      gap[row] = gap[row][mask[row]].mean() if mask[row].any() else 0
  expected = np.minimum(np.exp(gap[mask]), 1.1).mean()
  np.testing.assert_allclose(metrics["sampler_weight"], expected, rtol=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("name", ["dapo", "demonstrations"])
def test_the_samplers_mismatch_is_measured_over_the_whole_batch(
  update, bundles, name, num_microbatches
):
  _, metrics = update(name, num_microbatches, bundles)
  mask = np.asarray(bundles.completion_mask)
  gap = np.asarray(bundles.old_per_token_logps - bundles.sampler_logps)[mask]
  for metric, expected in {
    "sampler_logp_difference_mean": np.abs(gap).mean(),
    "sampler_logp_difference_max": np.abs(gap).max(),
    "sampler_kl": (np.exp(gap) - 1 - gap).mean(),
  }.items():
    np.testing.assert_allclose(metrics[metric], expected, rtol=1e-4)


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_the_effective_sample_share_is_that_of_the_batchs_ratios(
  tiny, bigram, update, bundles, num_microbatches
):
  _, metrics = update("dapo", num_microbatches, bundles)
  logps, _ = bigram_logps(make_model(tiny, train_vision=True), bigram, bundles)
  ratio = jnp.exp(logps - bundles.old_per_token_logps)[bundles.completion_mask]
  expected = diagnostics.effective_sample_size(ratio) / ratio.size
  np.testing.assert_allclose(
    metrics["effective_sample_share"], expected, rtol=1e-5
  )
  assert "ratio_squared" not in metrics


@pytest.mark.parametrize("num_microbatches", [1, 3, 12])
def test_implicit_preference_is_that_of_a_loop_over_ordered_pairs(
  tiny, bigram, update, groups, num_microbatches
):
  _, metrics = update("demonstrations", num_microbatches, groups)
  logps, _ = bigram_logps(make_model(tiny, train_vision=True), bigram, groups)
  gained = np.asarray(logps - groups.ref_per_token_logps)
  gained = np.sum(gained, axis=-1, where=np.asarray(groups.completion_mask))
  margins = [
    gained[u, i] - gained[u, j]
    for u, i, j in np.ndindex(12, 3, 3)
    if groups.preferred[u, i, j]
  ]
  np.testing.assert_allclose(
    metrics["implicit_preference_margin"], np.mean(margins), rtol=1e-4
  )
  np.testing.assert_allclose(
    metrics["implicit_preference_accuracy"],
    np.mean([0.5 + 0.5 * np.sign(margin) for margin in margins]),
    rtol=1e-5,
  )


@pytest.fixture(scope="module")
def online(tiny):
  """Bundles with pictures, sampled and scored; the network's update."""
  prompts = tiny.prompts(PROMPTS)
  completions, _ = tiny.sampled(
    prompts,
    np.arange(PROMPTS),
    jax.random.key(3),
    num_completions=NUM_COMPLETIONS,
    max_new_tokens=NUM_TOKENS,
  )
  completions = jax.tree.map(jnp.asarray, jax.device_get(completions))
  advantages = np.random.default_rng(2).normal(0, 1, (PROMPTS, NUM_COMPLETIONS))
  bundles = TrainBatch(
    *prompts,
    completion_ids=completions.ids,
    completion_mask=completions.mask,
    advantages=jnp.asarray(advantages, jnp.float32),
    sampler_logps=completions.logps,
  )
  scores, _ = score.score_batch(
    make_model(tiny, train_vision=True),
    tiny.params,
    bundles,
    num_microbatches=2,
  )
  bundles = bundles.replace(
    old_per_token_logps=scores, ref_per_token_logps=scores
  )
  update = train_step.make_train_step(
    make_model(tiny, train_vision=True),
    TX,
    config=OBJECTIVES["grpo"],
    num_microbatches=2,
  )
  return bundles, *update(new_state(tiny.params), bundles)


def test_scores_are_the_samplers_logps(online):
  bundles, _, _ = online
  mask = np.asarray(bundles.completion_mask)
  np.testing.assert_allclose(
    np.asarray(bundles.old_per_token_logps)[mask],
    np.asarray(bundles.sampler_logps)[mask],
    atol=1e-4,
  )


def test_the_first_update_on_sampled_bundles_is_on_policy(online):
  _, _, metrics = online
  np.testing.assert_allclose(metrics["ratio"], 1, rtol=1e-5)
  assert metrics["clip_fraction"] == 0
  assert metrics["kl"] < 1e-8
  assert metrics["sampler_logp_difference_mean"] < 1e-4


def test_an_update_reaches_every_parameter_of_the_network(tiny, online):
  _, state, metrics = online
  change = jax.tree.map(
    lambda x, y: np.asarray(x) - np.asarray(y), state.params, tiny.params
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(change):
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
  norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(change)))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)


def test_no_old_or_reference_logps_mean_the_current_ones(
  tiny, bigram, update, bundles
):
  model = make_model(tiny, train_vision=True)
  logps, _ = bigram_logps(model, bigram, bundles)
  given = bundles.replace(old_per_token_logps=logps, ref_per_token_logps=logps)
  implied = bundles.replace(old_per_token_logps=None, ref_per_token_logps=None)
  expected, expected_metrics = update("dapo", 2, given)
  actual, metrics = update("dapo", 2, implied)
  assert_trees_close(actual, expected, atol=1e-5)
  assert_trees_close(metrics, expected_metrics, atol=1e-5)


def test_a_frozen_tower_neither_moves_nor_counts(bigram, update, bundles):
  """The rest moves as it does beside a tower that is trained."""

  def change(train_vision):
    params, metrics = update("dapo", 2, bundles, train_vision=train_vision)
    change = jax.tree.map(jnp.subtract, params, bigram)
    return change, change.pop("vision_encoder"), metrics["grad_norm"]

  frozen, tower, norm = change(train_vision=False)
  assert optax.tree.norm(tower) == 0
  np.testing.assert_allclose(norm, optax.tree.norm(frozen), rtol=1e-4)
  trained, tower, norm = change(train_vision=True)
  assert optax.tree.norm(tower) > 0
  assert_trees_close(frozen, trained, atol=1e-6)
  everything = optax.tree.norm((trained, tower))
  np.testing.assert_allclose(norm, everything, rtol=1e-4)


def test_far_off_the_effective_sample_share_stays_a_share(update, bundles):
  old = bundles.old_per_token_logps.at[0, 0, 0].add(-50.0)
  _, metrics = update("dapo", 1, bundles.replace(old_per_token_logps=old))
  share = metrics["effective_sample_share"]
  np.testing.assert_allclose(share, 1 / metrics["tokens"], rtol=1e-3)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
  bigram, step, bundles, value
):
  """Neither parameters nor the optimizer's state; the next update is whole."""
  before = new_state(bigram)
  advantages = bundles.advantages.at[1, 0].set(value)
  after, metrics = step("dapo", 2, bundles.replace(advantages=advantages))
  assert metrics["skipped_updates"] == 1
  assert not jnp.isfinite(metrics["grad_norm"])
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.params, after.opt_state),
    (before.params, before.opt_state),
  )
  after, metrics = step("dapo", 2, bundles)
  assert metrics["skipped_updates"] == 0
  moved = jax.tree.map(lambda x, y: (x != y).any(), after.params, before.params)
  assert any(jax.tree.leaves(moved))


@pytest.fixture(scope="module")
def labelled(tiny, bigram):
  """Twelve groups of three with graded, equal and missing labels."""
  rng = np.random.default_rng(6)
  bundles = make_bundles(tiny, bigram, 7, 12, rng.integers(1, 7, (12, 3)))
  labels = rng.integers(0, 3, (12, 3)).astype(np.float32)
  labels[rng.random((12, 3)) < 0.2] = np.nan
  return bundles.replace(labels=jnp.asarray(labels))


@pytest.fixture
def by_mean(monkeypatch):
  """Scores the mean of a completion's embeddings in place of the network."""

  def completion_scores(model, params, bundles):
    rows = params["embedder"]["input_embedding"][bundles.completion_ids]
    rows = jnp.where(bundles.completion_mask[..., None], rows, 0.0)
    return (rows.mean(axis=2) @ params["mix"]).sum(-1)

  monkeypatch.setattr(score, "completion_scores", completion_scores)


@pytest.mark.parametrize("num_microbatches", [2, 4, 6])
def test_a_reward_models_update_is_the_same_however_its_batch_is_cut(
  gradient, labelled, by_mean, num_microbatches
):
  want, metrics = gradient("pairs", 1, labelled)
  got, cut = gradient("pairs", num_microbatches, labelled)
  assert_trees_close(got, want, atol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(cut[name], value, rtol=1e-5, err_msg=name)


def test_a_reward_model_computes_no_logits(tiny, labelled):
  """No product with the vocabulary, forward or backward."""
  config = dataclasses.replace(tiny.config, has_score=True)
  forward = make_model(tiny, train_vision=False).replace(config=config)
  params = tiny.params | {"score": {"w": jnp.zeros((1, config.embed_dim))}}
  update = train_step.make_train_step(
    forward, TX, config=OBJECTIVES["pairs"], num_microbatches=2
  )
  lowered = update.lower(new_state(params), labelled).as_text()
  products = [x for x in lowered.splitlines() if "dot_general" in x]
  assert products
  assert not [x for x in products if f"{config.vocab_size}x" in x]
