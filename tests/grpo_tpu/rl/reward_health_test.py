"""What a reward goes with, against slow loops over the completions."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.distributed import sharding
from grpo_tpu.rl import reward_health

NAMES = (
  *("length_correlation", "repetition_correlation", "pair_accuracy"),
  *("mean_if_right", "mean_if_wrong"),
)


def slow_repetition(tokens):
  grams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def slow_correlation(first, second, cells):
  """Of the differences from the means of the cells."""
  pairs = [
    (first[cell] - first[cell].mean(), second[cell] - second[cell].mean())
    for cell in cells
  ]
  x, y = (np.concatenate(each) for each in zip(*pairs, strict=True))
  scale = np.sqrt((x**2).sum() * (y**2).sum())
  return (x * y).sum() / scale if scale > 1e-9 else 0.0


def slow_health(values, ids, mask, correct, known, valid):
  """Five metrics of one reward, in the order of NAMES."""
  lengths = mask.sum(-1).astype(float)
  repeated = np.zeros(lengths.shape)
  for i in np.ndindex(lengths.shape):
    repeated[i] = slow_repetition(ids[i][mask[i]].tolist())
  asked = valid & np.isfinite(values)
  right, wrong = asked & known & correct, asked & known & ~correct
  cells, wins = [], []
  for u in range(len(values)):
    for inside in (right, wrong, asked & ~known):
      if inside[u].any():
        cells.append((u, np.flatnonzero(inside[u])))
    better = np.flatnonzero(right[u]), np.flatnonzero(wrong[u])
    for i, j in itertools.product(*better):
      wins.append(0.5 * (1 + np.sign(values[u, i] - values[u, j])))
  values = values.astype(float)
  return (
    slow_correlation(values, lengths, cells),
    slow_correlation(values, repeated, cells),
    *(x.mean() if len(x) else np.nan for x in map(np.array, [wins])),
    *(values[x].mean() if x.any() else np.nan for x in (right, wrong)),
  )


def draw(seed, shape=(5, 4, 9), *, levels=4):
  """Rewards with ties and gaps, of completions of any length, 0 too."""
  rng = np.random.default_rng(seed)
  values = rng.integers(0, levels, shape[:2]).astype(np.float32) / 3
  values[rng.random(shape[:2]) < 0.1] = np.nan
  ids = rng.integers(0, 2, shape).astype(np.int32)
  mask = (
    np.arange(shape[2]) < rng.integers(0, shape[2] + 1, shape[:2])[..., None]
  )
  flags = [rng.random(shape[:2]) < share for share in (0.5, 0.8, 0.9)]
  return values, ids, mask, *flags


@pytest.mark.parametrize(
  "case",
  [
    *(draw(seed) for seed in range(4)),
    draw(4, (6, 1, 9)),  # Groups of one.
    draw(5, (3, 4, 2)),  # No 3-gram.
    draw(6, levels=1),  # A constant reward.
  ],
)
def test_statistics_equal_slow_loops(case):
  values, *rest = case
  found = reward_health.reward_health({"own": jnp.array(values)}, *rest)
  wanted = slow_health(values, *rest)
  for name, number in zip(NAMES, wanted, strict=True):
    actual = found[f"reward/own_{name}"]
    np.testing.assert_allclose(actual, number, atol=2e-6, err_msg=name)


def test_repetition_equals_a_count_of_distinct_ngrams():
  _, ids, mask, *_, valid = draw(9, (4, 5, 30))
  ids *= 262_143  # A token's number may be large.
  found = reward_health.repetition(jnp.array(ids), jnp.array(mask))
  for i in np.ndindex(found.shape):
    wanted = slow_repetition(ids[i][mask[i]].tolist())
    np.testing.assert_allclose(found[i], wanted, atol=1e-6)
  # a b a b a b: 2 of the 4 are repeated.
  tokens = jnp.array([[[1, 2, 1, 2, 1, 2, 7, 7]]])
  assert reward_health.repetition(tokens, tokens < 7) == 0.5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_correlation_ignores_scale_and_what_differs_between_groups(scale):
  lengths = jnp.array([[1, 2, 3], [4, 5, 6]])
  cells = jnp.ones((1, 2, 3), bool)
  offset = jnp.array([[100.0], [-100.0]])
  rewards = (lengths + offset) * scale
  found = reward_health.correlation(rewards, lengths, cells)
  np.testing.assert_allclose(found, 1, rtol=1e-4)
  assert reward_health.correlation(offset * lengths**0, lengths, cells) == 0


def test_length_that_only_right_completions_have_is_no_correlation():
  """A reward for right answers does not pay for their length."""
  correct = np.array([[True, True, False, False]])
  mask = (
    np.arange(6) < np.where(correct, [[5, 6, 1, 2]], [[5, 6, 1, 2]])[..., None]
  )
  ids, known = np.zeros((1, 4, 6), int), np.ones((1, 4), bool)
  rewards = {"own": jnp.float32(correct)}
  found = reward_health.reward_health(rewards, ids, mask, correct, known, known)
  assert found["reward/own_length_correlation"] == 0
  assert found["reward/own_pair_accuracy"] == 1


def test_novel_tokens_are_those_that_the_first_steps_did_not_have():
  mesh = sharding.make_mesh(replica=1, fsdp=8, tensor=1)
  first = jnp.array([[[1, 2, 3], [4, 4, 9]]])
  counts = jnp.array([[[True, True, False], [True, False, False]]])
  later = jnp.array([[[1, 3, 4], [9, 0, 0]]])
  all_but_zeros = later > 0
  tokens = reward_health.FirstTokens(10, mesh)
  for _ in range(reward_health.FIRST_STEPS):
    resumed = reward_health.FirstTokens(10, mesh)
    resumed.restore(json.loads(json.dumps(tokens.state())))
    tokens = resumed
    assert tokens.novelty(first, counts) == {}
  for each in (tokens, tokens):  # What is new stays new.
    found = each.novelty(later, all_but_zeros)
    assert found == {"rollout/novel_token_share": 0.5}
  with pytest.raises(ValueError, match="first tokens in the checkpoint"):
    tokens.restore({"steps": 1})
