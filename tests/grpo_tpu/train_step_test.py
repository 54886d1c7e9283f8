"""An update is the same however its batch is cut, and learns from what counts.

The optimizer is plain descent with a rate of 1, so that the change of the
parameters is the gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_tpu import objective, rollout, train_state, train_step

PROMPTS, NUM_COMPLETIONS, NUM_TOKENS = 4, 2, 6
TX = optax.sgd(1.0)
OBJECTIVES = {
  "dapo": dataclasses.replace(objective.PRESETS["dapo"], tis_cap=1.1),
  "grpo": dataclasses.replace(objective.PRESETS["grpo"], beta=0.1),
  "demonstrations": None,
}


def make_model(tiny, *, train_vision=True):
  return train_step.Model(
    config=tiny.config,
    dtype=jnp.float32,
    remat=True,
    temperature=0.7,
    chunk_size=10,
    train_vision=train_vision,
  )


@pytest.fixture(scope="module")
def model(tiny):
  return make_model(tiny)


@pytest.fixture(scope="module")
def sampled(tiny):
  """As the rollout draws them; without pictures, as for the text sizes."""
  prompts = tiny.prompts(PROMPTS, num_images=0)
  completions = rollout.rollout(
    tiny.params,
    *prompts,
    jnp.arange(PROMPTS),
    jax.random.key(3),
    config=tiny.config,
    num_completions=NUM_COMPLETIONS,
    max_new_tokens=NUM_TOKENS,
    temperature=0.7,
    dtype=jnp.float32,
  )
  return train_step.Bundles(
    *prompts,
    completion_ids=completions.ids,
    completion_mask=completions.mask,
    advantages=jax.random.normal(
      jax.random.key(4), (PROMPTS, NUM_COMPLETIONS)
    ),
    sampler_logps=completions.logps,
  )


@pytest.fixture(scope="module")
def bundles(sampled):
  """Off policy, far from sampler and reference, with ragged masks."""
  shape = sampled.completion_mask.shape
  old, ref, sampler = 0.2 * jax.random.normal(jax.random.key(5), (3, *shape))
  lengths = jnp.array([[6, 1], [3, 5], [0, 2], [4, 6]])
  return sampled.replace(
    completion_mask=jnp.arange(NUM_TOKENS)[None, None] < lengths[..., None],
    old_per_token_logps=sampled.sampler_logps + old,
    ref_per_token_logps=sampled.sampler_logps + ref,
    sampler_logps=sampled.sampler_logps + sampler,
  )


@pytest.fixture(scope="module")
def update(tiny, model):
  """`update(objective, parts, bundles)`: new parameters and metrics."""

  @functools.cache
  def compiled(name, num_microbatches):
    return train_step.make_train_step(
      model, TX, config=OBJECTIVES[name], num_microbatches=num_microbatches
    )

  def run(name, num_microbatches, bundles):
    state, metrics = compiled(name, num_microbatches)(
      new_state(tiny), bundles
    )
    return state.params, metrics

  return run


def new_state(tiny):
  params = jax.tree.map(jnp.copy, tiny.params)  # The update eats its state.
  return train_state.TrainState(
    step=jnp.zeros((), jnp.int32), params=params, opt_state=TX.init(params)
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


@pytest.mark.parametrize(
  ("name", "num_microbatches"),
  [("dapo", 2), ("dapo", 4), ("grpo", 2)],
)
def test_cutting_the_batch_changes_nothing(
  update, bundles, name, num_microbatches
):
  whole, whole_metrics = update(name, 1, bundles)
  parts, metrics = update(name, num_microbatches, bundles)
  assert_trees_close(parts, whole, atol=1e-5)
  assert_trees_close(metrics, whole_metrics, atol=1e-5)


def test_demonstrations_cost_their_mean_negative_logp(
  tiny, model, update, bundles
):
  """And descent along the gradient of that."""
  mask = bundles.completion_mask

  @jax.jit
  @jax.value_and_grad
  def nll(params):
    logps, _ = train_step.token_logps(model, params, bundles)
    return -jnp.mean(logps, where=mask)

  value, gradient = nll(tiny.params)  # Of the whole batch at once.
  params, metrics = update("demonstrations", 2, bundles)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["nll"], value, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-4
  )
  expected = jax.tree.map(jnp.subtract, tiny.params, gradient)
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


def test_a_batch_of_nothing_leaves_the_parameters_alone(tiny, update, bundles):
  nothing = bundles.replace(
    completion_mask=jnp.zeros_like(bundles.completion_mask)
  )
  params, metrics = update("dapo", 1, nothing)
  assert_trees_close(params, tiny.params, atol=0)
  assert metrics["loss"] == metrics["tokens"] == metrics["entropy"] == 0


def test_scores_are_the_logps_of_the_update(tiny, model, sampled):
  expected, _ = jax.jit(train_step.token_logps)(model, tiny.params, sampled)
  scores = train_step.score(model, tiny.params, sampled, num_microbatches=2)
  np.testing.assert_allclose(scores, expected, atol=1e-5)
  mask = np.asarray(sampled.completion_mask)
  np.testing.assert_allclose(
    np.asarray(scores)[mask], sampled.sampler_logps[mask], atol=1e-4
  )


def test_the_first_update_on_sampled_bundles_is_on_policy(
  tiny, model, update, sampled
):
  scores = train_step.score(model, tiny.params, sampled, num_microbatches=2)
  scored = sampled.replace(
    old_per_token_logps=scores, ref_per_token_logps=scores
  )
  params, metrics = update("grpo", 1, scored)
  np.testing.assert_allclose(metrics["ratio"], 1, rtol=1e-5)
  assert metrics["clip_fraction"] == 0
  assert metrics["kl"] < 1e-8
  assert metrics["sampler_logp_difference_mean"] < 1e-4
  implied = sampled.replace(old_per_token_logps=None, ref_per_token_logps=None)
  same, metrics = update("grpo", 1, implied)
  assert_trees_close(same, params, atol=1e-5)
  assert metrics["ratio"] == 1


def test_sampler_weights_are_the_odds_of_old_and_sampler_up_to_the_cap(
  update, bundles
):
  _, metrics = update("dapo", 1, bundles)
  mask = np.asarray(bundles.completion_mask)
  gap = np.asarray(bundles.old_per_token_logps - bundles.sampler_logps)[mask]
  expected = np.minimum(np.exp(gap), 1.1).mean()
  np.testing.assert_allclose(metrics["sampler_weight"], expected, rtol=1e-5)


def test_a_frozen_tower_neither_moves_nor_counts(tiny, sampled):
  """The rest moves as it does beside a tower that is trained."""
  ids, length, images = tiny.prompts(PROMPTS, num_images=1)
  bundles = sampled.replace(
    prompt_ids=ids, prompt_length=length, images=images, sampler_logps=None
  )

  def moved(train_vision):
    step = train_step.make_train_step(
      make_model(tiny, train_vision=train_vision),
      TX,
      config=OBJECTIVES["dapo"],
      num_microbatches=2,
    )
    state = new_state(tiny)
    after, metrics = step(state, bundles)
    assert state.params["final_norm"]["scale"].is_deleted()
    change = jax.tree.map(jnp.subtract, after.params, tiny.params)
    tower = change.pop("vision_encoder")
    return change, tower, metrics["grad_norm"]

  frozen, tower, norm = moved(train_vision=False)
  assert optax.tree.norm(tower) == 0
  np.testing.assert_allclose(norm, optax.tree.norm(frozen), rtol=1e-4)
  assert jnp.abs(frozen["embedder"]["mm_input_projection"]).max() > 0
  trained, tower, norm = moved(train_vision=True)
  assert_trees_close(frozen, trained, atol=1e-6)
  assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(tower))
  everything = optax.tree.norm((trained, tower))
  np.testing.assert_allclose(norm, everything, rtol=1e-4)
