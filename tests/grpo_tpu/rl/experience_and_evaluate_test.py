"""What scripted completions are worth, in a training step and held out."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest

from data_pipelines import pipeline
from grpo_tpu.observability import writer as metrics
from grpo_tpu.rewards import scoring
from grpo_tpu.rl import experience
from tests.grpo_tpu import scripted
from tests.grpo_tpu.scripted import (
  ASKED,
  EVERY,
  GROUPS,
  MAX_NEW_TOKENS,
  RIGHT,
  SCRIPT,
  TOO_LONG,
  UNREADABLE,
  Source,
  batches_of,
  make_builder,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return scripted.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run_of(tokenizer):
  return functools.partial(scripted.make_run, tokenizer)


GREEDY = {f"p{i}": [reply] for i, (*_, reply) in enumerate(SCRIPT)}


@pytest.fixture
def evaluated(run_of, tokenizer):
  def result(batch_size=11, num_devices=1, num_samples=0):
    return run_of(GREEDY, num_devices=num_devices).evaluate(
      batches_of(tokenizer, batch_size=batch_size), num_samples=num_samples
    )

  return result


def test_problems_that_cannot_be_asked_count_as_wrong(evaluated):
  scalars = evaluated().scalars
  assert scalars["eval/accuracy"] == len(RIGHT) / len(SCRIPT)
  # All that is asked but the one cut off has the format.
  assert scalars["eval/format"] == pytest.approx(8 / 11)
  assert scalars["eval/truncated_fraction"] == pytest.approx(1 / 9)


def test_lengths_are_of_what_was_written(evaluated, tokenizer):
  lengths = [
    min(len(tokenizer.encode(SCRIPT[i][2])) + 1, MAX_NEW_TOKENS) for i in ASKED
  ]
  got = evaluated().scalars["eval/completion_length"]
  assert got == pytest.approx(np.mean(lengths))


@pytest.mark.parametrize(
  ("batch_size", "num_devices"), [(4, 1), (6, 1), (16, 1), (8, 8)]
)
def test_neither_batch_size_nor_padding_nor_devices_change_a_scalar(
  evaluated, batch_size, num_devices
):
  wanted, got = evaluated(), evaluated(batch_size, num_devices)
  assert got.scalars == pytest.approx(wanted.scalars, rel=1e-6)
  assert got.greedy == wanted.greedy


def test_slices_add_up_to_the_whole(evaluated):
  scalars = evaluated().scalars
  # What cannot be read stands in as a free-form integer.
  slices = {
    "multi_choice": (2, 3),
    "free_form": (4, 8),
    "integer": (2, 5),
    "float": (1, 2),
    "text": (2, 3),
    "list": (1, 1),
  }
  got = {k: v for k, v in scalars.items() if k.startswith("eval/accuracy/")}
  assert got == pytest.approx(
    {f"eval/accuracy/{name}": a / b for name, (a, b) in slices.items()}
  )
  for names in (
    ("multi_choice", "free_form"),
    ("integer", "float", "text", "list"),
  ):
    right, count = np.sum([slices[name] for name in names], axis=0)
    assert scalars["eval/accuracy"] == right / count


def test_a_slice_without_problems_is_left_out(run_of, tokenizer):
  batches = batches_of(tokenizer, batch_size=4, indices=[0, 1])
  scalars = run_of(GREEDY).evaluate(batches).scalars
  assert scalars["eval/accuracy/integer"] == 0.5
  assert "eval/accuracy/multi_choice" not in scalars


def test_records_are_in_mathvistas_results_format(evaluated):
  results = {x.record["pid"]: x.record for x in evaluated(4).greedy}
  assert set(results) == {
    "unreadable:7" if i == UNREADABLE else f"p{i}" for i in range(len(SCRIPT))
  }
  # As the benchmark's own programs read them; they add extraction, prediction
  # and true_false themselves.
  keys = (
    "question image choices unit precision answer question_type answer_type "
    "pid metadata query response strict_answer strict_true_false "
    "official_rule"
  )
  for pid, record in results.items():
    assert set(record) - {"truncated"} == set(keys.split())
    assert record["pid"] == pid
  assert {
    pid for pid, record in results.items() if record["strict_true_false"]
  } == {f"p{i}" for i in RIGHT}
  choice, number, unasked = results["p4"], results["p2"], results["p8"]
  assert choice["choices"] == ["red", "blue"] and choice["precision"] is None
  assert choice["strict_answer"] == "red"
  assert choice["response"] == "<answer>red</answer>"
  assert number["choices"] is None and number["precision"] == 1
  assert number["unit"] is None and number["answer"] == "1.5"
  assert (unasked["response"], unasked["strict_answer"]) == ("", None)
  assert unasked["metadata"] == {"source": "drawn", "skills": ["arithmetic"]}


def unanswered(batches, indices):
  """The batches, with the answers of some problems kept from the public."""
  for batch in batches:
    problems = tuple(
      dataclasses.replace(problem, answer="")
      if problem.pid in {f"p{i}" for i in indices}
      else problem
      for problem in batch.problems
    )
    yield dataclasses.replace(batch, problems=problems)


def test_without_public_answers_nothing_is_graded(run_of, tokenizer):
  batches = unanswered(batches_of(tokenizer, batch_size=4), EVERY)
  result = run_of(GREEDY).evaluate(batches)
  assert set(result.scalars) == {
    "eval/format",
    "eval/completion_length",
    "eval/truncated_fraction",
  }
  asked = [x for x in result.greedy if x.asked]
  assert [x.record["strict_true_false"] for x in asked] == [None] * len(ASKED)
  assert asked[0].record["strict_answer"] == "3"


def test_accuracy_is_of_the_problems_that_can_be_graded(run_of, tokenizer):
  hidden = [0, 1, 4, TOO_LONG]
  batches = unanswered(batches_of(tokenizer, batch_size=4), hidden)
  result = run_of(GREEDY).evaluate(batches)
  # Of 11 problems 7 are left, a damaged one among them; of 6 right ones 5.
  assert result.scalars["eval/accuracy"] == pytest.approx(5 / 7)
  assert result.scalars["eval/accuracy/integer"] == pytest.approx(1 / 3)
  right = [x.record["strict_true_false"] for x in result.greedy]
  assert [i for i in EVERY if right[i] is None] == hidden
  assert [i for i in EVERY if right[i]] == [2, 3, 5, 9, 10]


def test_each_data_set_has_its_own_accuracy(run_of, tokenizer):
  """Of 0 to 3 the right ones are those of RIGHT; padding is in no set."""
  (batch,) = batches_of(tokenizer, batch_size=6, indices=[0, 1, 2, 3, 5])
  sets = {"a": [1, 1, 0, 0, 0, 0], "b": [0, 0, 1, 1, 1, 0], "c": [0] * 6}
  sets = {name: np.array(inside, bool) for name, inside in sets.items()}
  batch = dataclasses.replace(batch, sets=sets)
  scalars = run_of(GREEDY).evaluate([batch]).scalars
  right = [i in RIGHT for i in (0, 1, 2, 3, 5)]
  assert scalars["eval/accuracy/a"] == np.mean(right[:2])
  assert scalars["eval/accuracy/b"] == np.mean(right[2:])
  assert "eval/accuracy/c" not in scalars


@pytest.mark.parametrize("batch_size", [2, len(SCRIPT)])
def test_samples_are_the_first_usable_problems(evaluated, batch_size):
  samples = evaluated(batch_size, num_samples=8).shown
  assert [s.columns["pid"] for s in samples] == [f"p{i}" for i in ASKED[:8]]
  assert samples[7].columns["completion"] == SCRIPT[9][2]


def test_evaluation_names_are_declared(evaluated, tmp_path):
  with metrics.Writer(tmp_path, is_writer=False, resume_step=None) as writer:
    writer.write(1, evaluated().scalars)


def online(run, tokenizer, indices=EVERY, num_shown=None):
  (batch,) = batches_of(tokenizer, batch_size=len(indices), indices=indices)
  return batch, run.collect([batch], jax.random.key(0), num_shown=num_shown)


def lasting(scalars):
  """Those that are not wall-clock time."""
  return {
    name: float(value)
    for name, value in scalars.items()
    if not name.startswith("perf/")
  }


def test_unusable_prompts_leave_no_mark_on_what_is_learnt(run_of, tokenizer):
  run = run_of(GROUPS)
  _, whole = online(run, tokenizer)
  _, usable = online(run, tokenizer, ASKED)
  rows = list(ASKED)
  for name in ("completion_mask", "advantages"):
    got = np.asarray(getattr(whole.batch, name))
    np.testing.assert_array_equal(
      got[rows], np.asarray(getattr(usable.batch, name)), err_msg=name
    )
    assert not got[[UNREADABLE, TOO_LONG]].any()
  got, wanted = lasting(whole.metrics), lasting(usable.metrics)
  assert (got.pop("data/skipped"), wanted.pop("data/skipped")) == (2, 0)
  assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_compare_the_completions_of_one_prompt(
  run_of, tokenizer, scale
):
  run = run_of(GROUPS, advantage_scale=scale)
  batch, found = online(run, tokenizer, ASKED)
  rewards = np.array(
    [
      scoring.score(
        GROUPS[problem.pid], [problem] * 4, run.config.rewards
      ).total
      for problem in batch.problems
    ]
  )
  centred = rewards - rewards.mean(1, keepdims=True)
  divisor = {
    "group": rewards.std(1, ddof=1, keepdims=True) + 1e-4,
    "batch": rewards.std(ddof=1) + 1e-4,
    "none": 1.0,
  }[scale]
  np.testing.assert_allclose(
    np.asarray(found.batch.advantages), centred / divisor, atol=2e-4
  )
  scalars = lasting(found.metrics)
  assert scalars["rollout/reward"] == pytest.approx(rewards.mean(), rel=1e-5)
  assert scalars["rollout/reward_std"] == pytest.approx(
    rewards.std(1, ddof=1).mean(), rel=1e-4
  )


def test_statistics_are_those_worked_by_hand(run_of, tokenizer):
  _, found = online(run_of(GROUPS), tokenizer, [0, 1, 2, 3])
  scalars = lasting(found.metrics)
  # One, two, none and four of four are right.
  assert scalars["rollout/accuracy"] == pytest.approx(7 / 16)
  assert scalars["reward/accuracy_mean"] == pytest.approx(7 / 16)
  assert scalars["reward/accuracy_std"] == pytest.approx(
    np.sqrt(7 / 16 * 9 / 16)
  )
  assert scalars["rollout/all_right_fraction"] == 0.25
  assert scalars["rollout/all_wrong_fraction"] == 0.25
  assert scalars["rollout/unanimous_fraction"] == 0.5
  assert scalars["rollout/truncated_fraction"] == 0.0


@pytest.mark.parametrize("num_devices", [1, 2])
def test_each_data_set_has_its_own_rewards(
  run_of, tokenizer, tmp_path, num_devices
):
  """One, two, none and four of four are right; the fifth is damaged."""
  run = run_of(GROUPS, num_devices=num_devices)
  indices = [0, 1, 2, 3, UNREADABLE, 4]
  (batch,) = batches_of(tokenizer, batch_size=6, indices=indices)
  sets = {"a": [1, 1, 0, 0, 0, 0], "b": [0, 0, 1, 1, 0, 0]}
  sets |= {"c": [0, 0, 0, 0, 1, 0], "text-2": [0, 0, 0, 0, 0, 1]}
  sets = {name: np.array(inside, bool) for name, inside in sets.items()}
  batch = next(unanswered([dataclasses.replace(batch, sets=sets)], [4]))
  found = run.collect([batch], jax.random.key(0))
  got = {k: v for k, v in lasting(found.metrics).items() if k.count("/") > 1}
  assert got == pytest.approx(
    {
      **{"data/a/accuracy": 3 / 8, "data/b/accuracy": 4 / 8},
      **{"data/a/reward": 3 / 8 + 0.1, "data/b/reward": 4 / 8 + 0.1},
      # Its answer is not public, and three of four say none.
      "data/text-2/reward": 0.1 / 4,
      **{"data/a/share": 2 / 6, "data/b/share": 2 / 6},
      **{"data/c/share": 1 / 6, "data/text-2/share": 1 / 6},
      **{"data/a/skipped": 0, "data/b/skipped": 0},
      **{"data/c/skipped": 1, "data/text-2/skipped": 0},
    }
  )
  with metrics.Writer(tmp_path, is_writer=False, resume_step=None) as writer:
    writer.write(1, found.metrics)


def test_accuracy_is_of_what_rules_can_check(run_of, tokenizer):
  """One, two, none and four of four are right."""
  run, indices = run_of(GROUPS), [0, 1, 2, 3]
  (batch,) = batches_of(tokenizer, batch_size=4, indices=indices)
  every = lasting(run.collect([batch], jax.random.key(0)).metrics)
  some, none = (
    lasting(run.collect(list(batches), jax.random.key(0)).metrics)
    for batches in (unanswered([batch], [2, 3]), unanswered([batch], indices))
  )
  assert some["rollout/accuracy"] == some["reward/accuracy_mean"] == 3 / 8
  assert some["rollout/mixed_fraction"] == 1.0
  assert some["reward/format_mean"] == none["reward/format_mean"] == 1.0
  missing = {name for name in every if name not in none}
  assert missing == {
    *("rollout/accuracy", "reward/accuracy_mean", "reward/accuracy_std")
  }
  fractions = ("all_right", "all_wrong", "mixed")
  assert not any(none[f"rollout/{name}_fraction"] for name in fractions)


def test_truncation_and_lengths_count_completions_of_usable_prompts(
  run_of, tokenizer
):
  replies = {"p0": ["7 " * MAX_NEW_TOKENS, "7", "7", "7"]}
  run = run_of(replies)
  batch, found = online(run, tokenizer, [0, UNREADABLE])
  scalars = lasting(found.metrics)
  short = len(tokenizer.encode("7")) + 1
  assert scalars["rollout/truncated_fraction"] == 0.25
  assert scalars["rollout/completion_length"] == pytest.approx(
    (MAX_NEW_TOKENS + 3 * short) / 4
  )
  assert scalars["rollout/prompt_length"] == batch.prompt_length[0]


def test_a_completion_whose_reward_failed_is_learnt_from_by_no_one(
  run_of, tokenizer, monkeypatch
):
  reduce = scoring.reduce

  def failing(parts, config, **settings):
    scores = reduce(parts, config, **settings)
    failed, total = scores.failed["format"].copy(), scores.total.copy()
    failed[1], total[1] = True, 0.0
    return dataclasses.replace(
      scores,
      total=total,
      failed=scores.failed | {"format": failed},
      errors=scores.errors | {"format": 1},
    )

  monkeypatch.setattr(scoring, "reduce", failing)
  _, found = online(run_of(GROUPS), tokenizer, [0, 1])
  mask = np.asarray(found.batch.completion_mask)
  assert not mask[0, 1].any() and mask[0, [0, 2, 3]].any(axis=-1).all()
  advantages = np.asarray(found.batch.advantages)
  assert advantages[0, 1] == 0
  # One of the three that are left is right.
  assert lasting(found.metrics)["rollout/accuracy"] == pytest.approx(3 / 7)
  assert lasting(found.metrics)["reward/errors"] == 1
  assert lasting(found.metrics)["reward/format_errors"] == 1
  assert advantages[0, 0] > 0 > advantages[0, 2]


@pytest.fixture
def run_with_custom_reward(run_of):
  """With a user's reward that fails on replies that say "none"."""

  def make(replies):
    run = run_of(replies)
    rewards = dataclasses.replace(
      run.config.rewards,
      custom=("tests.grpo_tpu.rewards.user_rewards:without_none",),
      custom_weights=(0.5,),
      num_workers=0,
    )
    config = dataclasses.replace(run.config, rewards=rewards)
    return dataclasses.replace(run, config=config)

  yield make
  scoring.close()


