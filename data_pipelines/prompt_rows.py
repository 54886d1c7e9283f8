"""One row of a batch: a problem's prompt ids, images and given completions.

A record that turns out to be damaged, or is too long to be evaluated, becomes a
stand-in row of the same shape, marked invalid, so that no row ever moves.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from data_pipelines import images, records
from data_pipelines.preferences import completions as preferences
from data_pipelines.text import chat_prompts, shuffle_options
from data_pipelines.text import tokenizer as tokens
from data_pipelines.validation import require, require_one_of

KINDS = ("online", "demonstrations", "preference")
# Values that stand in place of a prompt's length.
UNUSABLE, PADDING = 0, -1
# A source raises these for a damaged record; a bug raises something else.
UNREADABLE = (ValueError, OSError)


class Row(NamedTuple):
  """One prompt with its completions, not yet padded."""

  prompt: list[int]
  completions: list[list[int]]
  labels: list[float]
  images: np.ndarray
  valid: bool
  problem: records.Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBuilder:
  """Builds the rows that one reader holds."""

  source: records.Source  # The problems of one split.
  tokenizer: tokens.Tokenizer
  # Ascending lengths, in tokens, that prompts are padded to. A batch takes the
  # smallest that holds its longest prompt on any shard.
  prompt_buckets: tuple[int, ...]
  image_size: int  # H, in pixels; 0 for a model without an image tower.
  soft_tokens: int  # Placeholders for each image.
  # One of `KINDS`: the completions of a prompt; see `Batch`.
  kind: str = "online"
  max_new_tokens: int = 0  # T; a longer completion makes its row invalid.
  seed: int = 0  # For the rejected completions and the order of options.
  # The parts of a batch that are read here, ascending.
  shards: tuple[int, ...] = (0,)
  shard_count: int = 1  # Number of equal parts that a batch is cut into.
  # None draws a right completion and wrong ones for "preference".
  completion_source: preferences.Source | None = None
  num_labelled: int = 2  # Labelled completions for each prompt.
  template: chat_prompts.Template = chat_prompts.TAGGED
  shuffle_options: bool = False  # True asks with options in a new order.
  # A batch has room for as many images and crops as its richest row has.
  pan_and_scan: images.PanAndScan = images.WHOLE
  split: str = ""  # In the log; "" logs nothing about it.
  model_name: str = ""  # The setting `model.name`, for the log.
  # The records of each data set of a mixture, by name; {} for one.
  sets: Mapping[str, range] = dataclasses.field(default_factory=dict)
  rewards_unchecked: bool = False  # True if a reward needs no checkable answer.

  def __post_init__(self):
    require_one_of("data.kind", self.kind, KINDS)
    buckets, shortest = self.prompt_buckets, self.shortest_prompt
    ascends = list(buckets) == sorted(set(buckets))
    rule = f"ascend to at least {shortest}, as for a prompt without a question"
    holds = ascends and max(buckets, default=0) >= shortest
    require(holds, "data.prompt_buckets", buckets, rule, "")
    known = sorted(set(self.shards) & set(range(self.shard_count)))
    rule = f"be ascending indices below shard_count ({self.shard_count})"
    holds = bool(known) and list(self.shards) == known
    require(holds, "shards", self.shards, rule, "")

  @property
  def shortest_prompt(self) -> int:
    """Tokens of a prompt without a question."""
    return len(self._prompt(_stand_in(""), ()))

  @property
  def num_completions(self) -> int:
    """Completions that come with each prompt."""
    kinds = {"online": 0, "demonstrations": 1, "preference": self.num_labelled}
    return kinds[self.kind]

  def measure(self, problem: records.Problem) -> tuple[int, int]:
    """Counts the tokens of a usable problem's prompt, and its images."""
    if problem.images and not self.image_size:
      raise records.BadRecord(
        "unseen_pictures",
        f"{problem.pid} has pictures, which model.name ({self.model_name!r}) "
        "cannot see",
      )
    num_crops = self._num_crops(problem)
    length = len(self._prompt(problem, num_crops))
    if length > self.prompt_buckets[-1]:
      raise records.BadRecord(
        "prompt_too_long",
        f"the prompt of {problem.pid} has {length} tokens, more than the "
        f"largest of data.prompt_buckets ({self.prompt_buckets[-1]})",
      )
    if self.num_completions:
      self._completions(problem, [0, 0])
    return length, len(num_crops) + sum(num_crops)

  def build(
    self, index: int, length: int, position: list[int], shape: tuple[int, int]
  ) -> Row:
    """Builds the row of a record, or an invalid row of the same shape.

    `length` is that of its prompt, `UNUSABLE` or `PADDING`. The position, a
    step and the row's index in it, seeds what is drawn. The shape is the
    batch's prompt bucket and its images per row.
    """
    bucket, slots = shape
    problem = _stand_in("" if length == PADDING else f"unreadable:{index}")
    if length != PADDING:
      try:
        problem = self.source[index]
        if length != UNUSABLE:
          num_crops = self._num_crops(problem)
          problem = self._reorder(problem, position, bucket, num_crops)
          completions, labels = self._completions(problem, position)
          prompt = self._prompt(problem, num_crops)
          shown = self._images(problem, prompt, slots)
          return Row(prompt, completions, labels, shown, True, problem)
      except UNREADABLE as error:
        warn_unusable(index, error)
    return Row(
      prompt=self._prompt(_stand_in(""), ()),
      completions=[[]] * self.num_completions,
      labels=[math.nan] * self.num_completions,
      images=self._blank(slots),
      valid=False,
      problem=problem,
    )

  def _blank(self, slots: int) -> np.ndarray:
    return np.zeros((slots, self.image_size, self.image_size, 3), np.uint8)

  def _num_crops(self, problem: records.Problem) -> list[int]:
    """The number of crops of each picture."""
    return [images.num_crops(x, self.pan_and_scan) for x in problem.images]

  def _prompt(
    self, problem: records.Problem, num_crops: Sequence[int]
  ) -> list[int]:
    return chat_prompts.encode_prompt(
      problem,
      self.tokenizer,
      soft_tokens=self.soft_tokens,
      num_crops=num_crops,
      template=self.template,
    )

  def _reorder(
    self,
    problem: records.Problem,
    position: list[int],
    bucket: int,
    num_crops: Sequence[int],
  ) -> records.Problem:
    """The problem with its options in the row's order, if that prompt fits."""
    if not self.shuffle_options:
      return problem
    # The 1 gives another stream than that of the rejected completions; a 0
    # would give the same.
    rng = np.random.default_rng([self.seed, *position, 1])
    changed = shuffle_options.shuffle(problem, rng)
    fits = len(self._prompt(changed, num_crops)) <= bucket
    return changed if fits else problem

  def _completions(
    self, problem: records.Problem, position: list[int]
  ) -> tuple[list[list[int]], list[float]]:
    """The ids and labels of the completions that come with the prompt."""
    given: tuple[records.LabelledCompletion, ...] = ()
    if self.kind == "demonstrations":
      text = preferences.demonstration(problem, template=self.template)
      given = (records.LabelledCompletion(text, 1.0),)
    elif self.kind == "preference":
      source = self.completion_source or preferences.synthesize(
        self.num_labelled, template=self.template
      )
      given = source(problem, np.random.default_rng([self.seed, *position]))
    ids = [
      chat_prompts.encode_completion(each.text, self.tokenizer)
      for each in given
    ]
    longest = max(map(len, ids), default=0)
    if longest > self.max_new_tokens:
      raise records.BadRecord(
        "completion_too_long",
        f"a completion of {problem.pid} has {longest} tokens, more than "
        f"rollout.max_new_tokens ({self.max_new_tokens})",
      )
    missing = self.num_completions - len(ids)
    labels = [each.label for each in given]
    return ids + [[]] * missing, labels + [math.nan] * missing

  def _images(
    self, problem: records.Problem, prompt: list[int], slots: int
  ) -> np.ndarray:
    """The prompt's images, followed by black ones up to `slots`."""
    views = [
      images.views(images.decode(x), self.image_size, self.pan_and_scan)
      for x in problem.images
    ]
    count, soft_tokens = sum(map(len, views)), self.soft_tokens
    chat_prompts.check_images(
      prompt, self.tokenizer, num_images=count, soft_tokens=soft_tokens
    )
    if count > slots:
      raise records.BadRecord(
        "image_count",
        f"{problem.pid} shows {count} images, and no problem of its batch "
        f"showed more than {slots} when the data were opened",
      )
    return np.concatenate([*views, self._blank(slots - count)])


def warn_unusable(index: int, error: Exception) -> None:
  """Logs the first few unusable records; others are counted alone."""
  message = "Record %d cannot be used: %s"
  logging.log_first_n(logging.WARNING, message, 3, index, error)


def _stand_in(pid: str) -> records.Problem:
  """A problem without a question."""
  empty = records.make_question("")
  return dataclasses.replace(empty, pid=pid, answer_type="integer")
