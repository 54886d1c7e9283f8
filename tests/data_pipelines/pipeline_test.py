"""The stream of batches has one order for every reader and every start."""

import dataclasses
import importlib.metadata
import io
import itertools
import logging

import numpy as np
import PIL.Image
import pytest
from absl import flags

from data_pipelines import pipeline, prompt_rows, record_index, records
from data_pipelines.preferences import completions as preferences
from data_pipelines.sources import mixtures, stored
from data_pipelines.text import chat_prompts, shuffle_options
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3
from data_pipelines.verifier import verify
from tests.data_pipelines.sources import taken

NUM_PROBLEMS = 13
SOFT_TOKENS = 3
IMAGE_SIZE = 8


def make_image(index):
  file = io.BytesIO()
  colour = (index * 19 % 256, 255 - index, 7)
  PIL.Image.new("RGB", (12, 10), colour).save(file, "PNG")
  return file.getvalue()


def make_problem(index):
  # Every digit is a token, so prompts differ in length by up to 8.
  question = f"Which digit follows {'7' * (2 * index % 10)} in {index}?"
  return records.Problem(
    pid=f"p{index}",
    question=question,
    images=(make_image(index),),
    choices=(),
    unit="",
    precision=-1,
    answer=str(index + 1),
    question_type="free_form",
    answer_type="integer",
    query=f"Question: {question}",
    solution="One by one.",
    metadata={},
  )


PROBLEMS = [make_problem(index) for index in range(NUM_PROBLEMS)]
TEXTS = [dataclasses.replace(problem, images=()) for problem in PROBLEMS]
BLIND = dict(image_size=0, soft_tokens=0, model_name="gemma3_270m")
# Text problems and those with pictures, 3 to 1.
TWO_SETS = [*TEXTS[:4], *PROBLEMS[4:]]
MIXTURE = dict(
  sets={"text": range(4), "seen": range(4, NUM_PROBLEMS)}, shares=(3, 1)
)


class FailingSource:
  """A source with unreadable records."""

  def __init__(self, problems, unreadable):
    self.problems, self.unreadable = problems, unreadable

  def __len__(self):
    return len(self.problems)

  def __getitem__(self, index, /):
    if index in self.unreadable:
      raise records.BadRecord("truncated", "the record ends too soon")
    return self.problems[index]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train(map(chat_prompts.chat_text, PROBLEMS), path, vocab_size=512)
  return tokens.Tokenizer(path)


def make_builder(tokenizer, source, **changes):
  fields = dict(
    kind="online",
    image_size=IMAGE_SIZE,
    soft_tokens=SOFT_TOKENS,
    shards=(0,),
    shard_count=1,
  )
  return prompt_rows.RowBuilder(
    source=source, tokenizer=tokenizer, **fields | changes
  )


def batches(tokenizer, source=PROBLEMS, steps=8, **changes):
  settings = dict(seed=5, prompt_buckets=(34, 36, 64), max_new_tokens=24)
  order = dict(prompts_per_step=4, start_step=0, worker_processes=0)
  order["shares"] = (1,)
  for name in order.keys() & changes.keys():
    order[name] = changes.pop(name)
  builder = make_builder(tokenizer, source, **settings | changes)
  return list(itertools.islice(pipeline.TrainBatches(builder, **order), steps))


def eval_batches(tokenizer, source=PROBLEMS, **changes):
  settings = dict(seed=0, prompt_buckets=(36, 64), max_new_tokens=0)
  size = dict(num_problems=10, batch_size=4)
  for name in size.keys() & changes.keys():
    size[name] = changes.pop(name)
  builder = make_builder(tokenizer, source, **settings | changes)
  return pipeline.EvalBatches(builder, **size)


def joined(shards):
  """The batch that shards hold together."""
  values = {}
  for field in dataclasses.fields(pipeline.Batch):
    parts = [getattr(shard, field.name) for shard in shards]
    if field.name == "problems":
      values[field.name] = sum(parts, ())
    elif field.name == "sets":
      values[field.name] = {
        name: np.concatenate([part[name] for part in parts])
        for name in parts[0]
      }
    else:
      values[field.name] = None if parts[0] is None else np.concatenate(parts)
  return pipeline.Batch(**values)


def assert_same(left, right):
  for field in dataclasses.fields(pipeline.Batch):
    np.testing.assert_equal(
      getattr(left, field.name), getattr(right, field.name), field.name
    )


