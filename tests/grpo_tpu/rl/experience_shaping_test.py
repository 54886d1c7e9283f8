"""What filters and weights make of scripted completions."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from grpo_tpu.observability import writer as metrics
from grpo_tpu.rl import experience
from tests.grpo_tpu import scripted
from tests.grpo_tpu.scripted import GROUPS, MAX_NEW_TOKENS, UNREADABLE

# By scripted.GROUPS: these have right and wrong completions, these have not.
MIXED, UNANIMOUS = (0, 1, 4, 5), (2, 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return scripted.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def policy_of(tokenizer):
  return functools.partial(scripted.make_policy, tokenizer)


@pytest.fixture
def found(policy_of, tokenizer):
  """What a step makes of batches of the problems at these indices."""

  def result(*indices, replies=GROUPS, num_devices=1, position=0, **shaping):
    batches = [
      batch
      for each in indices
      for batch in scripted.batches_of(
        tokenizer, batch_size=len(each), indices=each
      )
    ]
    policy = policy_of(replies, num_devices=num_devices, shaping=shaping)
    return experience.online(
      policy,
      {},
      iter(batches),
      jax.random.key(0),
      position=position,
      num_samples=0,
    )

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
  assert step.scalars["rollout/batches"] == 2
  wanted = found([0, 1, 4, 5], zero_variance="drop")
  assert_same_bundles(step.bundles, wanted.bundles)


def test_a_step_whose_groups_all_teach_samples_no_more(found):
  step = found(MIXED, MIXED, zero_variance="resample", max_batches=3)
  assert step.num_batches == 1
  assert_same_bundles(
    step.bundles, found(MIXED).bundles.replace(counted=step.bundles.counted)
  )
  assert np.asarray(step.bundles.counted).all()


def test_what_the_budget_leaves_unanimous_is_no_part_of_the_batch(found):
  step = found([2, 0], [3, 2], [1, 1], zero_variance="resample", max_batches=2)
  assert step.num_batches == 2
  counted = np.asarray(step.bundles.counted)
  np.testing.assert_array_equal(counted, [[True] * 4, [False] * 4])
  mask = np.asarray(step.bundles.completion_mask)
  assert mask[0].any(axis=-1).all() and not mask[1].any()


def test_devices_change_nothing_of_what_is_kept(found):
  indices = ([2, 0, 3, 1, 2, 3, 0, 2], [3, 4, 2, 5, 1, 1, 0, 3])
  resample = {"zero_variance": "resample", "max_batches": 2}
  assert_same_bundles(
    found(*indices, num_devices=8, **resample).bundles,
    found(*indices, **resample).bundles,
  )


def test_metrics_of_a_resampled_step_are_of_all_it_sampled(found):
  indices = ([2, 0, 3, 2], [3, 4, 2, 5], [3, 3, 3, UNREADABLE])
  step = found(*indices, zero_variance="resample", max_batches=3)
  assert step.num_batches == 3
  apart = [found(each).scalars for each in indices]
  for name in ("rollout/accuracy", "rollout/mixed_fraction", "rollout/reward"):
    mean = np.mean([float(scalars[name]) for scalars in apart])
    assert float(step.scalars[name]) == pytest.approx(mean, rel=1e-6), name
  assert step.scalars["data/skipped"] == 1


def test_prompts_of_merged_batches_are_padded_to_the_longer(found, monkeypatch):
  wanted = found([0, 1], zero_variance="drop").bundles
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
  assert_same_bundles(step.bundles, wanted.replace(prompt_ids=padded))


def test_images_of_merged_batches_are_padded_to_the_most(found, monkeypatch):
  wanted = found([0, 1], zero_variance="drop").bundles
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
  assert_same_bundles(step.bundles, wanted.replace(images=images))


def test_every_batch_has_a_key_of_its_own_by_its_number(policy_of, found):
  keys = []
  sample = scripted.Scripted.sample

  def noting(self, params, batch, step_key, **kwargs):
    keys.append(jax.random.key_data(step_key))
    return sample(self, params, batch, step_key, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scripted.Scripted, "sample", noting)
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
  mask = np.asarray(dropped.bundles.completion_mask)
  wanted = np.array(kept.bundles.completion_mask)
  wanted[4:] = False
  np.testing.assert_array_equal(mask, wanted)
  np.testing.assert_array_equal(
    np.asarray(dropped.bundles.counted)[:, 0], [True] * 4 + [False] * 2
  )
  np.testing.assert_array_equal(
    np.asarray(dropped.bundles.advantages), np.asarray(kept.bundles.advantages)
  )


CUT_OFF = {"p0": ["7 " * MAX_NEW_TOKENS, *GROUPS["p0"][:3]]}


def test_a_masked_completion_that_was_cut_off_still_enters_the_statistics(
  found,
):
  kept = found([0], replies=CUT_OFF)
  masked = found([0], replies=CUT_OFF, truncated="mask")
  np.testing.assert_array_equal(
    np.asarray(masked.bundles.advantages), np.asarray(kept.bundles.advantages)
  )
  mask = np.asarray(masked.bundles.completion_mask)
  assert not mask[0, 0].any()
  np.testing.assert_array_equal(
    mask[0, 1:], np.asarray(kept.bundles.completion_mask)[0, 1:]
  )


def test_length_costs_reward_from_the_soft_tokens_on(found, tokenizer):
  soft = {"truncated": "penalise", "soft_tokens": 4}
  step = found([0], replies=CUT_OFF, **soft)
  kept = found([0], replies=CUT_OFF)
  # All but the one cut off are short; it loses 1 of the group's 4.
  longest = max(len(tokenizer.encode(x)) for x in GROUPS["p0"]) + 1
  assert longest <= MAX_NEW_TOKENS - 4
  assert float(step.scalars["rollout/length_penalty"]) == -0.25
  assert float(step.scalars["rollout/reward"]) == pytest.approx(
    float(kept.scalars["rollout/reward"]) - 0.25
  )
  advantages = np.asarray(step.bundles.advantages)[0]
  assert advantages[0] < np.asarray(kept.bundles.advantages)[0, 0]


def test_advantages_are_held_within_the_clip(found):
  free, held = found(MIXED), found(MIXED, advantage_clip=0.6)
  before = np.asarray(free.bundles.advantages)
  assert np.abs(before).max() > 0.6
  np.testing.assert_array_equal(
    np.asarray(held.bundles.advantages), np.clip(before, -0.6, 0.6)
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
    writer.write(1, step.scalars)


def test_heuristics_make_the_advantage_of_a_group_that_is_all_right(found):
  replies = {
    "p0": ["What? <answer>3</answer>", *["<answer>3</answer>"] * 3],
    "p1": ["<answer>4</answer>", *["<answer>5</answer>"] * 3],
  }
  share = "rollout/heuristic_advantage_share"
  assert float(found([0], replies=replies).scalars[share]) == pytest.approx(1)
  assert float(found([1], replies=replies).scalars[share]) == 0
  assert 0 < float(found([0, 1], replies=replies).scalars[share]) < 1
