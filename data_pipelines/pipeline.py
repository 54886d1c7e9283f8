"""Batches for training and evaluation, in an order that seed and step fix.

Step s asks the records `order[s * B : (s + 1) * B]` of one endless shuffled
sequence. A reader builds the rows of its shards of that batch and no others,
so neither the number of shards nor a restart changes what a step holds, and
the step is the whole position. A record that cannot be used becomes a masked
row, never a gap. Knows nothing of devices, sampling or rewards.

References:
  Grain: https://github.com/google/grain
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import grain
import numpy as np
from absl import logging

from data_pipelines import images, records
from data_pipelines.preferences import replies as preferences
from data_pipelines.text import chat_prompts
from data_pipelines.text import shuffle_options as option_order
from data_pipelines.text import tokenizer as tokens

KINDS = ("online", "demonstrations", "preference")
# In place of a prompt's length.
_UNUSABLE, _PADDING = 0, -1
_MOST_STEPS_LOOKED_AT = 10_000
# Four threads keep ahead of any training step; each holds one batch.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
# What a source raises on a damaged record; a bug raises something else.
_UNREADABLE = (ValueError, OSError)


class Source(Protocol):
  """Random access to problems: the same index is always the same problem."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> records.Problem: ...


@dataclasses.dataclass(frozen=True)
class Batch:
  """The rows of one step that one reader holds, as NumPy arrays.

  Attributes:
    prompt_ids: int32 [B, P], padded on the right with `PAD`.
    prompt_length: int32 [B].
    images: uint8 [B, I, H, H, 3]; I = 0 for models that cannot see. Row b's
      come first, one for each <start_of_image> of its prompt, in order; what
      follows them is black and read by nothing.
    prompt_index: int32 [B], the row's place in the batch of all shards; in an
      evaluation, its place among all problems.
    valid: bool [B]. False marks a stand-in: a record that is damaged or too
      long, or padding. Such a row is well-formed and must not count.
    problems: The B problems. A damaged one is empty but for a pid that names
      its index; one that is too long is itself; padding has the pid "".
    completion_ids: int32 [B, C, T], or None for kind "online". C = 1 for
      "demonstrations", and `num_replies` for "preference".
    completion_mask: bool [B, C, T]: real tokens, the end of turn included; all
      False for a reply that is not there.
    labels: float32 [B, C] for "preference", higher for what is preferred, NaN
      for a reply that is not there; otherwise None.
  """

  prompt_ids: np.ndarray
  prompt_length: np.ndarray
  images: np.ndarray
  prompt_index: np.ndarray
  valid: np.ndarray
  problems: tuple[records.Problem, ...]
  completion_ids: np.ndarray | None
  completion_mask: np.ndarray | None
  labels: np.ndarray | None


