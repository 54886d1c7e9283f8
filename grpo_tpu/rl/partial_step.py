"""A step whose batch is collected and whose updates may be partly done.

A preemption between two updates saves it beside the state, so that neither the
rollout nor an update is repeated.
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
class PartialStep:
  """The batch and the metrics of a step that is not finished."""

  batch: TrainBatch
  num_batches: int  # The batches of prompts that the step has read.
  metrics: writer.Scalars
  # One number per finished update: 1 if its gradient was not finite, else 0.
  skipped: list[float]

  @property
  def updates_done(self) -> int:
    """Number of finished updates."""
    return len(self.skipped)

  def to_data(self) -> reader.PartialStepData:
    """The form that a checkpoint holds."""
    fields = vars(self.batch.replace(num_encoded=None))  # Chosen again.
    fields = {k: v for k, v in fields.items() if v is not None}
    arrays = {name: array for name, array in fields.items() if array.size}
    record: dict[str, Any] = {
      "num_batches": self.num_batches,
      "scalars": {
        name: value.item() if hasattr(value, "item") else value
        for name, value in jax.device_get(self.metrics).items()
      },
      "skipped": self.skipped,
      # A text model's images have no elements, which no file can hold.
      "empty": {
        name: [array.shape, str(array.dtype)]
        for name, array in fields.items()
        if name not in arrays
      },
    }
    return reader.PartialStepData(self.updates_done, arrays, record)

  @classmethod
  def from_data(
    cls, data: reader.PartialStepData, row_sharding: Sharding
  ) -> Self:
    """The step that a checkpoint holds; empty arrays get `row_sharding`."""
    record = data.record
    empty = {
      name: jax.device_put(jnp.zeros(shape, dtype), row_sharding)
      for name, (shape, dtype) in record["empty"].items()
    }
    return cls(
      batch=TrainBatch(**data.arrays, **empty),
      num_batches=record["num_batches"],
      metrics=record["scalars"],
      skipped=record["skipped"],
    )