def test_a_users_reward_pays_and_where_it_fails_nothing_is_learnt(
  run_with_custom_reward, tokenizer, tmp_path
):
  """Four wrong, four right, and of the last four three that say none."""
  _, found = online(run_with_custom_reward(GROUPS), tokenizer, [2, 3, 4])
  scalars = lasting(found.metrics)
  assert scalars["reward/without_none_errors"] == 3
  assert scalars["reward/errors"] == 3
  assert scalars["reward/accuracy_errors"] == 0
  # Five right, four wrong; each earns what the function pays.
  assert scalars["rollout/accuracy"] == pytest.approx(5 / 9)
  assert scalars["reward/without_none_mean"] == pytest.approx(2.0)
  assert scalars["reward/without_none_std"] == pytest.approx(0.0)
  paid = 5 / 9 + 0.1 + 0.5 * 2.0
  assert scalars["rollout/reward"] == pytest.approx(paid, rel=1e-6)
  mask = np.asarray(found.batch.completion_mask).any(axis=-1)
  np.testing.assert_array_equal(
    mask, [[True] * 4, [True] * 4, [False, False, False, True]]
  )
  with metrics.Writer(tmp_path, is_writer=False, resume_step=None) as writer:
    writer.write(1, found.metrics)


def test_a_users_reward_that_fails_makes_no_answer_wrong(
  run_with_custom_reward, tokenizer
):
  replies = {pid: [f"none {reply[0]}"] for pid, reply in GREEDY.items()}
  replies["p0"] = GREEDY["p0"]  # Failing on all would end the run.
  batches = batches_of(tokenizer, batch_size=4, indices=[0, 2, 5])
  scalars = run_with_custom_reward(replies).evaluate(batches).scalars
  assert scalars["eval/accuracy"] == 1.0


