"""Changes to settings and meshes."""

import pytest

from grpo_tpu.distributed import hardware
from grpo_tpu.planning import changes as changing
from tests.grpo_tpu.planning.planning_cases import (
  config_of,
  config_of_4b,
  parse_command_line,
)


def test_a_mesh_that_does_not_cover_the_slice_names_the_nearest():
  config = config_of("smoke")
  with pytest.raises(ValueError, match=r"4 devices of v5e:2x2.*mesh.fsdp=4"):
    changing.check_mesh(config, hardware.parse_topology("v5e:2x2"))


def test_slices_without_replicas_of_their_own_name_the_nearest():
  config = config_of_4b()
  with pytest.raises(ValueError, match=r"2 slices.*mesh.replica=2"):
    changing.check_mesh(config, hardware.parse_topology("v5e:2x4*2"))


def test_the_nearest_mesh_keeps_what_it_can():
  config = config_of("smoke", **{"mesh.fsdp": 4, "mesh.tensor": 2})
  near = changing.nearest_mesh(config, hardware.parse_topology("v5e:4x4"))
  assert changing.drop_unchanged(config, near) == {"mesh.fsdp": 8}
  # 64 prompts do not divide over 24 shards; 72 do, and 24 at a time.
  near = changing.nearest_mesh(config, hardware.parse_topology("v5e:4x4*3"))
  assert changing.drop_unchanged(config, near) == {
    "mesh.replica": 3,
    "mesh.fsdp": 8,
    "data.prompts_per_step": 72,
    "train.microbatch_bundles": 24,
    "eval.batch_size": 264,
  }


def test_a_tuple_and_a_word_survive_the_shell():
  changes = {"data.prompt_buckets": (384,), "model.remat": "offload"}
  wanted = changing.apply_changes(config_of("smoke"), changes)
  assert parse_command_line("smoke", changing.format_flags(changes)) == wanted


def test_a_setting_that_breaks_a_rule_is_no_advice():
  config = config_of("smoke")
  assert changing.apply_changes(config, {"train.microbatch_bundles": 7}) is None
  changed = changing.apply_changes(config, {"train.microbatch_bundles": 32})
  assert changed.train.microbatch_bundles == 32


def test_every_mesh_that_is_named_makes_settings_that_hold():
  """The mesh divides batches and model axes."""
  for name in ("gemma3_4b_v5e_16", "gemma3_27b_v5p_256"):
    config = config_of(name)
    for chip in (hardware.CHIPS["v6e"], hardware.CHIPS["tpu7x"]):
      for shape in chip.shapes:
        described = hardware.parse_topology(f"{chip.name}:{shape}")
        changes = changing.nearest_mesh(config, described)
        new = changing.apply_changes(config, changes)
        changing.check_mesh(new, described)
        smaller = changing.drop_unchanged(config, changes).keys() - {
          "mesh.fsdp"
        }
        assert new.mesh.tensor == config.mesh.tensor or smaller
