"""TPU chips and slices, from `hardware.toml`, by the standard library alone."""

import dataclasses
import math
import pathlib
import re
import tomllib


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation of TPU; `hardware.toml` explains the fields."""

  name: str
  device_kinds: list[str]
  peak_flops: float
  hbm_limit_bytes: int
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  devices_per_chip: int
  cores_per_chip: int
  shapes: list[str]


CHIPS = {
  name: Chip(name, **fields)
  for name, fields in tomllib.loads(
    pathlib.Path(__file__).with_name("hardware.toml").read_text()
  ).items()
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more equal slices, joined by the data-centre network."""

  chip: Chip
  shape: str  # One slice's, as in "4x4".
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
    cores = _count_chips(self.shape) * self.chip.cores_per_chip
    return f"{self.chip.name}-{cores}"


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
      f"nearest is {_nearest_slice('v5e', shape)}."
    )
  if shape not in CHIPS[name].shapes:
    raise ValueError(
      f"--topology ({text!r}) must be a slice that is on sale for {name}: "
      f"{', '.join(CHIPS[name].shapes)}; the nearest is "
      f"{_nearest_slice(name, shape)}."
    )
  if slices is not None and not 1 <= int(slices) <= 256:
    raise ValueError(
      f"--topology ({text!r}) must have from 1 to 256 slices; set "
      f"--topology={name}:{shape}*2."
    )
  return Topology(CHIPS[name], shape, int(slices or 1))


def _nearest_slice(name: str, shape: str) -> str:
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
  match = re.fullmatch(r"(?:v5litepod|(\w+?))-(\d+)", text.strip())
  name = match and (match[1] or "v5e")
  if not match or name not in CHIPS or not int(match[2]):
    return ""
  chips = max(1, int(match[2]) // CHIPS[name].cores_per_chip)
  return f"The nearest is {_nearest_slice(name, str(chips))}."


def _count_chips(shape: str) -> int:
  return math.prod(map(int, shape.split("x")))