def test_a_users_reward_pays_without_a_public_answer(
  run_with_custom_reward, tokenizer
):
  """Its 2.0 by its weight of 0.5, and 0.1 for the format."""
  batches = batches_of(tokenizer, batch_size=4, indices=[0, 2, 5])
  run = run_with_custom_reward(GREEDY)
  scalars = run.evaluate(unanswered(batches, EVERY)).scalars
  assert scalars["eval/reward"] == pytest.approx(1.1)
  assert "eval/accuracy" not in scalars


def test_samples_are_all_completions_with_what_they_earned(run_of, tokenizer):
  run = run_of(GROUPS)
  batch, found = online(run, tokenizer, num_shown=3)
  rows = [sample.columns for sample in found.samples]
  assert [(x["group"], x["generation"]) for x in rows] == [
    (group, generation) for group in EVERY for generation in range(4)
  ]
  advantages = np.asarray(found.batch.advantages)
  mask = np.asarray(found.batch.completion_mask)
  for row in rows:
    group, generation = row["group"], row["generation"]
    assert row["advantage"] == advantages[group, generation]
    assert row["valid"] == (group in ASKED)
    if group not in ASKED:
      continue
    (scores,) = [
      scoring.score(
        [GROUPS[row["pid"]][generation]],
        [batch.problems[group]],
        run.config.rewards,
      )
    ]
    assert row["completion"] == GROUPS[row["pid"]][generation]
    assert row["read_answer"] == scores.answers[0]
    assert row["reward"] == scores.total[0]
    assert {f"reward/{k}": x[0] for k, x in scores.components.items()} == {
      name: value for name, value in row.items() if name.startswith("reward/")
    }
    assert row["completion_tokens"] == mask[group, generation].sum()
    text = run.tokenizer.encode(row["completion"])
    is_whole = len(text) < MAX_NEW_TOKENS
    assert row["finish_reason"] == ("stop" if is_whole else "length")
  shown = [x for x in found.samples if x.question is not None]
  assert [x.columns["group"] for x in shown] == list(ASKED[:3])
  for sample, row in zip(shown, ASKED, strict=False):
    assert sample.columns["generation"] == 0
    assert sample.question == batch.problems[row].question
    np.testing.assert_array_equal(sample.image, batch.images[row, 0])


