"""Batches for training and evaluation, in an order that seed and step fix.

Step s asks the records `order[s * B : (s + 1) * B]` of one endless shuffled
sequence of the usable records, whatever the number of shards or restarts. A
record that turns out to be damaged becomes a masked row, never a gap.

References:
  Grain: https://github.com/google/grain
"""

import dataclasses
import functools
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from data_pipelines import prompt_rows, record_index, records
from data_pipelines.sources import mixtures
from data_pipelines.validation import require

# `shapes` looks at no more steps: a rarer shape may be compiled when it comes.
_MAX_STEPS_EXAMINED = 10_000
# Four threads keep ahead of any training step; each holds one batch.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class Batch:
  """The rows of one step that one reader holds, as NumPy arrays.

  A row's images come first, one for each <start_of_image> of its prompt, in
  order; the black images after them are never read.
  """

  prompt_ids: np.ndarray  # int32 [B, P], padded on the right.
  prompt_length: np.ndarray  # int32 [B].
  images: np.ndarray  # uint8 [B, I, H, H, 3]; I = 0 for models without vision.
  # int32 [B], the row's index in the batch of all shards; in an evaluation, its
  # index among all problems.
  prompt_index: np.ndarray
  # bool [B]. False marks a stand-in, which must not count: a record that is
  # damaged or, in an evaluation, too long, or padding.
  valid: np.ndarray
  # B. A damaged one is empty except for a pid that names its index; one that is
  # too long is itself; padding has the pid "".
  problems: tuple[records.Problem, ...]
  # int32 [B, C, T], or None for kind "online". C = 1 for "demonstrations", and
  # `num_labelled` for "preference".
  completion_ids: np.ndarray | None
  # bool [B, C, T], True up to the end of turn; False for a missing completion.
  completion_mask: np.ndarray | None
  # float32 [B, C] for "preference", higher for the preferred, NaN for a missing
  # completion; otherwise None.
  labels: np.ndarray | None
  # bool [B] for each data set of a mixture, True on its rows; {} for one.
  sets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class TrainBatches:
  """The endless batches of one reader, from `start_step` on.

  The builder's seed also fixes the order of the records; an index saves
  measuring them. With 0 `worker_processes` threads build the same batches;
  processes need absl flags, and a `__main__` that can be imported again.
  """

  def __init__(
    self,
    builder: prompt_rows.RowBuilder,
    *,
    prompts_per_step: int,
    start_step: int,
    worker_processes: int = 0,
    index: record_index.RecordIndex | None = None,
    shares: Sequence[int] = (1,),
  ):
    _check_batch_size(builder, "data.prompts_per_step", prompts_per_step)
    if index is None:
      index = record_index.scan(builder, len(builder.source), for_training=True)
    self._builder, self._index, self._start = builder, index, start_step
    order = _order(builder, index.usable, shares)
    self._order = order.batch(prompts_per_step, drop_remainder=True)
    build = functools.partial(_build_batch, builder, index)
    # Sliced before workers share the steps: a worker's own position depends on
    # the number of workers, and the step must be the whole position.
    steps = self._order.map_with_index(build)[start_step:]
    stream = steps.to_iter_dataset(_READ_OPTIONS)
    if worker_processes:
      options = grain.multiprocessing.MultiprocessingOptions(worker_processes)
      stream = stream.mp_prefetch(options, worker_init_fn=_ignore_interrupts)
    self._stream = iter(stream)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._stream)

  def shapes(self, num_steps: int) -> set[record_index.BatchShape]:
    """The shapes of the first batches."""
    end = self._start + min(num_steps, _MAX_STEPS_EXAMINED)
    asked = (np.asarray(self._order[x]) for x in range(self._start, end))
    return {self._index.select(x).batch_shape(self._builder) for x in asked}


def _order(
  builder: prompt_rows.RowBuilder, usable: np.ndarray, shares: Sequence[int]
) -> grain.MapDataset:
  """The indices of the records to ask; a data set has a seed and repeats."""
  parts = []
  ranges = builder.sets.values() or [range(len(builder.source))]
  for number, each in enumerate(ranges):
    own = usable[(each.start <= usable) & (usable < each.stop)]
    parts.append(
      grain.MapDataset.range(len(own))
      .shuffle(seed=(builder.seed + number) % 2**32)
      .repeat()
      .map(functools.partial(np.take, own))
    )
  if len(parts) == 1:
    return parts[0]
  # Grain's own type is private.
  order: Any = mixtures.Order(shares)
  return grain.MapDataset.select_from_datasets(parts, order)


