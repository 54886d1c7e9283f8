"""Accelerator types: their hosts, and their names on GKE.

`create` and `run` accept types that are not in this table, because the API says
how many workers there are. `jobset`, `--dry-run` and the check of the mesh need
the table.

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
  """The hosts of a slice."""

  chip: str  # Its name in `hardware.CHIPS`.
  gke_accelerator: str  # The accelerator label of its GKE node pools.
  topology: str  # The topology label of its GKE node pools, such as "4x4".
  hosts: int
  chips_per_host: int

  @property
  def slice_name(self) -> str:
    """The slice as `--topology` names it, such as "v5e:4x4"."""
    return f"{self.chip}:{self.topology}"


def _make_shapes() -> dict[str, Shape]:
  shapes = {}
  for name, (prefix, gke_accelerator) in _NAMES.items():
    for topology in hardware.CHIPS[name].shapes:
      chips = math.prod(map(int, topology.split("x")))
      # Eight chips in a plane share one machine; eight in a cube have two.
      hosts = 1 if topology == "2x4" else math.ceil(chips / _CHIPS_PER_HOST)
      size = chips * hardware.CHIPS[name].cores_per_chip
      shape = Shape(name, gke_accelerator, topology, hosts, chips // hosts)
      shapes[f"{prefix}-{size}"] = shape
  return shapes


# By accelerator type.
SHAPES = _make_shapes()
