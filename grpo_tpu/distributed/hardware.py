"""TPU chips and slices as they are sold: what a plan is measured against.

Peaks and bandwidths are the makers' figures, so that what is divided by them is
a bound and never a time.

References:
  https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, .../tpu7x: peak, HBM
  and bidirectional bandwidth between chips, slice shapes, hosts.
  https://jax-ml.github.io/scaling-book/tpus: bandwidth of a host's share of the
  data-centre network.
  Limits are those of libtpu 0.0.50.1, which names them where it refuses a
  program that is too big.
"""

import dataclasses
import math
import re

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation of TPU.

  Attributes:
    name: As topologies are named.
    peak_flops: bfloat16 operations per second of a chip.
    hbm_limit_bytes: Of one device, what the compiler may fill.
    hbm_bandwidth: Bytes per second of a chip.
    ici_bandwidth: Bytes per second that a chip sends to its neighbours, all
      links together; half of the bidirectional figure.
    dcn_bandwidth: Bytes per second that a chip sends to other slices: its share
      of its host's.
    devices_per_chip: Devices that JAX sees of a chip.
    cores_per_chip: That accelerator types such as v5p-16 count.
    shapes: Of the slices that can be had.
  """

  name: str
  peak_flops: float
  hbm_limit_bytes: int
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  devices_per_chip: int
  cores_per_chip: int
  shapes: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
  *("8x8x8", "8x8x16", "8x16x16", "16x16x16"),
)

CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v5e",
      peak_flops=197e12,
      hbm_limit_bytes=int(15.75 * _GIB),
      hbm_bandwidth=819e9,
      ici_bandwidth=200e9,
      dcn_bandwidth=3.125e9,
      devices_per_chip=1,
      cores_per_chip=1,
      shapes=_FLAT,
    ),
    Chip(
      name="v6e",
      peak_flops=918e12,
      hbm_limit_bytes=int(31.24 * _GIB),
      hbm_bandwidth=1638e9,
      ici_bandwidth=400e9,
      dcn_bandwidth=12.5e9,
      devices_per_chip=1,
      cores_per_chip=1,
      shapes=_FLAT,
    ),
    Chip(
      name="v5p",
      peak_flops=459e12,
      hbm_limit_bytes=int(95.73 * _GIB),
      hbm_bandwidth=2765e9,
      ici_bandwidth=600e9,
      dcn_bandwidth=6.25e9,
      devices_per_chip=1,
      cores_per_chip=2,
      shapes=(*_CUBES, "16x16x24"),
    ),
    Chip(
      name="tpu7x",
      peak_flops=2307e12,
      hbm_limit_bytes=int(94.74 * _GIB),
      hbm_bandwidth=7380e9,
      ici_bandwidth=600e9,
      dcn_bandwidth=12.5e9,
      devices_per_chip=2,
      cores_per_chip=2,
      shapes=_CUBES,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more equal slices.

  Attributes:
    chip: Of all of them.
    shape: Of a slice, as in "4x4".
    num_slices: Joined by the data-centre network.
  """

  chip: Chip
  shape: str
  num_slices: int

  def __str__(self) -> str:
    several = f"*{self.num_slices}" if self.num_slices > 1 else ""
    return f"{self.chip.name}:{self.shape}{several}"

  @property
  def num_chips(self) -> int:
    """In all slices."""
    return _chips_of(self.shape) * self.num_slices

  @property
  def num_devices(self) -> int:
    """That JAX sees."""
    return self.num_chips * self.chip.devices_per_chip

  @property
  def slice_name(self) -> str:
    """The accelerator type of one slice, as in v5p-16."""
    return (
      f"{self.chip.name}-{_chips_of(self.shape) * self.chip.cores_per_chip}"
    )


def parse_topology(text: str) -> Topology:
  """A topology from its name: "v5e:4x4", or "v5e:4x4*2" for two slices.

  Raises:
    ValueError: There is no such slice; the message names the nearest.
  """
  match = re.fullmatch(r"([\w]+):(\d+(?:x\d+){1,2})(?:\*(\d+))?", text.strip())
  if not match:
    raise ValueError(
      f"--topology ({text!r}) must be a chip and the shape of a slice, as in "
      f"v5e:4x4, or v5e:4x4*2 for two slices; the chips are "
      f"{', '.join(CHIPS)}. {_near_slice_name(text)}".rstrip()
    )
  name, shape, slices = match.groups()
  if name not in CHIPS:
    raise ValueError(
      f"--topology ({text!r}) must be of a chip that is known, which are "
      f"{', '.join(CHIPS)}; the nearest is {nearest_slice('v5e', shape)}."
    )
  if shape not in CHIPS[name].shapes:
    raise ValueError(
      f"--topology ({text!r}) must be a slice that {name} is sold in, which "
      f"are {', '.join(CHIPS[name].shapes)}; the nearest is "
      f"{nearest_slice(name, shape)}."
    )
  if slices is not None and not 1 <= int(slices) <= 256:
    raise ValueError(
      f"--topology ({text!r}) must have from 1 to 256 slices; set "
      f"--topology={name}:{shape}*2."
    )
  return Topology(CHIPS[name], shape, int(slices or 1))


def nearest_slice(name: str, shape: str) -> str:
  """The slice of a chip whose number of chips is nearest to a shape's."""
  wanted = math.log(max(1, _chips_of(shape)))
  best = min(
    CHIPS[name].shapes, key=lambda s: abs(math.log(_chips_of(s)) - wanted)
  )
  return f"{name}:{best}"


def larger_slices(topology: Topology) -> list[Topology]:
  """The slices of the same chip that have more chips, in ascending order."""
  return [
    Topology(topology.chip, shape, topology.num_slices)
    for shape in topology.chip.shapes
    if _chips_of(shape) > _chips_of(topology.shape)
  ]


def _near_slice_name(text: str) -> str:
  """What someone meant who wrote an accelerator type, as in v5e-16."""
  match = re.fullmatch(r"(?:v5litepod|([\w]+?))-(\d+)", text.strip())
  if not match:
    return ""
  name = match[1] or "v5e"
  if name not in CHIPS or not int(match[2]):
    return ""
  chips = max(1, int(match[2]) // CHIPS[name].cores_per_chip)
  return f"The nearest is {nearest_slice(name, str(chips))}."


def _chips_of(shape: str) -> int:
  return math.prod(map(int, shape.split("x")))
