"""Joining the processes of a run.

A launcher says how many there are; a program started alone is one process.
"""

import os

import jax
from absl import logging


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
