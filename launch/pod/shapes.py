"""Accelerator types: their hosts, and their names on GKE.

`create` and `run` accept types that are not in this table, because the API says
how many workers there are. Only `jobset` and `--dry-run` need the table.

References:
  https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
"""

import dataclasses
import math

from grpo_tpu.distributed import hardware

_CHIPS_PER_HOST = 4

# The prefix of the accelerator type, and the value of the GKE node label
# `cloud.google.com/gke-tpu-accelerator`.
_NAMES = {
  "v5e": ("v5litepod", "tpu-v5-lite-podslice"),
  "v6e": ("v6e", "tpu-v6e-slice"),
  "v5p": ("v5p", "tpu-v5p-slice"),
  "tpu7x": ("tpu7x", "tpu7x"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """The hosts of a slice.

  Attributes:
    gke_accelerator: The accelerator label of its GKE node pools.
    topology: The topology label of its GKE node pools, such as "4x4".
    hosts: The number of machines.
    chips_per_host: The number of chips of each machine.
  """

  gke_accelerator: str
  topology: str
  hosts: int
  chips_per_host: int


def _num_chips(topology: str) -> int:
  return math.prod(map(int, topology.split("x")))


def _make_shape(gke_accelerator: str, topology: str) -> Shape:
  chips = _num_chips(topology)
  # Eight chips in a plane share one machine; eight in a cube have two.
  hosts = 1 if topology == "2x4" else math.ceil(chips / _CHIPS_PER_HOST)
  return Shape(gke_accelerator, topology, hosts, chips // hosts)


SHAPES = {
  f"{prefix}-{_num_chips(topology) * hardware.CHIPS[name].cores_per_chip}": (
    _make_shape(gke_accelerator, topology)
  )
  for name, (prefix, gke_accelerator) in _NAMES.items()
  for topology in hardware.CHIPS[name].shapes
}


def shape(accelerator_type: str) -> Shape:
  """The shape of an accelerator type.

  Raises:
    ValueError: The type is not in the table.
  """
  if accelerator_type not in SHAPES:
    raise ValueError(
      f"ACCELERATOR_TYPE ({accelerator_type!r}) must be one of"
      f" {', '.join(SHAPES)} for GKE; choose one of them."
    )
  return SHAPES[accelerator_type]