@pytest.mark.parametrize("kind", prompt_rows.KINDS)
@pytest.mark.parametrize("shard_count", [2, 4])
def test_shards_together_hold_the_rows_of_one_shard(
  tokenizer, kind, shard_count
):
  alone = batches(tokenizer, kind=kind)
  shards = [
    batches(tokenizer, kind=kind, shards=(index,), shard_count=shard_count)
    for index in range(shard_count)
  ]
  for whole, parts in zip(alone, zip(*shards, strict=True), strict=True):
    assert_same(whole, joined(parts))


@pytest.mark.parametrize("kind", prompt_rows.KINDS)
@pytest.mark.parametrize("start_step", [1, 3, 7])
def test_a_restart_at_any_step_yields_the_same_batches(
  tokenizer, kind, start_step
):
  unbroken = batches(tokenizer, kind=kind)
  resumed = batches(
    tokenizer, kind=kind, start_step=start_step, steps=8 - start_step
  )
  for left, right in zip(unbroken[start_step:], resumed, strict=True):
    assert_same(left, right)


@pytest.fixture
def parsed_flags():
  """Marks absl flags as parsed, because Grain reads them."""
  was_parsed = flags.FLAGS.is_parsed()
  flags.FLAGS.mark_as_parsed()
  yield
  if not was_parsed:
    flags.FLAGS.unparse_flags()


@pytest.mark.multiprocess
def test_worker_processes_give_the_batches_of_none(
  tokenizer, tmp_path, parsed_flags
):
  """From the files of two data dirs, for one of two shards, from step 3 on."""
  sources = {}
  for name, part in (("text", TWO_SETS[:4]), ("seen", TWO_SETS[4:])):
    taken.write({"train": part}, tmp_path / name)
    sources[name] = stored.source(tmp_path / name, "train")
  source = mixtures.Mixture(sources)
  place = dict(kind="preference", shards=(1,), shard_count=2, **MIXTURE)
  unbroken = batches(tokenizer, source, **place)
  found = batches(
    tokenizer, source, **place, start_step=3, steps=5, worker_processes=2
  )
  for left, right in zip(unbroken[3:], found, strict=True):
    assert_same(left, right)


def test_a_restart_may_change_the_number_of_shards(tokenizer):
  unbroken = batches(tokenizer)[5]
  shards = [
    batches(tokenizer, start_step=5, steps=1, shards=(index,), shard_count=2)[0]
    for index in range(2)
  ]
  assert_same(unbroken, joined(shards))


