"""Batches whose rows show one image, with and without crops."""

import dataclasses
import io
import itertools

import numpy as np
import PIL.Image
import pytest

from data_pipelines import images, pipeline, prompt_rows, records
from data_pipelines.text import chat_prompts, shuffle_options
from data_pipelines.text import tokenizer as tokens

SOFT_TOKENS, IMAGE_SIZE = 3, 8
SETTINGS = images.PanAndScan(
  enabled=True, min_crop_size=4, max_num_crops=4, min_ratio_to_activate=1.2
)
# Width and height, with 0, 2, 3 and 4 crops.
SIZES = {(10, 10): 0, (20, 10): 2, (10, 30): 3, (60, 10): 4}
# Long enough that no step has images of all sizes.
WHICH = (0, 0, 1, 0, 0, 3, 0, 0, 2, 0, 1, 0)


def make_image(index, size):
  rng = np.random.default_rng(index)
  pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def make_problem(index):
  question = f"How many in {index}?"
  return records.Problem(
    pid=f"p{index}",
    question=question,
    images=(make_image(index, list(SIZES)[WHICH[index]]),),
    choices=(),
    unit="",
    precision=-1,
    answer=str(index + 1),
    question_type="free_form",
    answer_type="integer",
    query=f"Question: {question}",
    solution="",
    metadata={},
  )


