"""The table of TPU chips and slices, on Python's standard library alone.

Peaks and bandwidths are the vendor's figures. Work divided by one of them is a
lower bound, not a measured time.

References:
  https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, .../tpu7x: peak, HBM
  and bidirectional bandwidth between chips, slice shapes, hosts.
  https://jax-ml.github.io/scaling-book/tpus: bandwidth of a host to the
  data-centre network.
  HBM limits come from the errors of libtpu 0.0.50.1 for programs that do not
  fit.
"""

import dataclasses
import math
import re

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation of TPU.

  Attributes:
    name: The name in a topology.
    device_kinds: The names that JAX gives to a device of such a chip.
    peak_flops: bfloat16 operations per second of a chip.
    hbm_limit_bytes: Memory of one device that the compiler may use.
    hbm_bandwidth: Bytes per second of a chip.
    ici_bandwidth: Bytes per second that a chip sends to its neighbours over all
      links; half of the bidirectional figure.
    dcn_bandwidth: Bytes per second that a chip sends to other slices; an equal
      share of its host's bandwidth.
    devices_per_chip: The number of JAX devices of a chip.
    cores_per_chip: The number of cores, which an accelerator type such as
      v5p-16 counts.
    shapes: The slice shapes on sale, in ascending order.
  """

  name: str
  device_kinds: tuple[str, ...]
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
      device_kinds=("TPU v5 lite",),
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
      device_kinds=("TPU v6 lite",),
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
      device_kinds=("TPU v5", "TPU v5p"),
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
      device_kinds=("TPU7x",),
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
  """One or more equal slices, joined by the data-centre network.

  Attributes:
    chip: The chip of all slices.
    shape: The shape of one slice, as in "4x4".
    num_slices: The number of slices.
  """

  chip: Chip
  shape: str
  num_slices: int

  def __str__(self) -> str:
    suffix = f"*{self.num_slices}" if self.num_slices > 1 else ""
    return f"{self.chip.name}:{self.shape}{suffix}"

  @property
  def num_chips(self) -> int:
    """The number of chips in all slices."""
    return _count_chips(self.shape) * self.num_slices

  @property
  def num_devices(self) -> int:
    """The number of JAX devices in all slices."""
    return self.num_chips * self.chip.devices_per_chip

  @property
  def slice_name(self) -> str:
    """The accelerator type of one slice, as in v5p-16."""
    return (
      f"{self.chip.name}-{_count_chips(self.shape) * self.chip.cores_per_chip}"
    )


def hbm_bandwidth(device_kind: str) -> float | None:
  """Bytes per second of a device, by JAX's name for it; None if unknown."""
  for chip in CHIPS.values():
    if device_kind in chip.device_kinds:
      return chip.hbm_bandwidth / chip.devices_per_chip
  return None


def parse_topology(text: str) -> Topology:
  """The topology of a name such as "v5e:4x4", or "v5e:4x4*2" for two slices.

  Raises:
    ValueError: There is no such slice; the error names the nearest one.
  """
  match = re.fullmatch(r"([\w]+):(\d+(?:x\d+){1,2})(?:\*(\d+))?", text.strip())
  if not match:
    raise ValueError(
      f"--topology ({text!r}) must be a chip and the shape of a slice, as in "
      "v5e:4x4, or v5e:4x4*2 for two slices; the chips are "
      f"{', '.join(CHIPS)}. {_suggestion(text)}".rstrip()
    )
  name, shape, slices = match.groups()
  if name not in CHIPS:
    raise ValueError(
      f"--topology ({text!r}) must name a known chip: {', '.join(CHIPS)}; the "
      f"nearest is {nearest_slice('v5e', shape)}."
    )
  if shape not in CHIPS[name].shapes:
    raise ValueError(
      f"--topology ({text!r}) must be a slice that is on sale for {name}: "
      f"{', '.join(CHIPS[name].shapes)}; the nearest is "
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
  wanted = math.log(max(1, _count_chips(shape)))
  best = min(
    CHIPS[name].shapes, key=lambda s: abs(math.log(_count_chips(s)) - wanted)
  )
  return f"{name}:{best}"


def larger_slices(topology: Topology) -> list[Topology]:
  """The slices of the same chip that have more chips, in ascending order."""
  return [
    Topology(topology.chip, shape, topology.num_slices)
    for shape in topology.chip.shapes
    if _count_chips(shape) > _count_chips(topology.shape)
  ]


def _suggestion(text: str) -> str:
  """A sentence with the nearest slice for an accelerator type like v5e-16."""
  match = re.fullmatch(r"(?:v5litepod|([\w]+?))-(\d+)", text.strip())
  if not match:
    return ""
  name = match[1] or "v5e"
  if name not in CHIPS or not int(match[2]):
    return ""
  chips = max(1, int(match[2]) // CHIPS[name].cores_per_chip)
  return f"The nearest is {nearest_slice(name, str(chips))}."


def _count_chips(shape: str) -> int:
  return math.prod(map(int, shape.split("x")))
