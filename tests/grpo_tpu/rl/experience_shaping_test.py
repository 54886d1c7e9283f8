"""What filters and weights make of scripted completions."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from grpo_tpu.observability import writer as metrics
from grpo_tpu.rl import reward_health
from tests.grpo_tpu import scripted
from tests.grpo_tpu.scripted import GROUPS, MAX_NEW_TOKENS, UNREADABLE

# By scripted.GROUPS: these have right and wrong completions, these have not.
MIXED, UNANIMOUS = (0, 1, 4, 5), (2, 3)
IS_HEALTH = re.compile(
  "rollout/(repetition|novel.*)|reward/.*_(correlation|pair_accuracy|if_.*)"
).fullmatch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return scripted.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run_of(tokenizer):
  return functools.partial(scripted.make_run, tokenizer)


@pytest.fixture
def found(run_of, tokenizer):
  """What a step makes of batches of the problems at these indices."""

  def result(*indices, replies=GROUPS, num_devices=1, position=0, **shaping):
    batches = [
      batch
      for each in indices
      for batch in scripted.batches_of(
        tokenizer, batch_size=len(each), indices=each
      )
    ]
    run = run_of(replies, num_devices=num_devices, shaping=shaping)
    return run.collect(batches, jax.random.key(0), position=position)

  return result


def arrays(bundles):
  """As NumPy, by name, those that are there."""
  return {
    name: np.asarray(value)
    for name, value in vars(bundles).items()
    if value is not None
  }


def assert_same_bundles(got, wanted):
  got, wanted = arrays(got), arrays(wanted)
  assert got.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_resampling_puts_groups_that_teach_in_the_place_of_the_others(found):
  resample = {"zero_variance": "resample", "max_batches": 5}
  step = found([2, 0, 3, 1], [3, 4, 2, 5], [0, 0, 0, 0], **resample)
  assert step.num_batches == 2
  assert step.metrics["rollout/batches"] == 2
  wanted = found([0, 1, 4, 5], zero_variance="drop")
  assert_same_bundles(step.batch, wanted.batch)


def test_a_step_whose_groups_all_teach_samples_no_more(found):
  step = found(MIXED, MIXED, zero_variance="resample", max_batches=3)
  assert step.num_batches == 1
  assert_same_bundles(
    step.batch, found(MIXED).batch.replace(counted=step.batch.counted)
  )
  assert np.asarray(step.batch.counted).all()


def test_what_the_budget_leaves_unanimous_is_no_part_of_the_batch(found):
  step = found([2, 0], [3, 2], [1, 1], zero_variance="resample", max_batches=2)
  assert step.num_batches == 2
  counted = np.asarray(step.batch.counted)
  np.testing.assert_array_equal(counted, [[True] * 4, [False] * 4])
  mask = np.asarray(step.batch.completion_mask)
  assert mask[0].any(axis=-1).all() and not mask[1].any()


def test_devices_change_nothing_of_what_is_kept(found):
  indices = ([2, 0, 3, 1, 2, 3, 0, 2], [3, 4, 2, 5, 1, 1, 0, 3])
  resample = {"zero_variance": "resample", "max_batches": 2}
  assert_same_bundles(
    found(*indices, num_devices=8, **resample).batch,
    found(*indices, **resample).batch,
  )


def test_metrics_of_a_resampled_step_are_of_all_it_sampled(found):
  indices = ([2, 0, 3, 2], [3, 4, 2, 5], [3, 3, 3, UNREADABLE])
  step = found(*indices, zero_variance="resample", max_batches=3)
  assert step.num_batches == 3
  apart = [found(each).metrics for each in indices]
  for name in ("rollout/accuracy", "rollout/mixed_fraction", "rollout/reward"):
    mean = np.mean([float(metrics[name]) for metrics in apart])
    assert float(step.metrics[name]) == pytest.approx(mean, rel=1e-6), name
  assert step.metrics["data/skipped"] == 1


def test_prompts_of_merged_batches_are_padded_to_the_longer(found, monkeypatch):
  wanted = found([0, 1], zero_variance="drop").batch
  batches_of = scripted.batches_of

  def widening(tokenizer, *, batch_size, indices):
    batches = batches_of(tokenizer, batch_size=batch_size, indices=indices)
    for batch in batches:
      object.__setattr__(
        batch, "prompt_ids", np.pad(batch.prompt_ids, ((0, 0), (0, indices[0])))
      )
      yield batch

  monkeypatch.setattr(scripted, "batches_of", widening)
  # Pads by 2, then by 1.
  step = found([2, 0], [1, 3], zero_variance="resample", max_batches=2)
  padded = np.pad(np.asarray(wanted.prompt_ids), ((0, 0), (0, 2)))
  assert_same_bundles(step.batch, wanted.replace(prompt_ids=padded))


def test_images_of_merged_batches_are_padded_to_the_most(found, monkeypatch):
  wanted = found([0, 1], zero_variance="drop").batch
  batches_of = scripted.batches_of

  def widening(tokenizer, *, batch_size, indices):
    batches = batches_of(tokenizer, batch_size=batch_size, indices=indices)
    for batch in batches:
      images = batch.images.repeat(1 + indices[0], axis=1)
      yield dataclasses.replace(batch, images=images)

  monkeypatch.setattr(scripted, "batches_of", widening)
  # Three of each, then two; groups 0 and 1 are the ones that teach.
  step = found([2, 0], [1, 3], zero_variance="resample", max_batches=2)
  images = np.asarray(wanted.images).repeat(3, axis=1)
  images[1, 2] = 0
  assert_same_bundles(step.batch, wanted.replace(images=images))


def test_every_batch_has_a_key_of_its_own_by_its_number(run_of, found):
  keys = []
  sample = scripted.ScriptedSampler.sample

  def noting(self, params, prompts, key, **kwargs):
    keys.append(jax.random.key_data(key))
    return sample(self, params, prompts, key, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scripted.ScriptedSampler, "sample", noting)
    resample = {"zero_variance": "resample", "max_batches": 2}
    found([2, 3], [3, 2], position=6, **resample)
  wanted = [
    jax.random.key_data(jax.random.fold_in(jax.random.key(0), number))
    for number in (7, 8)
  ]
  np.testing.assert_array_equal(keys, wanted)


def test_dropped_groups_leave_the_others_as_they_were(found):
  kept, dropped = (
    found([*MIXED, *UNANIMOUS]),
    found([*MIXED, *UNANIMOUS], zero_variance="drop"),
  )
  mask = np.asarray(dropped.batch.completion_mask)
  wanted = np.array(kept.batch.completion_mask)
  wanted[4:] = False
  np.testing.assert_array_equal(mask, wanted)
  np.testing.assert_array_equal(
    np.asarray(dropped.batch.counted)[:, 0], [True] * 4 + [False] * 2
  )
  np.testing.assert_array_equal(
    np.asarray(dropped.batch.advantages), np.asarray(kept.batch.advantages)
  )


CUT_OFF = {"p0": ["7 " * MAX_NEW_TOKENS, *GROUPS["p0"][:3]]}


def test_a_masked_completion_that_was_cut_off_still_enters_the_statistics(
  found,
):
  kept = found([0], replies=CUT_OFF)
  masked = found([0], replies=CUT_OFF, truncated="mask")
  np.testing.assert_array_equal(
    np.asarray(masked.batch.advantages), np.asarray(kept.batch.advantages)
  )
  mask = np.asarray(masked.batch.completion_mask)
  assert not mask[0, 0].any()
  np.testing.assert_array_equal(
    mask[0, 1:], np.asarray(kept.batch.completion_mask)[0, 1:]
  )


def test_length_costs_reward_from_the_soft_tokens_on(found, tokenizer):
  soft = {"truncated": "penalise", "soft_tokens": 4}
  step = found([0], replies=CUT_OFF, **soft)
  kept = found([0], replies=CUT_OFF)
  # All but the one cut off are short; it loses 1 of the group's 4.
  longest = max(len(tokenizer.encode(x)) for x in GROUPS["p0"]) + 1
  assert longest <= MAX_NEW_TOKENS - 4
  assert float(step.metrics["rollout/length_penalty"]) == -0.25
  assert float(step.metrics["rollout/reward"]) == pytest.approx(
    float(kept.metrics["rollout/reward"]) - 0.25
  )
  advantages = np.asarray(step.batch.advantages)[0]
  assert advantages[0] < np.asarray(kept.batch.advantages)[0, 0]


def test_advantages_are_held_within_the_clip(found):
  free, held = found(MIXED), found(MIXED, advantage_clip=0.6)
  before = np.asarray(free.batch.advantages)
  assert np.abs(before).max() > 0.6
  np.testing.assert_array_equal(
    np.asarray(held.batch.advantages), np.clip(before, -0.6, 0.6)
  )


def test_names_of_every_setting_are_declared(found, tmp_path):
  step = found(
    [2, 0],
    [3, 2],
    zero_variance="resample",
    max_batches=2,
    truncated="penalise",
    soft_tokens=4,
  )
  with metrics.Writer(tmp_path, is_writer=False, resume_step=None) as writer:
    writer.write(1, step.metrics)


def test_heuristics_make_the_advantage_of_a_group_that_is_all_right(found):
  replies = {
    "p0": ["What? <answer>3</answer>", *["<answer>3</answer>"] * 3],
    "p1": ["<answer>4</answer>", *["<answer>5</answer>"] * 3],
  }
  share = "rollout/heuristic_advantage_share"
  assert float(found([0], replies=replies).metrics[share]) == pytest.approx(1)
  assert float(found([1], replies=replies).metrics[share]) == 0
  assert 0 < float(found([0, 1], replies=replies).metrics[share]) < 1


def test_rewards_normalised_apart_tell_equal_sums_apart(run_of, tokenizer):
  """A right answer without its tag against a wrong one in its tag.

  All have the total 1, which teaches nothing: the group is dropped. Apart, of
  four completions the first alone is right, so it is 1.5 standard deviations
  above the mean and the others 0.5 below; of their tags the opposite holds.
  """
  replies = {"p0": ["it is \\boxed{3}", *["<answer>5</answer>"] * 3]}

  def collect(aggregation, tag):
    run = run_of(
      replies,
      shaping={"zero_variance": "drop"},
      rewards={"preset": "answer", "format": tag},
      reward_aggregation=aggregation,
    )
    batches = scripted.batches_of(tokenizer, batch_size=1, indices=[0])
    step = run.collect(batches, jax.random.key(0))
    unanimous = step.metrics["rollout/unanimous_fraction"]
    return np.asarray(step.batch.advantages)[0], step.batch, unanimous

  advantages, batch, unanimous = collect("sum_then_normalize", 1.0)
  assert not advantages.any() and not batch.counted.any() and unanimous == 1
  advantages, batch, unanimous = collect("normalize_then_sum", 1.0)
  assert not advantages.any() and batch.counted.all() and unanimous == 0
  advantages, _, _ = collect("normalize_then_sum", 0.5)
  assert batch.completion_mask.any(axis=-1).all()
  # 0.5 * (1.5, -0.5, -0.5, -0.5) over its standard deviation, 0.5.
  np.testing.assert_allclose(advantages, [1.5, -0.5, -0.5, -0.5], rtol=1e-3)


def test_a_step_measures_rewards_that_pay_for_more_than_right_answers(
  run_of, tokenizer
):
  def metrics(**weights):
    rewards = {"preset": "answer", "format": 0.0} | weights
    collector = run_of(GROUPS, rewards=rewards).collector
    key, how = jax.random.key(0), {"position": 0, "num_shown": None}
    batches = list(scripted.batches_of(tokenizer, batch_size=4, indices=MIXED))
    steps = [
      collector.collect({}, iter(batches), key, **how).metrics
      for _ in range(reward_health.FIRST_STEPS + 1)
    ]
    return [set(filter(IS_HEALTH, names)) for names in steps]

  first, *_, last = metrics(length=0.1, coherence=-0.1)
  assert {x.split("/")[1] for x in first} == {
    *("repetition", "length_pair_accuracy", "length_length_correlation"),
    *("length_repetition_correlation", "length_mean_if_right"),
    "length_mean_if_wrong",
  }
  assert last - first == {"rollout/novel_token_share"}
  assert not set().union(*metrics())