PROBLEMS = [make_problem(index) for index in range(len(WHICH))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train(map(chat_prompts.chat_text, PROBLEMS), path, vocab_size=512)
  return tokens.Tokenizer(path)


SHARED = dict(
  kind="online",
  max_new_tokens=8,
  prompt_buckets=(64, 256),
  image_size=IMAGE_SIZE,
  soft_tokens=SOFT_TOKENS,
  shards=(0,),
  shard_count=1,
  pan_and_scan=SETTINGS,
)


def batches(tokenizer, source=PROBLEMS, steps=6, **changes):
  order = dict(prompts_per_step=2, start_step=0, worker_processes=0)
  for name in order.keys() & changes.keys():
    order[name] = changes.pop(name)
  builder = prompt_rows.RowBuilder(
    source=source, tokenizer=tokenizer, **SHARED | dict(seed=3) | changes
  )
  return list(itertools.islice(pipeline.TrainBatches(builder, **order), steps))


def eval_batches(tokenizer, source=PROBLEMS, **changes):
  builder = prompt_rows.RowBuilder(
    source=source, tokenizer=tokenizer, **SHARED | dict(seed=0) | changes
  )
  return pipeline.EvalBatches(builder, num_problems=len(PROBLEMS), batch_size=5)


def num_shown(problem):
  return 1 + SIZES[PIL.Image.open(io.BytesIO(problem.images[0])).size]


def assert_same(left, right):
  for field in dataclasses.fields(pipeline.Batch):
    np.testing.assert_equal(
      getattr(left, field.name), getattr(right, field.name), field.name
    )


def test_a_row_shows_its_image_then_its_crops_then_nothing(tokenizer):
  slots = set()
  for batch in batches(tokenizer):
    assert batch.valid.all()
    counts = [num_shown(problem) for problem in batch.problems]
    assert batch.images.shape[1] == max(counts)
    slots.add(max(counts))
    for row, (problem, count) in enumerate(
      zip(batch.problems, counts, strict=True)
    ):
      expected = chat_prompts.encode_prompt(
        problem,
        tokenizer,
        soft_tokens=SOFT_TOKENS,
        num_crops=[count - 1],
      )
      ids = batch.prompt_ids[row, : batch.prompt_length[row]].tolist()
      assert ids == expected
      assert ids.count(tokenizer.start_of_image) == count
      decoded = images.decode(problem.images[0])
      views = images.views(decoded, IMAGE_SIZE, SETTINGS)
      np.testing.assert_array_equal(batch.images[row, :count], views)
      assert not batch.images[row, count:].any()
  assert slots == {1, 3, 4, 5}


def test_each_of_several_images_is_followed_by_its_own_crops(tokenizer):
  shown = [make_image(i, size) for i, size in enumerate(SIZES)]
  problem = dataclasses.replace(PROBLEMS[0], images=tuple(shown))
  (batch,) = batches(
    tokenizer, [problem], prompts_per_step=1, steps=1, prompt_buckets=(512,)
  )
  views = [
    images.views(images.decode(image), IMAGE_SIZE, SETTINGS) for image in shown
  ]
  assert [len(x) for x in views] == [1 + count for count in SIZES.values()]
  np.testing.assert_array_equal(batch.images[0], np.concatenate(views))
  ids = chat_prompts.encode_prompt(
    problem,
    tokenizer,
    soft_tokens=SOFT_TOKENS,
    num_crops=list(SIZES.values()),
  )
  assert batch.prompt_ids[0, : len(ids)].tolist() == ids
  assert batch.valid.all()


def test_every_shard_has_the_slots_of_the_whole_step(tokenizer):
  shards = [
    batches(tokenizer, shards=(index,), shard_count=2) for index in range(2)
  ]
  for whole, *parts in zip(batches(tokenizer), *shards, strict=True):
    for name in ("images", "prompt_ids", "prompt_length"):
      joined = np.concatenate([getattr(part, name) for part in parts])
      np.testing.assert_array_equal(joined, getattr(whole, name), name)


def test_a_restart_shows_what_the_unbroken_run_does(tokenizer):
  resumed = batches(tokenizer, start_step=2, steps=4)
  for left, right in zip(batches(tokenizer)[2:], resumed, strict=True):
    assert_same(left, right)


def test_crops_that_make_a_prompt_too_long_leave_it_out(tokenizer):
  """The other problems are asked as before."""
  found, asked = (
    {
      problem.pid: batch.prompt_length[row]
      for batch in batches(tokenizer, steps=12, prompt_buckets=buckets)
      for row, problem in enumerate(batch.problems)
      if batch.valid[row]
    }
    for buckets in ((128,), (64,))
  )
  assert asked == {pid: n for pid, n in found.items() if n <= 64}
  assert 0 < len(asked) < len(found)


class ChangingSource:
  """A source whose images change later."""

  def __init__(self, before, after):
    self.before, self.after, self.read = before, after, set()

  def __len__(self):
    return len(self.before)

  def __getitem__(self, index, /):
    now = self.after if index in self.read else self.before
    self.read.add(index)
    return now[index]


def with_images(size):
  return [
    dataclasses.replace(problem, images=(make_image(index, size),))
    for index, problem in enumerate(PROBLEMS)
  ]


@pytest.fixture
def reasons(monkeypatch):
  """The reasons for masked rows."""
  seen = []
  monkeypatch.setattr(
    prompt_rows, "warn_unusable", lambda index, error: seen.append(error.reason)
  )
  return seen


def test_images_that_grew_under_the_run_are_masked(tokenizer, reasons):
  source = ChangingSource(with_images((10, 10)), with_images((20, 10)))
  for batch in batches(tokenizer, source):
    assert not batch.valid.any()
    assert batch.images.shape[1] == 1 and not batch.images.any()
  assert set(reasons) == {"image_count"}


def test_a_header_that_lies_about_its_image_masks_the_row(
  tokenizer, monkeypatch, reasons
):
  monkeypatch.setattr(images, "num_crops", lambda data, settings: 2)
  for batch in batches(tokenizer):
    told = [num_shown(problem) == 3 for problem in batch.problems]
    np.testing.assert_array_equal(batch.valid, told)
  assert set(reasons) == {"image_count"}


def test_an_unreadable_header_masks_its_row(tokenizer):
  damaged = [
    dataclasses.replace(problem, images=(b"" if index == 5 else b"?",))
    if index in (5, 8)
    else problem
    for index, problem in enumerate(PROBLEMS)
  ]
  for batch in batches(tokenizer, damaged):
    told = [problem.pid not in ("p5", "p8") for problem in batch.problems]
    np.testing.assert_array_equal(batch.valid, told)


def test_options_are_shuffled_only_where_crops_leave_room(
  tokenizer, monkeypatch
):
  """The longest prompt fills its bucket; the others have room for words."""
  longest = max(b.prompt_length.max() for b in batches(tokenizer))

  def wordier(problem, rng):
    return dataclasses.replace(problem, query=problem.query + "?" * 8)

  monkeypatch.setattr(shuffle_options, "shuffle", wordier)
  options = dict(shuffle_options=True, prompt_buckets=(int(longest),))
  for batch in batches(tokenizer, **options):
    for problem, length in zip(
      batch.problems, batch.prompt_length, strict=True
    ):
      added = problem.query.endswith("????????")
      assert added == (num_shown(problem) < 5), (problem.pid, length)


def test_a_model_that_cannot_see_reads_no_header(tokenizer):
  blind = [dataclasses.replace(p, images=()) for p in PROBLEMS]
  for batch in batches(tokenizer, blind, image_size=0, soft_tokens=0):
    assert batch.valid.all() and batch.images.shape[1] == 0


def test_evaluation_counts_the_crops_of_another_source_again(tokenizer):
  evaluation = eval_batches(tokenizer)
  slots = [batch.images.shape[1] for batch in evaluation]
  assert slots == [3, 5, 3]
  cut = with_images((10, 30))
  again = evaluation.with_source(cut)
  for left, right in zip(again, eval_batches(tokenizer, cut), strict=True):
    assert_same(left, right)
    assert left.images.shape[1] == 4