def test_an_epoch_asks_each_problem_once_and_the_next_in_another_order(
  tokenizer,
):
  asked = [
    problem.pid
    for batch in batches(tokenizer, steps=2 * NUM_PROBLEMS // 4 + 1)
    for problem in batch.problems
  ]
  first, second = asked[:NUM_PROBLEMS], asked[NUM_PROBLEMS : 2 * NUM_PROBLEMS]
  assert sorted(first) == sorted(problem.pid for problem in PROBLEMS)
  assert sorted(second) == sorted(first)
  assert first != second


def asked(found):
  return [problem.pid for batch in found for problem in batch.problems]


def test_each_set_of_a_mixture_comes_as_it_would_alone(tokenizer):
  """Its share of any prefix, and its own order, which never ends."""
  found = batches(tokenizer, TWO_SETS, steps=12, **MIXTURE)
  is_text = np.concatenate([batch.sets["text"] for batch in found])
  np.testing.assert_array_equal(
    is_text, ~np.concatenate([batch.sets["seen"] for batch in found])
  )
  counts = np.cumsum(is_text) - np.arange(1, 49) * 3 / 4
  assert np.abs(counts).max() < 1
  for number, (part, inside) in enumerate(
    [(TWO_SETS[:4], is_text), (TWO_SETS[4:], ~is_text)]
  ):
    alone = asked(batches(tokenizer, part, steps=12, seed=5 + number))
    pids = [pid for pid, x in zip(asked(found), inside, strict=True) if x]
    assert pids == alone[: len(pids)]


def test_one_set_of_any_weight_is_no_mixture(tokenizer):
  whole = dict(sets={"all": range(NUM_PROBLEMS)}, shares=(9,))
  for left, right in zip(
    batches(tokenizer), batches(tokenizer, **whole), strict=True
  ):
    assert_same(left, dataclasses.replace(right, sets={}))


def test_hosts_and_restarts_change_nothing_of_a_mixture(tokenizer):
  alone = batches(tokenizer, TWO_SETS, **MIXTURE)
  shards = [
    batches(
      tokenizer,
      TWO_SETS,
      steps=3,
      start_step=5,
      shards=(index,),
      shard_count=2,
      **MIXTURE,
    )
    for index in range(2)
  ]
  for whole, parts in zip(alone[5:], zip(*shards, strict=True), strict=True):
    assert_same(whole, joined(parts))


def test_a_set_without_a_usable_record_is_named(tokenizer):
  with pytest.raises(ValueError, match=r"^data.dirs .*, and seen has none"):
    batches(tokenizer, TWO_SETS, **MIXTURE, **BLIND)


def test_another_seed_is_another_order(tokenizer):
  left, right = (
    [p.pid for batch in batches(tokenizer, seed=seed) for p in batch.problems]
    for seed in (0, 1)
  )
  assert left != right


def test_a_row_is_its_problem(tokenizer):
  for batch in batches(tokenizer):
    np.testing.assert_array_equal(batch.prompt_index, range(4))
    assert batch.valid.all()
    for row, problem in enumerate(batch.problems):
      ids = chat_prompts.encode_prompt(
        problem, tokenizer, soft_tokens=SOFT_TOKENS
      )
      length = batch.prompt_length[row]
      assert batch.prompt_ids[row, :length].tolist() == ids
      assert (batch.prompt_ids[row, length:] == GEMMA3.pad).all()
      index = int(problem.pid[1:])
      expected = np.array([index * 19 % 256, 255 - index, 7])
      np.testing.assert_array_equal(
        batch.images[row],
        np.broadcast_to(expected, (1, IMAGE_SIZE, IMAGE_SIZE, 3)),
      )


def test_prompts_are_padded_to_the_smallest_bucket_that_holds_the_step(
  tokenizer,
):
  widths = set()
  for batch in batches(tokenizer, steps=12):
    width, longest = batch.prompt_ids.shape[1], batch.prompt_length.max()
    assert width == min(size for size in (34, 36, 64) if size >= longest)
    widths.add(width)
  assert len(widths) > 1


def test_a_model_that_cannot_see_gets_no_images(tokenizer):
  (batch,) = batches(tokenizer, TEXTS, **BLIND, steps=1)
  assert batch.images.shape == (4, 0, 0, 0, 3)
  assert GEMMA3.image_placeholder not in batch.prompt_ids


def mixed_problem(index):
  """A problem with 0, 1 or 2 pictures, of which every second marks them."""
  count = (0, 0, 0, 1, 2)[index % 5]
  query = " and ".join(["Which", *[records.IMAGE_MARK] * count])
  return dataclasses.replace(
    PROBLEMS[index],
    images=tuple(make_image(index + i) for i in range(count)),
    query=query if index % 2 else PROBLEMS[index].query,
  )


MIXED = [mixed_problem(index) for index in range(NUM_PROBLEMS)]


@pytest.mark.parametrize("shard_count", [1, 2])
def test_a_row_shows_its_own_pictures_and_a_batch_has_room_for_the_most(
  tokenizer, shard_count
):
  widths = set()
  shards = [
    batches(
      tokenizer,
      MIXED,
      steps=13,
      prompts_per_step=2,
      shards=(shard,),
      shard_count=shard_count,
    )
    for shard in range(shard_count)
  ]
  for parts in zip(*shards, strict=True):
    batch = joined(parts)
    most = max(len(problem.images) for problem in batch.problems)
    widths.add(most)
    assert batch.valid.all()
    assert batch.images.shape == (2, most, IMAGE_SIZE, IMAGE_SIZE, 3)
    for ids, shown, problem in zip(
      batch.prompt_ids, batch.images, batch.problems, strict=True
    ):
      count, index = len(problem.images), int(problem.pid[1:])
      assert (ids == GEMMA3.image_placeholder).sum() == count * SOFT_TOKENS
      for i in range(count):
        colour = [(index + i) * 19 % 256, 255 - index - i, 7]
        assert (shown[i] == colour).all()
      assert not shown[count:].any()
  assert widths == {0, 1, 2}


def test_a_text_model_leaves_out_problems_with_pictures(tokenizer, caplog):
  caplog.set_level(logging.INFO, logger="absl")
  texts = {p.pid for p in MIXED if not p.images}
  training = batches(tokenizer, MIXED, **BLIND, split="train", steps=4)
  asked = {p.pid for batch in training for p in batch.problems}
  assert asked == texts
  assert (
    "train: 9 of 13 problems can be used; left out: 4 with pictures, which "
    "model.name ('gemma3_270m') cannot see."
  ) in caplog.text
  # In an evaluation they do not count as problems, and no row moves.
  evaluation = list(eval_batches(tokenizer, MIXED, **BLIND, num_problems=13))
  rows = [p.pid for batch in evaluation for p in batch.problems][:13]
  assert rows == [p.pid if p.pid in texts else "" for p in MIXED]
  assert [b.valid.sum() for b in evaluation] == [3, 3, 2, 1]


def test_a_text_model_without_a_text_problem_is_refused_by_name(tokenizer):
  remedy = (
    r"none of the 13 records .* 13 with pictures, which model.name "
    r"\('gemma3_270m'\) cannot see. To continue, set model.name to one with an "
    "image tower, such as gemma3_4b, or data.dir to problems without pictures"
  )
  for read in (batches, eval_batches):
    with pytest.raises(ValueError, match=remedy):
      read(
        tokenizer, **BLIND, **({"num_problems": 13} if read != batches else {})
      )


def test_demonstrations_come_with_the_worked_answer(tokenizer):
  for batch in batches(tokenizer, kind="demonstrations"):
    assert batch.completion_ids.shape == (4, 1, 24)
    for ids, mask, problem in zip(
      batch.completion_ids, batch.completion_mask, batch.problems, strict=True
    ):
      expected = chat_prompts.encode_completion(
        chat_prompts.demonstration(problem), tokenizer
      )
      assert ids[0][mask[0]].tolist() == expected
      assert (ids[0][~mask[0]] == GEMMA3.pad).all()
      assert mask[0].sum() == len(expected)


def test_preferences_are_a_right_and_a_wrong_completion(tokenizer):
  for batch in batches(tokenizer, kind="preference"):
    assert batch.completion_ids.shape == (4, 2, 24)
    for ids, problem in zip(batch.completion_ids, batch.problems, strict=True):
      chosen, rejected = map(tokenizer.decode, ids)
      assert chosen == chat_prompts.demonstration(problem)
      assert rejected != chosen


def test_preferences_alone_come_with_labels(tokenizer):
  for batch in batches(tokenizer, kind="preference"):
    assert batch.labels.dtype == np.float32
    np.testing.assert_array_equal(batch.labels, [[1, 0]] * 4)
  for kind in ("online", "demonstrations"):
    assert all(batch.labels is None for batch in batches(tokenizer, kind=kind))


def test_a_group_of_three_has_three_different_completions(tokenizer):
  for batch in batches(tokenizer, kind="preference", num_labelled=3):
    np.testing.assert_array_equal(batch.labels, [[1, 0, 0]] * 4)
    assert batch.completion_ids.shape == (4, 3, 24)
    for ids in batch.completion_ids:
      assert len(set(map(tokenizer.decode, ids))) == 3


def own_completions(problem, rng):
  """Two completions for most problems; for others a long one or none."""
  if problem.pid == "p1":
    raise records.BadRecord("no_completions", "none for p1")
  last = "7" * 24 if problem.pid == "p2" else f"not {problem.pid}"
  return records.LabelledCompletion(
    problem.pid, -0.5
  ), records.LabelledCompletion(last, 3.0)


def test_own_completions_keep_their_order_and_labels(tokenizer):
  found = batches(
    tokenizer, kind="preference", completion_source=own_completions
  )
  for batch in found:
    assert batch.valid.all()
    for row in range(4):
      pid = batch.problems[row].pid
      assert pid not in ("p1", "p2")
      texts = [tokenizer.decode(ids) for ids in batch.completion_ids[row]]
      assert texts == [pid, f"not {pid}"]
      np.testing.assert_array_equal(batch.labels[row], [-0.5, 3.0])


def test_a_missing_completion_has_no_label_and_no_tokens(tokenizer):
  """The third of a group of two, and all completions of an invalid row."""
  source = FailingSource(PROBLEMS, unreadable={3})
  for batch in eval_batches(
    tokenizer,
    source,
    kind="preference",
    max_new_tokens=24,
    completion_source=own_completions,
    num_labelled=3,
  ):
    there = batch.valid[:, None] & [True, True, False]
    np.testing.assert_array_equal(np.isnan(batch.labels), ~there)
    np.testing.assert_array_equal(batch.completion_mask.any(-1), there)
    assert (batch.completion_ids[~there] == GEMMA3.pad).all()


def test_a_problem_asked_again_may_get_another_wrong_completion(tokenizer):
  rejected = {
    tokenizer.decode(batch.completion_ids[row, 1])
    for batch in batches(tokenizer, kind="preference", steps=13)
    for row, problem in enumerate(batch.problems)
    if problem.pid == "p5"
  }
  assert len(rejected) > 1


def test_a_bad_record_masks_its_row_and_shifts_nothing(tokenizer):
  """Records that are unreadable, too long, or have a damaged image."""
  long = dataclasses.replace(PROBLEMS[4], query="7" * 90)
  torn = dataclasses.replace(PROBLEMS[6], images=(b"no picture",))
  problems = [*PROBLEMS]
  problems[4], problems[6] = long, torn
  source = FailingSource(problems, unreadable={2})
  asked = {}
  for good, bad in zip(
    eval_batches(tokenizer), eval_batches(tokenizer, source), strict=True
  ):
    for row, problem in enumerate(good.problems):
      if problem.pid in ("p2", "p4", "p6", ""):
        assert not bad.valid[row]
        asked[problem.pid] = bad.problems[row].pid
        frame = bad.prompt_ids[row, : bad.prompt_length[row]]
        assert GEMMA3.image_placeholder not in frame
        assert not bad.images[row].any()
      else:
        assert bad.valid[row]
        assert bad.problems[row] == problem
        np.testing.assert_array_equal(bad.images[row], good.images[row])
  assert asked == {"p2": "unreadable:2", "p4": "p4", "p6": "p6", "": ""}


def pids_of(found):
  return [problem.pid for batch in found for problem in batch.problems]


@pytest.mark.parametrize("kind", prompt_rows.KINDS)
def test_an_epoch_is_a_permutation_of_the_usable_records(tokenizer, kind):
  """Their order is that of a source of these records alone."""
  problems = [*PROBLEMS]
  problems[4] = dataclasses.replace(PROBLEMS[4], query="7" * 90)
  # Too long only where the completion comes with the problem.
  problems[7] = dataclasses.replace(PROBLEMS[7], solution="7" * 24)
  left_out = {2, 4, 9} | ({7} if kind != "online" else set())
  usable = [p for i, p in enumerate(problems) if i not in left_out]
  source, epoch = FailingSource(problems, unreadable={2, 9}), len(usable)
  found = batches(tokenizer, source, kind=kind, steps=3 * epoch // 4 + 1)
  assert all(batch.valid.all() for batch in found)
  pids = pids_of(found)
  for start in range(0, 3 * epoch, epoch):
    assert sorted(pids[start : start + epoch]) == sorted(p.pid for p in usable)
  alone = batches(tokenizer, usable, kind=kind, steps=3 * epoch // 4 + 1)
  assert pids == pids_of(alone)


@pytest.mark.parametrize("kind", ["online", "demonstrations"])
def test_what_is_left_out_is_said_once_with_its_setting(
  tokenizer, caplog, kind
):
  problems = [*PROBLEMS]
  problems[4] = dataclasses.replace(PROBLEMS[4], query="7" * 90)
  problems[7] = dataclasses.replace(PROBLEMS[7], solution="7" * 24)
  with caplog.at_level(logging.INFO, "absl"):
    batches(tokenizer, problems, kind=kind, split="train")
  expected = {
    "online": "train: 12 of 13 problems can be used; left out: 1 with a prompt "
    "of more than 64 tokens (the last of data.prompt_buckets).",
    "demonstrations": "train: 11 of 13 problems can be used; left out: 1 with "
    "a prompt of more than 64 tokens (the last of data.prompt_buckets), 1 with "
    "a completion of more than 24 tokens (rollout.max_new_tokens).",
  }
  assert caplog.messages == [expected[kind]]
  assert caplog.records[0].levelname == "INFO"


def test_a_bad_record_looks_the_same_to_every_shard(tokenizer):
  source = FailingSource(PROBLEMS, unreadable={0, 1, 2, 3})
  whole = batches(tokenizer, source)
  halves = [
    batches(tokenizer, source, shards=(index,), shard_count=2)
    for index in range(2)
  ]
  for batch, parts in zip(whole, zip(*halves, strict=True), strict=True):
    assert_same(batch, joined(parts))


def test_a_completion_of_exactly_the_most_tokens_fits(tokenizer):
  longest = max(
    len(
      chat_prompts.encode_completion(
        chat_prompts.demonstration(problem), tokenizer
      )
    )
    for problem in PROBLEMS
  )
  for spare in (0, 1):
    found = batches(
      tokenizer, kind="demonstrations", max_new_tokens=longest - spare
    )
    assert (len(set(pids_of(found))) == NUM_PROBLEMS) == (spare == 0)


def test_every_row_of_a_step_draws_its_own_wrong_completion(tokenizer):
  """Twelve copies of one problem with six possible wrong answers."""
  found = batches(
    tokenizer, PROBLEMS[:1] * 12, kind="preference", prompts_per_step=12
  )
  drawn = [tuple(map(bytes, batch.completion_ids[:, 1])) for batch in found]
  assert len(set(drawn[0])) > 1
  assert len(set(drawn)) == len(drawn)


def test_one_usable_record_is_enough(tokenizer):
  source = FailingSource(PROBLEMS, unreadable=set(range(NUM_PROBLEMS)) - {3})
  for batch in batches(tokenizer, source):
    assert [p.pid for p in batch.problems] == ["p3"] * 4


COLOURS = ("red", "blue", "green", "black", "white")


def make_choice(index, choices=COLOURS):
  """A problem whose first option is right."""
  problem = dataclasses.replace(
    make_problem(index),
    choices=choices,
    answer=choices[0],
    question_type="multi_choice",
    answer_type="text",
  )
  query = records.official_query(problem)
  return dataclasses.replace(problem, query=query)


# The last problem refers to its options and keeps their order.
CHOICES = [make_choice(index) for index in range(NUM_PROBLEMS - 1)]
CHOICES.append(make_choice(NUM_PROBLEMS - 1, ("A", "B", "C")))
SHUFFLED = dict(
  shuffle_options=True, prompt_buckets=(256, 1024), max_new_tokens=64
)


@pytest.mark.parametrize("kind", prompt_rows.KINDS)
def test_shuffled_rows_ask_what_the_reward_will_see(tokenizer, kind):
  orders = set()
  for batch in batches(tokenizer, CHOICES, kind=kind, **SHUFFLED):
    assert batch.valid.all()
    for row, problem in enumerate(batch.problems):
      original = CHOICES[int(problem.pid[1:])]
      if original.choices == COLOURS:
        orders.add(problem.choices)
      else:
        assert problem == original
      assert problem.answer == original.answer
      letter = chr(65 + problem.choices.index(problem.answer))
      assert verify.verify(f"<answer>{letter}</answer>", problem).correct
      ids = chat_prompts.encode_prompt(
        problem, tokenizer, soft_tokens=SOFT_TOKENS
      )
      length = batch.prompt_length[row]
      assert batch.prompt_ids[row, :length].tolist() == ids
      line = f"({letter}) {problem.answer}"
      assert line in tokenizer.decode([i for i in ids if i not in (106,)])
  # Thirty rows draw few of 120 orders twice.
  assert len(orders) > 20


def test_a_problem_asked_again_has_another_order_each_time(tokenizer):
  """Twelve copies in each of two steps have different orders."""
  found = batches(
    tokenizer,
    CHOICES[:1] * 12,
    prompts_per_step=12,
    steps=2,
    **SHUFFLED,
  )
  orders = [problem.choices for batch in found for problem in batch.problems]
  assert len(set(orders)) > 18


def test_another_seed_draws_other_orders(tokenizer):
  left, right = (
    batches(
      tokenizer,
      CHOICES[:1] * 4,
      steps=1,
      seed=seed,
      **SHUFFLED,
    )[0]
    for seed in (0, 1)
  )
  assert [p.choices for p in left.problems] != [
    p.choices for p in right.problems
  ]


@pytest.mark.parametrize("kind", prompt_rows.KINDS)
def test_shuffled_shards_together_hold_the_rows_of_one(tokenizer, kind):
  """Also after a restart."""
  alone = batches(tokenizer, CHOICES, kind=kind, **SHUFFLED)[5:]
  shards = [
    batches(
      tokenizer,
      CHOICES,
      kind=kind,
      steps=3,
      start_step=5,
      shards=(index,),
      shard_count=2,
      **SHUFFLED,
    )
    for index in range(2)
  ]
  for whole, parts in zip(alone, zip(*shards, strict=True), strict=True):
    assert_same(whole, joined(parts))


def test_shuffling_changes_neither_the_order_of_problems_nor_the_widths(
  tokenizer,
):
  """Problems without options do not change at all."""
  for source in (CHOICES, PROBLEMS):
    plain = batches(tokenizer, source, **SHUFFLED | dict(shuffle_options=False))
    mixed = batches(tokenizer, source, **SHUFFLED)
    for left, right in zip(plain, mixed, strict=True):
      assert left.prompt_ids.shape == right.prompt_ids.shape
      assert [p.pid for p in left.problems] == [p.pid for p in right.problems]
      if source is PROBLEMS:
        assert_same(left, right)


def test_an_order_that_the_bucket_cannot_hold_is_not_taken(tmp_path):
  """Every shard takes the bucket of the published order."""
  path = tmp_path / "tokenizer.model"
  tokens.train([chat_prompts.chat_text(CHOICES[0])] * 2, path, vocab_size=512)
  # Encodes other orders in more or fewer pieces.
  tokenizer = tokens.Tokenizer(path)

  def length(problem):
    return len(chat_prompts.encode_prompt(problem, tokenizer, soft_tokens=3))

  orders = [
    shuffle_options.shuffle(CHOICES[0], np.random.default_rng(seed))
    for seed in range(40)
  ]
  problem = sorted(orders, key=length)[10]
  bucket = length(problem)
  assert max(map(length, orders)) > bucket
  is_published = []
  for batch in batches(
    tokenizer,
    [problem] * 4,
    steps=10,
    shuffle_options=True,
    prompt_buckets=(bucket, 1024),
  ):
    assert batch.valid.all() and batch.prompt_ids.shape[1] == bucket
    is_published += [asked == problem for asked in batch.problems]
  # By chance, one of 120 orders is drawn about once in 40 rows at most.
  assert 10 < sum(is_published) < 40


def test_evaluation_never_shuffles(tokenizer):
  found = list(eval_batches(tokenizer, CHOICES, prompt_buckets=(256,)))
  asked = [p for batch in found for p in batch.problems if p.pid]
  assert asked == CHOICES[:10]


@pytest.mark.parametrize("name", chat_prompts.TEMPLATES)
def test_prompts_and_completions_follow_the_template(tokenizer, name):
  template = chat_prompts.TEMPLATES[name]
  wide = dict(template=template, prompt_buckets=(256,), max_new_tokens=96)

  def ids_of(problem):
    return chat_prompts.encode_prompt(
      problem,
      tokenizer,
      soft_tokens=SOFT_TOKENS,
      template=template,
    )

  training = [
    batches(tokenizer, kind=kind, steps=1, **wide)[0]
    for kind in prompt_rows.KINDS
  ]
  held_out = eval_batches(tokenizer, template=template, prompt_buckets=(256,))[
    0
  ]
  for batch in (*training, held_out):
    assert batch.valid.all()
    for row, problem in enumerate(batch.problems):
      length = batch.prompt_length[row]
      assert batch.prompt_ids[row, :length].tolist() == ids_of(problem)
  for batch in training:
    for row, problem in enumerate(batch.problems):
      if batch.completion_ids is not None:
        first = tokenizer.decode(batch.completion_ids[row, 0])
        assert first == chat_prompts.demonstration(problem, template=template)
      if batch.labels is not None:
        wrong = tokenizer.decode(batch.completion_ids[row, 1])
        opened, closed = template.answer
        assert opened in wrong and wrong.endswith(closed)


def test_evaluation_asks_the_first_problems_once_in_their_order(tokenizer):
  found = list(eval_batches(tokenizer))
  assert [len(batch.problems) for batch in found] == [4, 4, 4]
  asked = [problem.pid for batch in found for problem in batch.problems]
  assert asked == [f"p{index}" for index in range(10)] + ["", ""]
  valid = np.concatenate([batch.valid for batch in found])
  np.testing.assert_array_equal(valid, [True] * 10 + [False] * 2)
  places = np.concatenate([batch.prompt_index for batch in found])
  np.testing.assert_array_equal(places, range(12))


LABELLED = dict(
  kind="preference",
  max_new_tokens=24,
  completion_source=preferences.synthesize(3),
  num_labelled=3,
)


@pytest.mark.parametrize("replies", [{}, LABELLED], ids=["none", "drawn"])
def test_evaluation_can_be_iterated_again(tokenizer, replies):
  evaluation = eval_batches(tokenizer, **replies)
  assert len(evaluation) == 3
  for left, right in zip(evaluation, evaluation, strict=True):
    assert_same(left, right)


@pytest.mark.parametrize("replies", [{}, LABELLED], ids=["none", "drawn"])
def test_evaluation_shards_together_hold_every_row(tokenizer, replies):
  shards = [
    eval_batches(tokenizer, shards=(index,), shard_count=2, **replies)
    for index in range(2)
  ]
  alone = eval_batches(tokenizer, **replies)
  for whole, *parts in zip(alone, *shards, strict=True):
    assert_same(whole, joined(parts))


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_evaluation_compares_the_same_completions_for_any_batch_size(
  tokenizer, batch_size
):
  def compared(size):
    found = list(eval_batches(tokenizer, batch_size=size, **LABELLED))
    return [
      np.concatenate([getattr(batch, name) for batch in found])[:10]
      for name in ("completion_ids", "completion_mask", "labels")
    ]

  ids, mask, labels = compared(batch_size)
  np.testing.assert_equal([ids, mask, labels], compared(2))
  np.testing.assert_array_equal(labels, [[1, 0, 0]] * 10)
  assert ids.shape == mask.shape == (10, 3, 24)


def test_evaluation_without_labels_has_no_completions(tokenizer):
  for batch in eval_batches(tokenizer):
    assert batch.completion_ids is None
    assert batch.completion_mask is None
    assert batch.labels is None


def test_evaluation_of_fewer_problems_than_asked_ends_with_the_source(
  tokenizer,
):
  found = list(eval_batches(tokenizer, num_problems=99))
  asked = [p.pid for batch in found for p in batch.problems if p.pid]
  assert asked == [problem.pid for problem in PROBLEMS]


def test_evaluation_takes_problems_without_answers_and_training_does_not(
  tokenizer,
):
  hidden = [dataclasses.replace(p, answer="") for p in PROBLEMS]
  assert all(
    b.valid[: len(b.problems)].any() for b in eval_batches(tokenizer, hidden)
  )
  hidden[0] = PROBLEMS[0]
  with pytest.raises(
    ValueError, match="12 of 13 problems have none, the first p1. Set rewards"
  ):
    batches(tokenizer, hidden)


@pytest.mark.parametrize(
  ("kind", "pays", "answer", "fault"),
  [
    ("online", False, "a long text", "13 of 13 problems have none"),
    ("online", True, "", ""),
    # It states the reference answer, which no rule need check.
    ("demonstrations", False, "a long text", ""),
    ("demonstrations", False, "", "none of the 13 records can be used"),
    ("preference", False, "a text", "have none.*preference_rewards=labels"),
    ("preference", True, "a text", ""),
  ],
)
def test_training_takes_what_something_pays_for(
  tokenizer, kind, pays, answer, fault
):
  unchecked = [
    dataclasses.replace(x, answer_type="unchecked", answer=answer)
    for x in PROBLEMS
  ]
  given = tuple(records.LabelledCompletion(x, float(x)) for x in "12")
  settings = dict(kind=kind, rewards_unchecked=pays, steps=1)
  settings["completion_source"] = lambda problem, rng: given
  if not fault:
    assert batches(tokenizer, unchecked, **settings)[0].valid.all()
    return
  with pytest.raises(ValueError, match=fault):
    batches(tokenizer, unchecked, **settings)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(kind="offline"), r"data.kind \('offline'\) must be one of"),
    (dict(prompts_per_step=3, shard_count=2), r"prompts_per_step \(3\) must"),
    (dict(prompts_per_step=0), r"prompts_per_step \(0\) must"),
    (dict(prompt_buckets=(64, 32)), "must ascend"),
    (dict(prompt_buckets=(8,)), "must ascend to at least"),
    (dict(prompt_buckets=()), "must ascend to at least"),
    (dict(shards=(1,)), r"shards \(\(1,\)\) must"),
    (dict(prompt_buckets=(24,)), "none of the 13 records"),
    (dict(kind="demonstrations", max_new_tokens=4), "none of the 13 records"),
  ],
)
def test_a_setting_that_breaks_a_rule_is_refused(tokenizer, changes, message):
  with pytest.raises(ValueError, match=message):
    batches(tokenizer, **changes)


def test_no_records_are_refused(tokenizer):
  with pytest.raises(ValueError, match="none of the 0 records"):
    batches(tokenizer, [])


@pytest.mark.parametrize("for_training", [True, False])
def test_problems_whose_scorer_is_not_installed_are_refused(
  tokenizer, monkeypatch, for_training
):
  """At the start of a run, and not when the first completion is judged."""
  scored = dataclasses.replace(PROBLEMS[0], answer_type="scored")
  settings = dict(seed=5, prompt_buckets=(64,), max_new_tokens=24)
  builder = make_builder(tokenizer, [PROBLEMS[1], scored], **settings)

  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", missing)
  with pytest.raises(ValueError, match="install it, as by pip install"):
    record_index.scan(builder, 2, for_training=for_training)
  record_index.scan(builder, 1, for_training=for_training)