def make_pipeline(
  source: Source,
  tokenizer: tokens.Tokenizer,
  *,
  kind: str,
  seed: int,
  prompts_per_step: int,
  prompt_buckets: tuple[int, ...],
  max_new_tokens: int,
  image_size: int,
  soft_tokens: int,
  num_images: int,
  shards: tuple[int, ...],
  shard_count: int,
  start_step: int,
  worker_processes: int = 0,
  replies: preferences.Source | None = None,
  num_replies: int = 2,
  template: chat_prompts.Template = chat_prompts.TAGGED,
  shuffle_options: bool = False,
  pan_and_scan: images.PanAndScan = images.WHOLE,
) -> "TrainBatches":
  """The endless batches of one reader, from `start_step` on.

  Args:
    source: The problems of the training split.
    tokenizer: What spells them.
    kind: "online", "demonstrations" or "preference"; see `Batch`.
    seed: Of the order, of the rejected answers of "preference", and of the
      order of options.
    prompts_per_step: Rows of a step over all shards.
    prompt_buckets: Ascending lengths, in tokens, that prompts are padded to.
      A step takes the smallest that holds its longest prompt on any shard.
    max_new_tokens: T; a longer completion masks its row.
    image_size: H, in pixels.
    soft_tokens: Placeholders for each picture.
    num_images: Pictures in a prompt: 0 or 1.
    shards: Which parts of a step are read here; ascending, and not always one
      beside the other.
    shard_count: How many equal parts a step is cut into.
    start_step: The first step to yield.
    worker_processes: Processes that build batches; 0 builds them in threads of
      this one. What they build is the same. Needs parsed absl flags, which
      Grain reads, and a `__main__` that can be imported again.
    replies: What "preference" learns from; None draws a right reply and wrong
      ones.
    num_replies: How many of them.
    template: How prompts ask for a reply, and demonstrations give it.
    shuffle_options: Whether a row asks with its options in an order of its
      own, where `option_order` can change it. `Batch.problems` are as asked.
    pan_and_scan: Which pictures are followed by crops of them. A step has room
      for as many images as its richest row on any shard has.

  Returns:
    An iterator whose n-th batch is that of step `start_step + n`.

  Raises:
    ValueError: A setting breaks a rule, or no record can be used.
  """
  if kind not in KINDS:
    raise ValueError(f"data.kind ({kind!r}) must be one of {KINDS}.")
  rows = _Rows(
    source=source,
    tokenizer=tokenizer,
    kind=kind,
    seed=seed,
    prompt_buckets=prompt_buckets,
    max_new_tokens=max_new_tokens,
    image_size=image_size,
    soft_tokens=soft_tokens,
    num_images=num_images,
    shards=shards,
    shard_count=shard_count,
    replies=replies or preferences.drawn(num_replies, template=template),
    num_replies=num_replies,
    template=template,
    shuffle_options=shuffle_options,
    pan_and_scan=pan_and_scan,
  )
  rows.check_batch_size("data.prompts_per_step", prompts_per_step)
  survey = rows.survey(len(source))
  if not survey.lengths.any():
    raise ValueError(
      f"none of the {len(source)} records can be used for training: the "
      "warnings above say why; raise data.prompt_buckets or prepare the data "
      "again."
    )

  def batch(step: int, indices: np.ndarray) -> Batch:
    return rows.batch(indices, survey.of(indices), step=step, first_row=0)

  order = (
    grain.MapDataset.range(len(source))
    .shuffle(seed=seed)
    .repeat()
    .batch(prompts_per_step, drop_remainder=True)
  )
  steps = order.map_with_index(batch)
  # Cut before workers share it out: their own positions would only do for the
  # same number of them, and the step is to be the whole position.
  stream = steps[start_step:].to_iter_dataset(_READ_OPTIONS)
  if worker_processes:
    stream = stream.mp_prefetch(
      grain.multiprocessing.MultiprocessingOptions(num_workers=worker_processes)
    )
  return TrainBatches(
    iter(stream),
    lambda step: rows.shape(survey.of(np.asarray(order[start_step + step]))),
  )


class TrainBatches:
  """Batches without end, and what is known of those to come."""

  def __init__(
    self, stream: Iterator[Batch], shape_of: Callable[[int], tuple[int, int]]
  ):
    self._stream, self._shape_of = stream, shape_of

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._stream)

  def shapes(self, num_steps: int) -> set[tuple[int, int]]:
    """Padded lengths of prompts, and images of each, in the first batches.

    Of very many batches the first alone are looked at: what is not among them
    comes so seldom that it may be compiled when it does.
    """
    num_steps = min(num_steps, _MOST_STEPS_LOOKED_AT)
    return {self._shape_of(step) for step in range(num_steps)}


def make_eval_batches(
  source: Source,
  tokenizer: tokens.Tokenizer,
  *,
  num_problems: int,
  batch_size: int,
  prompt_buckets: tuple[int, ...],
  image_size: int,
  soft_tokens: int,
  num_images: int,
  shards: tuple[int, ...],
  shard_count: int,
  max_new_tokens: int = 0,
  replies: preferences.Source | None = None,
  num_replies: int = 0,
  template: chat_prompts.Template = chat_prompts.TAGGED,
  pan_and_scan: images.PanAndScan = images.WHOLE,
) -> "EvalBatches":
  """One reader's batches of the first problems of `source`, in its order.

  Args:
    source: The problems of the split.
    tokenizer: What spells them.
    num_problems: How many; all of them if there are fewer.
    batch_size: Rows of a batch over all shards.
    prompt_buckets: As for `make_pipeline`.
    image_size: As for `make_pipeline`.
    soft_tokens: As for `make_pipeline`.
    num_images: As for `make_pipeline`.
    shards: As for `make_pipeline`.
    shard_count: As for `make_pipeline`.
    max_new_tokens: T of the replies.
    replies: Labelled completions to bring along with each problem; None for
      prompts alone.
    num_replies: How many of them.
    template: How prompts ask for a reply.
    pan_and_scan: As for `make_pipeline`.

  Returns:
    Batches of equal size, built when they are asked for; the last one is
    filled up with padding rows. A row counts as a problem, answered or not,
    if its problem has a pid.

  Raises:
    ValueError: A setting breaks a rule.
  """
  rows = _Rows(
    source=source,
    tokenizer=tokenizer,
    kind="preference" if replies else "online",
    seed=0,
    prompt_buckets=prompt_buckets,
    max_new_tokens=max_new_tokens,
    image_size=image_size,
    soft_tokens=soft_tokens,
    num_images=num_images,
    shards=shards,
    shard_count=shard_count,
    replies=replies or preferences.drawn(2),
    num_replies=num_replies,
    template=template,
    shuffle_options=False,
    pan_and_scan=pan_and_scan,
    is_evaluation=True,
  )
  rows.check_batch_size("eval.batch_size", batch_size)
  survey = rows.survey(min(num_problems, len(source)))
  return EvalBatches(rows, survey, batch_size)