def test_a_sample_holds_the_prompt_as_the_model_read_it(run_of, tokenizer):
  batch, found = online(run_of(GROUPS), tokenizer, num_shown=0)
  for group in ASKED:
    row = found.samples[4 * group].columns
    ids = batch.prompt_ids[group, : batch.prompt_length[group]].tolist()
    assert row["prompt_tokens"] == len(ids)
    assert row["prompt"].startswith("<bos><start_of_turn>user\n")
    assert row["prompt"].endswith("<end_of_turn>\n<start_of_turn>model\n")
    assert "<start_of_image>[image 1]<end_of_image>" in row["prompt"]
    assert batch.problems[group].query in row["prompt"]
    assert "Write the final answer as <answer>" in row["prompt"]


def test_names_of_a_step_are_declared(run_of, tokenizer, tmp_path):
  _, found = online(run_of(GROUPS), tokenizer)
  with metrics.Writer(tmp_path, is_writer=False, resume_step=None) as writer:
    writer.write(1, found.metrics)


def offline(run, tokenizer, num_shown=None):
  config = run.config
  # In the order of the source, and with the rows that training leaves out.
  count = len(SCRIPT)
  (batch,) = pipeline.EvalBatches(
    make_builder(Source(range(count)), tokenizer, kind=config.data.kind),
    num_problems=count,
    batch_size=count,
  )
  return batch, run.collect([batch], jax.random.key(0), num_shown=num_shown)


