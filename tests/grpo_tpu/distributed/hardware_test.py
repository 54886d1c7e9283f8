"""A topology is a slice on sale; an error names the nearest one."""

import pytest

from grpo_tpu.distributed import hardware


@pytest.mark.parametrize(
  "name, num_chips, slice_name",
  [
    ("v5e:4x4", 16, "v5e-16"),
    # Accelerator types count cores, and a v5p chip has two.
    ("v5p:2x2x2", 8, "v5p-16"),
    ("v5p:4x4x8", 128, "v5p-256"),
    ("v6e:16x16", 256, "v6e-256"),
    ("v5e:4x4*2", 32, "v5e-16"),
  ],
)
def test_a_topology_counts_its_chips(name, num_chips, slice_name):
  topology = hardware.parse_topology(name)
  assert topology.num_chips == num_chips
  assert topology.slice_name == slice_name
  assert str(topology) == name


@pytest.mark.parametrize(
  "name, says",
  [
    ("v5e:3x3", "nearest is v5e:2x4"),
    ("v6e:32x32", "nearest is v6e:16x16"),
    ("v5p:4x4", "nearest is v5p:2x2x4"),
    ("v5e-16", "nearest is v5e:4x4"),
    ("v5p-256", "nearest is v5p:4x4x8"),
    ("v5litepod-16", "nearest is v5e:4x4"),
    ("gpu:2x2", "chips.* v5e, v6e, v5p, tpu7x|known.*v5e"),
    ("", "as in v5e:4x4"),
    ("v5e:4x4*0", "from 1 to 256 slices"),
  ],
)
def test_a_slice_that_is_not_on_sale_is_refused_with_the_nearest(name, says):
  with pytest.raises(ValueError, match=f"--topology.*{says}"):
    hardware.parse_topology(name)


def test_a_chip_may_be_several_devices():
  assert hardware.parse_topology("tpu7x:2x2x2*2").num_devices == 32
  assert hardware.parse_topology("v5p:2x2x2").num_devices == 8


def test_larger_slices_ascend_from_the_next():
  larger = hardware.larger_slices(hardware.parse_topology("v5e:4x4"))
  assert [str(x) for x in larger] == [
    "v5e:4x8",
    "v5e:8x8",
    "v5e:8x16",
    "v5e:16x16",
  ]


@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=lambda x: x.name)
def test_the_shapes_of_a_chip_are_valid_and_in_ascending_order(chip):
  for shape in chip.shapes:
    assert hardware.parse_topology(f"{chip.name}:{shape}").chip is chip
  assert list(chip.shapes) == sorted(
    chip.shapes,
    key=lambda s: hardware.parse_topology(f"{chip.name}:{s}").num_chips,
  )