class EvalBatches:
  """Batches in a fixed order, to be gone through as often as needed."""

  def __init__(self, rows: "_Rows", survey: "_Survey", batch_size: int):
    self._rows, self._survey, self._size = rows, survey, batch_size

  def with_source(self, source: Source) -> "EvalBatches":
    """The same batches of another source, whose texts are the same.

    Its pictures may have other crops.
    """
    rows, survey = dataclasses.replace(self._rows, source=source), self._survey
    if rows.pan_and_scan.enabled:
      survey = rows.survey(len(survey.lengths))
    return EvalBatches(rows, survey, self._size)

  def __len__(self) -> int:
    return -(-len(self._survey.lengths) // self._size)

  def shapes(self) -> set[tuple[int, int]]:
    """Padded lengths of prompts, and images of each, in any of the batches."""
    return {self._rows.shape(self._surveyed(i)) for i in range(len(self))}

  def _surveyed(self, index: int) -> "_Survey":
    first = index * self._size
    part = self._survey.of(slice(first, first + self._size))
    return part.padded(self._size)

  def __getitem__(self, index: int) -> Batch:
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    first = index * self._size
    return self._rows.batch(
      np.arange(first, first + self._size),
      self._surveyed(index),
      step=0,
      first_row=first,
    )

  def __iter__(self) -> Iterator[Batch]:
    return iter(grain.MapDataset.source(self).to_iter_dataset(_READ_OPTIONS))


class _Survey(NamedTuple):
  """What every reader knows of every record before it builds any row.

  Attributes:
    lengths: int32 [n], of prompts; `_UNUSABLE` or `_PADDING` for what has none.
    images: int32 [n], pictures and crops that go with the prompt.
  """

  lengths: np.ndarray
  images: np.ndarray

  def of(self, indices: np.ndarray | slice) -> "_Survey":
    return _Survey(self.lengths[indices], self.images[indices])

  def padded(self, count: int) -> "_Survey":
    missing = (0, count - len(self.lengths))
    return _Survey(
      np.pad(self.lengths, missing, constant_values=_PADDING),
      np.pad(self.images, missing),
    )


class _Row(NamedTuple):
  """One prompt with its completions, before it is padded."""

  prompt: list[int]
  completions: list[list[int]]
  labels: list[float]
  images: np.ndarray
  valid: bool
  problem: records.Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
  """How one reader's rows are built from records."""

  source: Source
  tokenizer: tokens.Tokenizer
  kind: str
  seed: int
  prompt_buckets: tuple[int, ...]
  max_new_tokens: int
  image_size: int
  soft_tokens: int
  num_images: int
  shards: tuple[int, ...]
  shard_count: int
  replies: preferences.Source
  num_replies: int
  template: chat_prompts.Template
  shuffle_options: bool
  pan_and_scan: images.PanAndScan
  is_evaluation: bool = False

  def __post_init__(self):
    if self.num_images not in (0, 1):
      raise ValueError(
        f"num_images ({self.num_images}) must be 0 or 1: a problem has one "
        "picture, and data.pan_and_scan makes more of it."
      )
    shortest = len(self._prompt(_stand_in(""), 0))
    if (
      list(self.prompt_buckets) != sorted(set(self.prompt_buckets))
      or max(self.prompt_buckets, default=0) < shortest
    ):
      raise ValueError(
        f"data.prompt_buckets ({self.prompt_buckets}) must ascend to at least "
        f"{shortest}, the length of a prompt that asks nothing."
      )
    if not self.shards or list(self.shards) != sorted(
      set(self.shards) & set(range(self.shard_count))
    ):
      raise ValueError(
        f"shards ({self.shards}) must be one or more places, ascending from at "
        f"least 0 to below shard_count ({self.shard_count})."
      )

  def check_batch_size(self, setting: str, batch_size: int) -> None:
    """Holds that the shards can share a batch evenly."""
    if batch_size < 1 or batch_size % self.shard_count:
      raise ValueError(
        f"{setting} ({batch_size}) must be a positive multiple of the number "
        f"of data shards ({self.shard_count})."
      )

  def survey(self, count: int) -> _Survey:
    """Prompt lengths and image counts of the first records.

    Every reader surveys every record, so that all of them know how far a
    step's prompts and images must be padded without asking each other.
    """
    lengths = np.full(count, _UNUSABLE, np.int32)
    shown = np.zeros(count, np.int32)
    num_choices = num_fixed = 0
    for index in range(count):
      try:
        problem = self.source[index]
        num_crops = self._num_crops(problem)
        lengths[index] = self._usable_length(problem, num_crops)
        shown[index] = self.num_images + num_crops
      except _UNREADABLE as error:
        _warn(index, error)
        continue
      if self.shuffle_options and problem.choices:
        num_choices += 1
        num_fixed += option_order.is_fixed(problem)
      if not self.is_evaluation and not problem.has_answer:
        raise ValueError(
          f"problem {problem.pid} has no public answer, and training needs "
          "one for every problem; train on another split."
        )
    logging.info(
      "%d of %d records can be used.", np.count_nonzero(lengths), count
    )
    if self.shuffle_options:
      logging.info(
        "Options are shuffled, but for %d of %d problems that refer to them.",
        num_fixed,
        num_choices,
      )
    return _Survey(lengths, shown)

  def shape(self, survey: _Survey) -> tuple[int, int]:
    """What the prompts of a batch are padded to, and images of each.

    Args:
      survey: What is known of the batch's records.
    """
    shortest = len(self._prompt(_stand_in(""), 0))
    longest = max(int(survey.lengths.max()), shortest)
    bucket = next(size for size in self.prompt_buckets if size >= longest)
    return bucket, max(int(survey.images.max()), self.num_images)

  def batch(
    self,
    indices: np.ndarray,
    survey: _Survey,
    *,
    step: int,
    first_row: int,
  ) -> Batch:
    """This reader's rows of a batch.

    Args:
      indices: The record of each row of all shards.
      survey: What is known of each of these.
      step: What draws rejected answers and orders, with the row.
      first_row: The `prompt_index` of the first row.
    """
    size = len(indices) // self.shard_count
    places = [i for n in self.shards for i in range(n * size, (n + 1) * size)]
    lengths = survey.lengths
    bucket, slots = self.shape(survey)
    rows = [
      self._row(
        int(indices[i]), int(lengths[i]), [step, first_row + i], bucket, slots
      )
      for i in places
    ]
    ids, mask = self._padded_completions([row.completions for row in rows])
    return Batch(
      prompt_ids=_padded([row.prompt for row in rows], bucket),
      prompt_length=np.array([len(row.prompt) for row in rows], np.int32),
      images=np.stack([row.images for row in rows]),
      prompt_index=np.array(places, np.int32) + first_row,
      valid=np.array([row.valid for row in rows]),
      problems=tuple(row.problem for row in rows),
      completion_ids=ids,
      completion_mask=mask,
      labels=np.array([row.labels for row in rows], np.float32)
      if self.kind == "preference"
      else None,
    )

  def _row(
    self, index: int, length: int, place: list[int], bucket: int, slots: int
  ) -> _Row:
    """The row of a record, or one of the same shape that must not count."""
    problem = _stand_in("" if length == _PADDING else f"unreadable:{index}")
    if length != _PADDING:
      try:
        problem = self.source[index]
        if length != _UNUSABLE:
          num_crops = self._num_crops(problem)
          problem = self._as_asked(problem, place, bucket, num_crops)
          completions, labels = self._completions(problem, place)
          prompt = self._prompt(problem, num_crops)
          return _Row(
            prompt=prompt,
            completions=completions,
            labels=labels,
            images=self._images(problem, prompt, slots),
            valid=True,
            problem=problem,
          )
      except _UNREADABLE as error:
        _warn(index, error)
    return _Row(
      prompt=self._prompt(_stand_in(""), 0),
      completions=[[]] * self._num_completions,
      labels=[math.nan] * self._num_completions,
      images=self._blank(slots),
      valid=False,
      problem=problem,
    )

  @property
  def _num_completions(self) -> int:
    """Completions that come with each prompt."""
    kinds = {"online": 0, "demonstrations": 1, "preference": self.num_replies}
    return kinds[self.kind]

  def _blank(self, slots: int) -> np.ndarray:
    return np.zeros((slots, self.image_size, self.image_size, 3), np.uint8)

  def _num_crops(self, problem: records.Problem) -> int:
    if not self.num_images:
      return 0
    return images.num_crops(problem.image_bytes, self.pan_and_scan)

  def _prompt(self, problem: records.Problem, num_crops: int) -> list[int]:
    return chat_prompts.encode_prompt(
      problem,
      self.tokenizer,
      num_images=self.num_images,
      soft_tokens=self.soft_tokens,
      num_crops=num_crops,
      template=self.template,
    )

  def _as_asked(
    self,
    problem: records.Problem,
    place: list[int],
    bucket: int,
    num_crops: int,
  ) -> records.Problem:
    """The problem, its options in the row's order if that is wanted.

    All shards have settled on the bucket by the prompts as they are; an order
    that is spelt in more tokens than it holds is not taken.
    """
    if not self.shuffle_options:
      return problem
    # The last number tells this from what draws replies; 0 would not.
    rng = np.random.default_rng([self.seed, *place, 1])
    changed = option_order.shuffled(problem, rng)
    fits = len(self._prompt(changed, num_crops)) <= bucket
    return changed if fits else problem

  def _usable_length(self, problem: records.Problem, num_crops: int) -> int:
    """The prompt's length, if it and what comes with it are short enough."""
    length = len(self._prompt(problem, num_crops))
    if length > self.prompt_buckets[-1]:
      raise records.BadRecord(
        "prompt_too_long",
        f"the prompt of {problem.pid} has {length} tokens, more than the "
        f"largest of data.prompt_buckets ({self.prompt_buckets[-1]})",
      )
    if self._num_completions:
      self._completions(problem, [0, 0])
    return length

  def _completions(
    self, problem: records.Problem, place: list[int]
  ) -> tuple[list[list[int]], list[float]]:
    """The ids and labels of the completions that come with the prompt."""
    replies: tuple[preferences.Reply, ...] = ()
    if self.kind == "demonstrations":
      reply = chat_prompts.demonstration(problem, template=self.template)
      replies = (preferences.Reply(reply, 1.0),)
    elif self.kind == "preference":
      rng = np.random.default_rng([self.seed, *place])
      replies = self.replies(problem, rng)
    ids = [
      chat_prompts.encode_completion(reply.text, self.tokenizer)
      for reply in replies
    ]
    longest = max(map(len, ids), default=0)
    if longest > self.max_new_tokens:
      raise records.BadRecord(
        "completion_too_long",
        f"a completion of {problem.pid} has {longest} tokens, more than "
        f"rollout.max_new_tokens ({self.max_new_tokens})",
      )
    missing = self._num_completions - len(ids)
    labels = [reply.label for reply in replies]
    return ids + [[]] * missing, labels + [math.nan] * missing

  def _padded_completions(
    self, completions: list[list[list[int]]]
  ) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Ids and mask, [B, C, T]; None without completions."""
    if not self._num_completions:
      return None, None
    flat = [ids for row in completions for ids in row]
    shape = (len(completions), -1, self.max_new_tokens)
    lengths = np.array([len(ids) for ids in flat])
    mask = np.arange(self.max_new_tokens) < lengths[:, None]
    ids = _padded(flat, self.max_new_tokens)
    return ids.reshape(shape), mask.reshape(shape)

  def _images(
    self, problem: records.Problem, prompt: list[int], slots: int
  ) -> np.ndarray:
    """What the prompt shows, in as many slots as the batch has.

    Raises:
      BadRecord: The picture is damaged, or is not what its header said.
    """
    views = self._blank(0)
    if self.num_images:
      image = images.decode(problem.image_bytes)
      views = images.views(image, self.image_size, self.pan_and_scan)
    chat_prompts.check_images(
      prompt,
      self.tokenizer,
      num_images=len(views),
      soft_tokens=self.soft_tokens,
    )
    if len(views) > slots:
      raise records.BadRecord(
        "image_count",
        f"{problem.pid} shows {len(views)} images, and no problem of its batch "
        f"showed more than {slots} when the data were opened",
      )
    return np.concatenate([views, self._blank(slots - len(views))])


def _warn(index: int, error: Exception) -> None:
  """Says so a few times; `Batch.valid` counts the rest."""
  message = "Record %d is masked: %s"
  logging.log_first_n(logging.WARNING, message, 3, index, error)


def _stand_in(pid: str) -> records.Problem:
  """A problem that asks nothing."""
  return records.Problem(
    pid=pid,
    question="",
    image_path="",
    image_bytes=b"",
    choices=(),
    unit="",
    precision=-1,
    answer="",
    question_type="free_form",
    answer_type="integer",
    query="",
    solution="",
    metadata={},
  )


def _padded(rows: list[list[int]], width: int) -> np.ndarray:
  """The rows as int32 [len(rows), width], `PAD` after each."""
  padded = np.full((len(rows), width), tokens.PAD, np.int32)
  for row, ids in zip(padded, rows, strict=True):
    row[: len(ids)] = ids
  return padded