def _ignore_interrupts(worker: int, num_workers: int) -> None:
  """Leaves Ctrl-C to the trainer, which needs the batches to save."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)


class EvalBatches:
  """One reader's batches of the first problems of a source, in its order.

  All have `batch_size` rows over all shards; padding rows fill the last one. A
  row counts as a problem, answered or not, if its problem has a pid. They can
  be iterated over again.
  """

  def __init__(
    self, builder: prompt_rows.RowBuilder, *, num_problems: int, batch_size: int
  ):
    _check_batch_size(builder, "eval.batch_size", batch_size)
    self._builder, self._size = builder, batch_size
    self._num_problems = min(num_problems, len(builder.source))
    index = record_index.scan(builder, self._num_problems, for_training=False)
    self._index = index.pad_to(
      -(-self._num_problems // batch_size) * batch_size
    )

  def with_source(self, source: records.Source) -> "EvalBatches":
    """The batches of as many problems of another source."""
    builder = dataclasses.replace(self._builder, source=source, split="")
    count = self._num_problems
    return EvalBatches(builder, num_problems=count, batch_size=self._size)

  def __len__(self) -> int:
    return len(self._index.lengths) // self._size

  def _rows(self, number: int) -> np.ndarray:
    return np.arange(number * self._size, (number + 1) * self._size)

  def shapes(self) -> set[record_index.BatchShape]:
    """The shapes of all batches."""
    return {
      self._index.select(self._rows(i)).batch_shape(self._builder)
      for i in range(len(self))
    }

  def __getitem__(self, index: int) -> Batch:
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    rows, first_row = self._rows(index), index * self._size
    return _build_batch(
      self._builder, self._index, 0, rows, first_row=first_row
    )

  def __iter__(self) -> Iterator[Batch]:
    return iter(grain.MapDataset.source(self).to_iter_dataset(_READ_OPTIONS))


def _check_batch_size(
  builder: prompt_rows.RowBuilder, setting: str, batch_size: int
) -> None:
  """Requires that the shards can share a batch evenly."""
  holds = batch_size > 0 and batch_size % builder.shard_count == 0
  rule = f"be a positive multiple of the data shards ({builder.shard_count})"
  require(holds, setting, batch_size, rule, "")


def _build_batch(
  builder: prompt_rows.RowBuilder,
  index: record_index.RecordIndex,
  step: int,
  indices: np.ndarray,
  *,
  first_row: int = 0,
) -> Batch:
  """Builds this reader's rows of a batch that asks the records `indices`.

  The first has the `prompt_index` `first_row`. Step and row seed what is drawn.
  """
  index = index.select(indices)
  numbers = np.arange(len(indices)).reshape(builder.shard_count, -1)
  numbers = numbers[list(builder.shards)].ravel().tolist()
  shape = index.batch_shape(builder)
  rows = [
    builder.build(
      int(indices[i]), int(index.lengths[i]), [step, first_row + i], shape[:2]
    )
    for i in numbers
  ]
  asked = np.asarray(indices)[numbers]
  labels = np.array([row.labels for row in rows], np.float32)
  pad = builder.tokenizer.chat.pad
  ids, mask = None, None
  if builder.num_completions:
    flat = [each for row in rows for each in row.completions]
    width = builder.max_new_tokens
    lengths = np.array([len(each) for each in flat])
    mask = np.arange(width) < lengths[:, None]
    ids, mask = (
      each.reshape(len(rows), -1, width)
      for each in (_pad(flat, width, pad), mask)
    )
  return Batch(
    prompt_ids=_pad([row.prompt for row in rows], shape[0], pad),
    prompt_length=np.array([len(row.prompt) for row in rows], np.int32),
    images=np.stack([row.images for row in rows]),
    prompt_index=np.array(numbers, np.int32) + first_row,
    valid=np.array([row.valid for row in rows]),
    problems=tuple(row.problem for row in rows),
    completion_ids=ids,
    completion_mask=mask,
    labels=labels if builder.kind == "preference" else None,
    sets={
      name: (each.start <= asked) & (asked < each.stop)
      for name, each in builder.sets.items()
    },
  )


def _pad(sequences: list[list[int]], width: int, pad: int) -> np.ndarray:
  """The sequences as int32 [n, width], with `pad` after each."""
  padded = np.full((len(sequences), width), pad, np.int32)
  for row, ids in zip(padded, sequences, strict=True):
    row[: len(ids)] = ids
  return padded
