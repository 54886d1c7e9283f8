"""Accelerator types: how many hosts they have, and what GKE calls them.

A type that is not here is still created and run on, by what the API says of it;
only `jobset` and `--dry-run` need it here.

References:
  https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
"""

import dataclasses
import math

from grpo_tpu.distributed import hardware

_CHIPS_OF_HOST = 4

# How accelerator types begin, then the value of GKE's node label
# `cloud.google.com/gke-tpu-accelerator`.
_NAMES = {
  "v5e": ("v5litepod", "tpu-v5-lite-podslice"),
  "v6e": ("v6e", "tpu-v6e-slice"),
  "v5p": ("v5p", "tpu-v5p-slice"),
  "tpu7x": ("tpu7x", "tpu7x"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """A slice.

  Attributes:
    gke_accelerator: As node pools are labelled.
    topology: As node pools are labelled, in "4x4".
    hosts: Machines that its chips are divided over.
    chips_per_host: Equal on all of them.
  """

  gke_accelerator: str
  topology: str
  hosts: int
  chips_per_host: int


def _chips(topology: str) -> int:
  return math.prod(map(int, topology.split("x")))


def _shape(gke_accelerator: str, topology: str) -> Shape:
  count = _chips(topology)
  # Eight chips in a plane are one machine; in a cube they are two.
  hosts = 1 if topology == "2x4" else math.ceil(count / _CHIPS_OF_HOST)
  return Shape(gke_accelerator, topology, hosts, count // hosts)


SHAPES = {
  f"{prefix}-{_chips(topology) * chip.cores_per_chip}": (
    _shape(gke_accelerator, topology)
  )
  for name, (prefix, gke_accelerator) in _NAMES.items()
  for chip in [hardware.CHIPS[name]]
  for topology in chip.shapes
}


def shape(accelerator_type: str) -> Shape:
  """What an accelerator type is.

  Raises:
    ValueError: It is not in the table.
  """
  if accelerator_type not in SHAPES:
    raise ValueError(
      f"ACCELERATOR_TYPE ({accelerator_type!r}) must be one of"
      f" {', '.join(SHAPES)} for this; choose one of them."
    )
  return SHAPES[accelerator_type]
