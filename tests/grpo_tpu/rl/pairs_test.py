"""The loss of a reward model against a twin in NumPy, pair by pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.rl import pairs
from grpo_tpu.rl.settings import PairLossConfig

PLAIN = PairLossConfig(
  label_smoothing=0.0, centering=0.0, margin=0.0, ties=False
)
ALL = PairLossConfig(label_smoothing=0.2, centering=0.03, margin=0.7, ties=True)
CONFIGS = {
  "plain": PLAIN,
  "smoothing": dataclasses.replace(PLAIN, label_smoothing=0.2),
  "centering": dataclasses.replace(PLAIN, centering=0.03),
  "margin": dataclasses.replace(PLAIN, margin=0.7),
  "ties": dataclasses.replace(PLAIN, ties=True),
  "all": ALL,
}
# Graded, equal and missing labels; a lone completion; none at all.
NAN = np.nan
LABELS = np.array(
  [
    [1.0, 0.0, 0.5, 0.0],
    [2.0, 2.0, NAN, 2.0],
    [NAN, -1.0, 3.0, NAN],
    [NAN, NAN, 1.0, NAN],
    [NAN, NAN, NAN, NAN],
    [0.0, 1.0, 1.0, 0.25],
  ],
  np.float32,
)
SCORES = np.random.default_rng(0).normal(0, 2, LABELS.shape).astype(np.float32)


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def twin(scores, labels, config):
  """Loss, gradient and number of pairs, in fp64, pair by pair."""
  loss, gradient, count = 0.0, np.zeros(scores.shape), 0
  for u, row in enumerate(labels):
    for i, x in enumerate(row):
      for j, y in enumerate(row):
        is_tie = config.ties and x == y and i < j
        if not (x > y or is_tie):
          continue
        count += 1
        a, b = float(scores[u, i]), float(scores[u, j])
        target = 0.5 if is_tie else 1.0 - config.label_smoothing
        lead = a - b - config.margin * (float(x) - float(y))
        loss -= target * log_sigmoid(lead) + (1 - target) * log_sigmoid(-lead)
        loss += config.centering * (a + b) ** 2
        slope = 1.0 / (1.0 + np.exp(-lead)) - target
        pull = 2 * config.centering * (a + b)
        gradient[u, i] += slope + pull
        gradient[u, j] += pull - slope
  return loss, gradient, count


def value_and_grad(scores, labels, config):
  def loss(scores):
    return pairs.pair_loss(scores, labels, config=config)

  return jax.jit(jax.value_and_grad(loss))(jnp.asarray(scores))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradient_equal_those_of_the_twin(config):
  loss, gradient, count = twin(SCORES, LABELS, config)
  got, got_gradient = value_and_grad(SCORES, LABELS, config)
  np.testing.assert_allclose(got / count, loss / count, rtol=0, atol=1e-6)
  np.testing.assert_allclose(
    got_gradient / count, gradient / count, rtol=0, atol=1e-6
  )
  assert pairs.find_pairs(LABELS, ties=config.ties).sum() == count


def test_equal_scores_cost_log_2():
  labels = np.array([[1.0, 0.0]], np.float32)
  loss, _ = value_and_grad(np.zeros((1, 2), np.float32), labels, ALL)
  plain, _ = value_and_grad(np.zeros((1, 2), np.float32), labels, PLAIN)
  assert plain == np.log(np.float32(2))
  assert loss > plain  # A margin that equal scores do not have.


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_differences_have_a_finite_loss_and_gradient(size):
  """By hand: far behind, the loss is the distance, and its slope is 1."""
  scores = np.array([[size / 2, -size / 2]], np.float32)
  labels = np.array([[1.0, 0.0]], np.float32)
  loss, gradient = value_and_grad(scores, labels, PLAIN)
  assert loss == max(-size, 0.0)
  slope = 0.0 if size > 0 else 1.0
  np.testing.assert_array_equal(gradient, [[-slope, slope]])


def test_scores_of_missing_completions_say_nothing_whatever_they_are():
  broken = np.where(np.isnan(LABELS), np.inf, SCORES)
  want, got = (value_and_grad(x, LABELS, ALL) for x in (SCORES, broken))
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])
  assert not np.asarray(got[1])[np.isnan(LABELS)].any()


def test_the_order_of_completions_and_problems_changes_nothing():
  rng = np.random.default_rng(1)
  rows, columns = rng.permutation(6), rng.permutation(4)
  want, gradient = value_and_grad(SCORES, LABELS, ALL)
  moved = SCORES[rows][:, columns], LABELS[rows][:, columns]
  got, got_gradient = value_and_grad(*moved, ALL)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(
    got_gradient, gradient[rows][:, columns], atol=1e-6
  )


def test_a_tie_pulls_scores_together_and_two_labels_apart():
  scores = np.array([[1.0, -1.0]], np.float32)
  config = dataclasses.replace(PLAIN, ties=True)
  _, tie = value_and_grad(scores, np.ones((1, 2), np.float32), config)
  _, none = value_and_grad(scores, np.ones((1, 2), np.float32), PLAIN)
  assert tie[0, 0] > 0 > tie[0, 1] and not np.asarray(none).any()


def test_metrics_count_pairs_and_those_who_have_none():
  """By hand, of three problems: the second has equal labels, the third one."""
  labels = np.array([[2, 1, 0], [1, 1, NAN], [NAN, 3, NAN]], np.float32)
  scores = np.array([[3, 3, 1], [5, 5, 99], [99, 2, 99]], np.float32)
  got = pairs.metrics(scores, labels, ties=False)
  # 3 against 3 is half a win; the other two pairs are won by 2.
  present = [3, 3, 1, 5, 5, 2]
  assert jax.device_get(got) == pytest.approx(
    {
      "pairs": 3,
      "unpaired_completions": 3,
      "pairwise_accuracy": 2.5 / 3,
      "pairwise_margin": 4 / 3,
      "score_mean": np.mean(present),
      "score_std": np.std(present),
    }
  )
  tied = pairs.metrics(scores, labels, ties=True)
  assert (tied["pairs"], tied["unpaired_completions"]) == (4, 1)
  assert tied["pairwise_accuracy"] == got["pairwise_accuracy"]
