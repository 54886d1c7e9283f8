"""What a plan says of a described slice; nothing here has one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from grpo_tpu import advice, aot, chips, planning, traffic
from grpo_tpu import config as run_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOPOLOGIES = {
  "gemma3_4b_v5e_16": "v5e:4x4",
  "gemma3_4b_v6e_16": "v6e:4x4",
  "gemma3_4b_v5p_16": "v5p:2x2x2",
  "gemma3_12b_v5p_64": "v5p:2x4x4",
  "gemma3_27b_v5p_256": "v5p:4x4x8",
  "gemma3_27b_v6e_256": "v6e:16x16",
}
MARGIN = 0.1


def config_of(name, *kind, **changes):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config(*kind)
  values.update_from_flattened_dict(changes)
  return run_config.Config.from_config_dict(values)


@pytest.fixture
def libtpu():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("no libtpu for this machine")


def test_a_mesh_that_does_not_cover_the_slice_is_told_the_nearest():
  config = config_of("smoke")
  with pytest.raises(ValueError, match=r"4 devices of v5e:2x2.*mesh.fsdp=4"):
    planning.check(config, "v5e:2x2")


def test_no_compiler_is_told_with_the_remedy(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"libtpu.*pip install.*macOS"):
    planning.check_compiler()


def test_the_nearest_mesh_keeps_what_it_can():
  config = config_of("smoke", **{"mesh.fsdp": 4, "mesh.tensor": 2})
  near = planning.nearest_mesh(config, 16)
  assert near == "mesh.replica=1 mesh.fsdp=8 mesh.tensor=2"
  # 64 prompts do not divide over 48 shards; 96 do.
  near = planning.nearest_mesh(config, 96)
  assert near.endswith("mesh.fsdp=48 mesh.tensor=2 data.prompts_per_step=96")


def test_a_plan_wants_a_topology():
  with pytest.raises(ValueError, match="--topology.*v5e:4x4"):
    planning.check(config_of("smoke"), None)


def test_a_setting_that_breaks_a_rule_is_no_advice():
  config = config_of("smoke")
  assert advice.changed(config, {"train.microbatch_bundles": 7}) is None
  changed = advice.changed(config, {"train.microbatch_bundles": 32})
  assert changed.train.microbatch_bundles == 32


def test_meshes_that_prompts_do_not_divide_over_are_not_advised():
  config = config_of("gemma3_4b_v5e_16", **{"data.prompts_per_step": 8})
  found = advice.meshes(config, chips.parse("v5e:4x4"))
  assert {x["mesh.fsdp"] for x in found} == {8, 4, 2}
  assert all(x["mesh.fsdp"] * x["mesh.tensor"] == 16 for x in found)


def test_one_device_moves_nothing_and_fsdp_moves_weights_thrice():
  topology = chips.parse("v5e:4x4")
  name = "gemma3_4b_v5p_16"
  alone = config_of(name, **{"mesh.fsdp": 1})
  assert traffic.volume(alone, topology, "train_step (text)")["ici"] == 0
  eight = config_of(name, **{"train.microbatch_bundles": 64})
  ici = traffic.volume(eight, topology, "train_step (text)")["ici"]
  # 3.88e9 weights and the projector; bf16 gathered twice, fp32 gradients once.
  size = 3.88e9 + 1152 * 2560
  assert ici == pytest.approx(7 / 8 * size * (2 * 2 + 4), rel=0.01)


def test_replicas_of_several_slices_reduce_over_the_network_between_them():
  config = config_of("gemma3_4b_v5p_16", **{"mesh.replica": 2})
  one, two = (
    traffic.volume(config, chips.parse(name), "train_step (text)")
    for name in ("v5p:2x2x4", "v5p:2x2x2*2")
  )
  assert one["dcn"] == 0 < two["dcn"]
  assert one["ici"] - two["ici"] == pytest.approx(two["dcn"])


HLO = """
  %a = f32[262144,2560]{1,0} all-reduce(%x), replica_groups={}
  %b = bf16[1,10240,2560]{2,1,0} all-gather(%y), dimensions={2}
  %c = (bf16[8,8,1024,2560]{3,2,1,0}, u32[]) all-gather-start(%z)
  %d = f32[4]{0} all-reduce(%w)
  %e = f32[4]{0} all-reduce(%v)
"""


def test_collectives_are_read_from_a_program_the_largest_first():
  found = aot.collectives(HLO)
  assert [x.num_bytes for x in found[:2]] == [
    262144 * 2560 * 4,
    8 * 8 * 1024 * 2560 * 2,
  ]
  assert found[-1] == aot.Collective("all-reduce", "f32", (4,), 2)


def test_defects_are_what_the_sharding_plan_does_not_ask_for():
  config = config_of("gemma3_4b_v6e_16")
  rows = [vars(x) for x in aot.collectives(HLO)]
  gradient, activations = traffic.defects(config, rows)
  assert "262144, 2560" in gradient and "not reduce-scattered" in gradient
  assert "1024, 2560" in activations and "gathered" in activations


def main_in_plan_mode(tmp_path, *flags):
  return subprocess.run(
    [
      *(sys.executable, "-m", "grpo_tpu.main", "--mode=plan"),
      f"--workdir={tmp_path}",
      *flags,
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  "flags, says",
  [
    (["--topology=v5e:5x5"], "nearest is v5e:"),
    (["--topology=v5e:2x2"], "mesh.fsdp=4"),
  ],
  ids=["absurd", "mesh"],
)
def test_a_request_that_cannot_be_is_exit_64(tmp_path, flags, says):
  done = main_in_plan_mode(tmp_path, "--config=configs/smoke.py", *flags)
  assert done.returncode == 64
  assert says in done.stderr


@pytest.mark.aot
def test_the_smoke_config_is_planned(tmp_path, libtpu):
  done = main_in_plan_mode(
    tmp_path,
    "--config=configs/smoke.py",
    "--topology=v5e:2x2",
    "--config.mesh.fsdp=4",
  )
  assert done.returncode == 0, done.stderr
  made = json.loads((tmp_path / "plan.json").read_text())
  assert made["fits"]
  names = [row["name"] for row in made["programs"]]
  assert names == [
    *("prefill (text)", "prefill (image)", "decode_chunk"),
    *("train_step (text)", "train_step (image)"),
  ]
  for row in made["programs"]:
    assert 0 < row["hbm_bytes"] < row["hbm_limit_bytes"]
    assert row["flops"] > 0
    assert sum(row["bytes_by_class"].values()) >= row["hbm_bytes"]
  assert "fits: " in done.stdout


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_an_overlay_fits_with_a_margin(libtpu, name, kind):
  """Rollout and training resident together."""
  made = planning.plan(config_of(name, kind), chips.parse(TOPOLOGIES[name]))
  assert made.fits(MARGIN), (made.peak["name"], made.room)
