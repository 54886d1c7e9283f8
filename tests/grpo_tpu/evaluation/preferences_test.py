"""Preference accuracies of a policy whose log-probabilities are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import pipeline, records
from grpo_tpu.evaluation import preferences
from grpo_tpu.observability import writer as metrics
from grpo_tpu.rl import score
from tests.grpo_tpu import scripted

# Problems 0 to 4 with two or three labelled completions each.
COMPLETIONS = {
  0: (("<answer>3</answer>", 1.0), ("<answer>5</answer>", 0.0), ("3", 0.5)),
  1: (("<answer>4</answer>", 1.0), ("<answer>5</answer>", 0.0)),
  2: (("no", 0.0), ("<answer>1.5</answer>", 0.9), ("<answer>9</answer>", 0.2)),
  3: (("<answer>red</answer>", 0.4), ("<answer>red</answer>", 0.4)),
  4: (("<answer>blue</answer>", 0.1), ("<answer>red</answer>", 0.6)),
}


def completion_source(problem, rng):
  del rng
  given = COMPLETIONS[int(problem.pid.removeprefix("p"))]
  return tuple(records.LabelledCompletion(*each) for each in given)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return scripted.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def evaluated(tokenizer, monkeypatch):
  """Accuracies of policies with a known log-probability for each token id."""

  def score_batch(model, params, bundles, *, num_microbatches):
    del model, num_microbatches
    return params[bundles.completion_ids], None

  monkeypatch.setattr(score, "score_batch", score_batch)

  def scalars(params, reference, *, batch_size=5, rewards="labels"):
    run = scripted.make_run(tokenizer, {}, kind="preference")
    object.__setattr__(run.config.data, "preference_rewards", rewards)
    builder = scripted.make_builder(
      scripted.Source(range(5)),
      tokenizer,
      kind="preference",
      completion_source=completion_source,
      num_labelled=3,
    )
    batches = pipeline.EvalBatches(
      builder, num_problems=5, batch_size=batch_size
    )
    result = preferences.evaluate_preferences(
      run.collector, params, reference, batches
    )
    return {name: float(value) for name, value in result.items()}

  return scalars


def logps(seed):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(-1, 1, 512), jnp.float32)


def worked_by_hand(tokenizer, gain):
  """Loops over every two completions of one problem."""
  rows = []
  for each in COMPLETIONS.values():
    for chosen, high in each:
      for rejected, low in each:
        if high > low:
          sums, means = [], []
          for text in (chosen, rejected):
            ids = [*tokenizer.encode(text), 106]
            sums.append(gain[ids].sum())
            means.append(gain[ids].mean())
          rows.append((high - low, sums[0] - sums[1], means[0] - means[1]))
  return np.array(rows).T


def test_accuracies_and_margins_are_those_worked_by_hand(evaluated, tokenizer):
  params, reference = logps(0), logps(1)
  got = evaluated(params, reference)
  apart, sums, means = worked_by_hand(
    tokenizer, np.asarray(params - reference, np.float64)
  )
  assert len(apart) == 8
  assert got["eval/implicit_preference_margin"] == pytest.approx(
    sums.mean(), rel=1e-5
  )
  name = "eval/implicit_preference_accuracy"
  assert got[name] == pytest.approx((sums > 0).mean())
  assert got[f"{name}_per_token"] == pytest.approx((means > 0).mean())
  assert got["eval/preference_accuracy"] == 1.0
  edges = [0, 0.25, 0.5, 0.75, np.inf]
  labels = ["0.0_to_0.25", "0.25_to_0.5", "0.5_to_0.75", "0.75_and_more"]
  buckets = {}
  for label, low, high in zip(labels, edges, edges[1:], strict=False):
    inside = (np.float32(apart) >= low) & (np.float32(apart) < high)
    if inside.any():
      buckets[f"{name}/margin_{label}"] = (sums[inside] > 0).mean()
  assert len(buckets) == 3
  assert {
    k: v for k, v in got.items() if k.startswith(f"{name}/")
  } == pytest.approx(buckets)


def test_an_unchanged_policy_has_no_preference(evaluated):
  """For any lengths of the chosen and the rejected completions."""
  got = evaluated(logps(0), logps(0))
  assert got["eval/implicit_preference_accuracy"] == 0.5
  assert got["eval/implicit_preference_accuracy_per_token"] == 0.5
  assert got["eval/implicit_preference_margin"] == 0


def test_the_batch_size_changes_nothing(evaluated):
  wanted = evaluated(logps(0), logps(1))
  for batch_size in (1, 2, 8):
    got = evaluated(logps(0), logps(1), batch_size=batch_size)
    assert got == pytest.approx(wanted, rel=1e-5)


def test_reward_functions_may_contradict_the_labels(evaluated):
  """They agree with the labels of three of the eight pairs."""
  got = evaluated(logps(0), logps(1), rewards="functions")
  assert 0 < got["eval/preference_accuracy"] < 1


def test_names_are_declared(evaluated, tmp_path):
  with metrics.Writer(tmp_path, is_writer=False, resume_step=None) as writer:
    writer.write(1, evaluated(logps(0), logps(1)))