def test_demonstrations_are_learnt_from_where_they_are_usable(
  run_of, tokenizer
):
  batch, found = offline(run_of({}, kind="demonstrations"), tokenizer)
  assert collections.Counter(batch.valid.tolist()) == {True: 9, False: 2}
  mask = np.asarray(found.batch.completion_mask)
  np.testing.assert_array_equal(mask.any(axis=(1, 2)), batch.valid)
  np.testing.assert_array_equal(
    np.asarray(found.batch.completion_ids), batch.completion_ids
  )
  assert lasting(found.metrics) == {"data/skipped": 2.0}
  assert not found.samples


@pytest.mark.parametrize("kind", ["demonstrations", "preference"])
def test_samples_of_given_completions_have_what_they_have(
  run_of, tokenizer, kind
):
  batch, found = offline(run_of({}, kind=kind), tokenizer, num_shown=1)
  rows = [sample.columns for sample in found.samples]
  count = {"demonstrations": 1, "preference": 2}[kind]
  assert [(x["group"], x["generation"]) for x in rows] == [
    (group, generation) for group in ASKED for generation in range(count)
  ]
  assert {x["finish_reason"] for x in rows} == {"stop"}
  names = {"label", "reward", "advantage", "valid", "reward/accuracy"}
  is_preference = kind == "preference"
  assert names & rows[0].keys() == (names if is_preference else set())
  for row in rows if is_preference else ():
    group, generation = row["group"], row["generation"]
    assert row["label"] == batch.labels[group, generation]
    assert row["advantage"] == found.batch.advantages[group, generation]


def test_the_chosen_completion_of_a_pair_is_preferred(
  run_of, tokenizer, tmp_path
):
  batch, found = offline(run_of({}, kind="preference"), tokenizer)
  advantages = np.asarray(found.batch.advantages)
  assert (advantages[batch.valid, 0] > 0).all()
  assert (advantages[batch.valid, 1] < 0).all()
  assert not advantages[~batch.valid].any()
  scalars = lasting(found.metrics)
  assert scalars["train/preference_accuracy"] == 1.0
  assert scalars["data/skipped"] == (~batch.valid).sum() == 2
  with metrics.Writer(tmp_path, is_writer=False, resume_step=None) as writer:
    writer.write(1, found.metrics)


def test_over_batches_counts_add_up_and_means_are_averaged():
  batches = [
    {"reward/own_errors": n, "reward/own_mean": float(n)} for n in (1, 4)
  ]
  # The first batch had no row of this data set.
  batches[1] |= {"data/geo/accuracy": 0.5, "data/geo/skipped": 3}
  assert experience._combine_metrics(batches) == {
    "rollout/batches": 2,
    "reward/own_errors": 5,
    "reward/own_mean": 2.5,
    "data/geo/accuracy": 0.5,
    "data/geo/skipped": 3,
  }
