"""A step that has its experience, and some of its updates done.

A preemption between two updates keeps it beside the state, so that neither what
was sampled nor what was learnt is done again.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from grpo_tpu.checkpoint import reader
from grpo_tpu.observability import writer
from grpo_tpu.rl.train_batch import TrainBatch


@dataclasses.dataclass
class BegunStep:
  """What is known of a step before its line is written.

  Attributes:
    bundles: What it learns from, laid out by their first axis alone.
    num_batches: Of prompts, that it took.
    scalars: So far, by the names of `metrics`.
    skipped: Of each update done, 1 if its gradient was not finite and 0 if it
      was.
  """

  bundles: TrainBatch
  num_batches: int
  scalars: writer.Scalars
  skipped: list[float]

  @property
  def updates_done(self) -> int:
    """How many."""
    return len(self.skipped)

  def unfinished(self) -> reader.PartialStepData:
    """As a checkpoint holds it."""
    there = {k: v for k, v in vars(self.bundles).items() if v is not None}
    record: dict[str, Any] = {
      "num_batches": self.num_batches,
      "scalars": {
        name: value.item() if hasattr(value, "item") else value
        for name, value in jax.device_get(self.scalars).items()
      },
      "skipped": self.skipped,
      # The pictures of a model that sees none, which no file can hold.
      "empty": {
        name: [array.shape, str(array.dtype)]
        for name, array in there.items()
        if not array.size
      },
    }
    arrays = {name: array for name, array in there.items() if array.size}
    return reader.PartialStepData(self.updates_done, arrays, record)

  @classmethod
  def of(cls, unfinished: reader.PartialStepData, place: Sharding) -> Self:
    """As it was when a checkpoint took it over."""
    record = unfinished.record
    empty = {
      name: jax.device_put(jnp.zeros(shape, dtype), place)
      for name, (shape, dtype) in record["empty"].items()
    }
    return cls(
      bundles=TrainBatch(**unfinished.arrays, **empty),
      num_batches=record["num_batches"],
      scalars=record["scalars"],
      skipped=record["skipped"],
    )


def laid_out(bundles: TrainBatch, place: Sharding) -> TrainBatch:
  """The same bundles, each array in this place.

  An update compiles for the places of its arguments. So these must not depend
  on whether the step was interrupted.
  """
  # Not by a program, of which there would be one for each shape.
  return jax.device_put(bundles, place)
