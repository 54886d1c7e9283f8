"""Joining the processes of a run.

A launcher says how many there are; a program started alone is one process.
"""

import os

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils


def initialize() -> None:
  """Joins the other processes where `JAX_COORDINATOR_ADDRESS` names one.

  The count and this process's place come from `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`. A failure to join ends the program: a host that went on
  alone would train a model of its own.
  """
  if os.environ.get("JAX_COORDINATOR_ADDRESS"):
    jax.distributed.initialize(
      num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
      process_id=int(os.environ["JAX_PROCESS_ID"]),
    )
  logging.info(
    "Process %d of %d, %d of %d devices: %s",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
    jax.devices()[0].device_kind,
  )


def gathered(local: bytes) -> list[bytes]:
  """What each process has to say, in their order; all of them must ask."""
  lengths = multihost_utils.process_allgather(np.array([len(local)], np.int32))
  lengths = np.ravel(lengths).tolist()
  padded = np.zeros(max(lengths), np.uint8)
  padded[: len(local)] = np.frombuffer(local, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)
  ]
